"""Bits per dimension of discrete data: the grid, the decoder p(x | z_0), the prior term."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vdm.gaussian import alpha, expand_to, kl_to_standard_normal, sigma, sum_over_dims

# The decoder's softmax runs over this many grid values either side of the nearest one ...
RADIUS = 3
# ... while the values left out weigh less than e^-40 in all: ((RADIUS + 1/2)^2 - 1/4) d^2 / 2 > 40
WINDOW_SPACING = float(np.sqrt(80 / (RADIUS * (RADIUS + 1))))


def to_grid(u: Int[Array, '...'], num_values: int) -> Float[Array, '...']:
  """Integers 0 .. K - 1 to the centres of K equal cells of [-1, 1]: 2 (u + 1/2) / K - 1."""
  return (2 * u.astype(jnp.float32) + 1) / num_values - 1


def from_grid(x: Float[Array, '...'], num_values: int) -> Int[Array, '...']:
  """The nearest of the K integers: the mode of the decoder."""
  u = jnp.round(((x + 1) * num_values - 1) / 2)
  return jnp.clip(u, 0, num_values - 1).astype(jnp.int32)


def decoder_log_prob(
  u: Int[Array, 'b ...'],
  z_0: Float[Array, 'b ...'],
  log_snr_max: Float[Array, ''],
  num_values: int,
) -> Float[Array, ' b']:
  """log p(x | z_0) in nats (VDM eq. 12): for each sub-pixel the softmax over its K values of

    logit_k = -1/2 (z_0 / alpha_0 - x_k)^2 e^log_snr_max.

  Where the grid is wide against the noise the softmax runs over the few nearest values, which is
  the full one to float32 rounding; else over all K.

  Args:
    u: the data, integers in [0, K), [B ...].
    z_0: the latent at log_snr_max, [B ...].
    log_snr_max: a scalar, traced or not.
    num_values: K.
  """
  offset = (z_0 / alpha(log_snr_max) - to_grid(u, num_values)) * jnp.exp(log_snr_max / 2)
  return _log_prob_at(u, offset, log_snr_max, num_values)


def _log_prob_at(u, offset, log_snr_max, num_values):
  """The same for z_0 / alpha_0 given in units of its noise, from the data's own value: eps."""
  spacing = 2 / num_values * jnp.exp(log_snr_max / 2)

  def log_softmax(steps):
    """-offset^2 / 2 - log sum_k exp(-(offset - steps_k spacing)^2 / 2), elementwise."""
    logits = [-0.5 * (offset - step * spacing) ** 2 for step in steps]
    return -0.5 * offset**2 - _logsumexp(logits)

  def window():
    nearest = jnp.round(offset / spacing).astype(u.dtype)
    last = num_values - 1
    centre = jnp.clip(nearest + u, RADIUS, last - RADIUS) - u
    return log_softmax([jax.lax.stop_gradient(centre + k) for k in range(-RADIUS, RADIUS + 1)])

  @jax.checkpoint  # [B ..., K] is never kept: the compiler fuses it into its sum, in both passes
  def full():
    k = jax.lax.broadcasted_iota(u.dtype, (*u.shape, num_values), u.ndim) - u[..., None]
    logits = -0.5 * (offset[..., None] - k * spacing) ** 2
    return -0.5 * offset**2 - jax.nn.logsumexp(logits, axis=-1)

  if num_values <= 2 * RADIUS + 1:
    return sum_over_dims(full())
  return sum_over_dims(jax.lax.cond(spacing > WINDOW_SPACING, window, full))


def _logsumexp(terms):
  largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, terms))
  return largest + jnp.log(sum(jnp.exp(term - largest) for term in terms))


def reconstruction_loss(
  u: Int[Array, 'b ...'],
  eps: Float[Array, 'b ...'],
  log_snr_max: Float[Array, ''],
  num_values: int,
) -> Float[Array, ' b']:
  """-log p(x | z_0) in nats for z_0 = alpha_0 x + sigma_0 eps (VDM eq. 11, third term)."""
  return -_log_prob_at(u, eps, log_snr_max, num_values)  # without the rounding of z_0


def prior_loss(x: Float[Array, 'b ...'], log_snr_min: Float[Array, '']) -> Float[Array, ' b']:
  """KL(q(z_1 | x) || N(0, I)) in nats (VDM eq. 11, first term)."""
  mean = expand_to(alpha(log_snr_min), x) * x
  return kl_to_standard_normal(mean, expand_to(sigma(log_snr_min) ** 2, x))


def bits_per_dim(nats: Float[Array, '...'], num_dims: int) -> Float[Array, '...']:
  """Nats of a whole example to bits per dimension: nats / (D ln 2)."""
  return nats / (num_dims * np.log(2))
