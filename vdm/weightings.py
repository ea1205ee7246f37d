"""Weightings of the diffusion loss: log_snr -> w(log_snr), which multiplies the integrand of

  L_w(x) = 1/2 int w(log_snr) E |eps_hat - eps|^2 dlog_snr          (VDM++ eq. 7)

so that w = 1 is the evidence lower bound. Constants do not matter.

  def my_weighting(power=2.0):  # five lines, in a user's own config file
    return lambda log_snr: jax.nn.sigmoid(-log_snr) ** power
  WEIGHTINGS['mine'] = my_weighting
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Weighting = Callable[[Float[Array, ' b']], Float[Array, ' b']]


def elbo() -> Weighting:
  """w = 1: the variational bound of VDM."""
  return jnp.ones_like


def sigmoid(bias: float = 2.0) -> Weighting:
  """w = sigmoid(bias - log_snr) (VDM++ section 4, bias 2 at 64 x 64); monotone."""
  return lambda log_snr: jax.nn.sigmoid(bias - log_snr)


def iddpm() -> Weighting:
  """w = sech(log_snr / 2) (VDM++ table 1): eps loss under the cosine schedule; not monotone."""
  # sech(a) = 2 e^-|a| / (1 + e^-2|a|) never overflows
  return lambda log_snr: 2 * jnp.exp(-jnp.abs(log_snr) / 2) / (1 + jnp.exp(-jnp.abs(log_snr)))


WEIGHTINGS = {'elbo': elbo, 'sigmoid': sigmoid, 'iddpm': iddpm}
