"""The Gaussian process q(z_t | x), and what a network's output says about x and eps.

Everything is a function of the log signal-to-noise ratio (VDM eq. 2; gamma = -log_snr there):
alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr), z = alpha x + sigma eps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Schedule = Callable[[Float[Array, '*b']], Float[Array, '*b']]  # t in [0, 1] -> log_snr
Denoiser = Callable[[Array, Array], 'Prediction']  # (z [B ...], log_snr [B]) -> Prediction


class Prediction(NamedTuple):
  """What a denoiser says of z: the data in it and the noise in it, each of z's shape."""

  x: Array
  eps: Array


def alpha(log_snr: Float[Array, '*b']) -> Float[Array, '*b']:
  """Scale of the signal, sqrt(sigmoid(log_snr)): exact in float32 for |log_snr| <= 80."""
  return jnp.sqrt(jax.nn.sigmoid(log_snr))


def sigma(log_snr: Float[Array, '*b']) -> Float[Array, '*b']:
  """Scale of the noise, sqrt(sigmoid(-log_snr)); never sqrt(1 - alpha^2), which cancels."""
  return jnp.sqrt(jax.nn.sigmoid(-log_snr))


def expand_to(a: Shaped[Array, '*b'], z: Shaped[Array, '...']) -> Shaped[Array, '...']:
  """Appends axes of length one to `a` ([B], or a scalar) until it broadcasts against z."""
  return a.reshape(a.shape + (1,) * (z.ndim - a.ndim))


def sum_over_dims(a: Float[Array, 'b ...']) -> Float[Array, ' b']:
  """Sums over all axes but the first."""
  return a.reshape(a.shape[0], -1).sum(axis=1)


def q_sample(
  x: Float[Array, 'b ...'], eps: Float[Array, 'b ...'], log_snr: Float[Array, ' b']
) -> Float[Array, 'b ...']:
  """z = alpha x + sigma eps (VDM eq. 1) for x, eps [B ...] and log_snr [B]."""
  return expand_to(alpha(log_snr), x) * x + expand_to(sigma(log_snr), x) * eps


def log_snr_and_slope(schedule: Schedule, t: Float[Array, ' b']):
  """(log_snr, dlog_snr/dt), each [B], for any schedule, a learned one too."""
  return jax.jvp(schedule, (t,), (jnp.ones_like(t),))


def density(schedule: Schedule, t: Float[Array, ' b']) -> Float[Array, ' b']:
  """p(log_snr) = -dt/dlog_snr at log_snr = schedule(t), for uniform t [B] (VDM++ section 2)."""
  return -1 / log_snr_and_slope(schedule, t)[1]


SIGMA_DATA = 0.5  # the standard deviation of the data that the head F reckons with (EDM table 1)


def _edm_norm(a, s):
  """Root mean square of z = a x + s eps, for data of mean square SIGMA_DATA^2."""
  return jnp.sqrt(s**2 + SIGMA_DATA**2 * a**2)


def _edm_head(out, z, a, s):
  """x_hat = c_skip z / a + c_out F (EDM eq. 7) and its eps_hat, in forms that do not cancel."""
  norm = _edm_norm(a, s)
  return Prediction(
    SIGMA_DATA * (SIGMA_DATA * a * z / norm + s * out) / norm,
    (s * z / norm - SIGMA_DATA * a * out) / norm,
  )


# Each head maps (output, z, alpha, sigma) to (x_hat, eps_hat), given z = alpha x + sigma eps.
HEADS = {
  'eps': lambda out, z, a, s: Prediction((z - s * out) / a, out),
  'x': lambda out, z, a, s: Prediction(out, (z - a * out) / s),
  'v': lambda out, z, a, s: Prediction(a * z - s * out, s * z + a * out),
  'o': lambda out, z, a, s: Prediction((z - s * out) / (a + s), (z + a * out) / (a + s)),
  'score': lambda out, z, a, s: Prediction((z + s**2 * out) / a, -s * out),
  'F': _edm_head,
}


def network_input(
  head: str, z: Float[Array, 'b ...'], log_snr: Float[Array, ' b']
) -> Float[Array, 'b ...']:
  """What a network with this head reads: z, but for F.

  For F it is EDM's c_in z / alpha = z / sqrt(sigma^2 + sigma_data^2 alpha^2), of mean square one
  at every log_snr for data of mean square sigma_data^2. EDM's other input, the noise level
  c_noise = -log_snr / 8, is affine in log_snr, as is the t that every network here reads.
  """
  if head != 'F':
    return z
  return z / _edm_norm(expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z))


def loss_ratio(head: str, log_snr: Float[Array, '*b']) -> Float[Array, '*b']:
  """r(log_snr) = |out_hat - out|^2 / |eps_hat - eps|^2, a head's own loss by that of eps.

  eps 1; x e^-log_snr; v 1 + e^-log_snr; o (1 + e^(-log_snr / 2))^2; score 1 + e^log_snr;
  F e^-log_snr / sigma_data^2 + 1. A head is affine in its output, so r is what
  one unit of output does to eps_hat, to the power of -2.
  """
  one = jnp.ones_like(log_snr)
  return HEADS[head](one, jnp.zeros_like(one), alpha(log_snr), sigma(log_snr)).eps ** -2


def to_prediction(
  head: str, output: Float[Array, 'b ...'], z: Float[Array, 'b ...'], log_snr: Float[Array, ' b']
) -> Prediction:
  """The one place that knows what a network predicts.

  Args:
    head: a name in HEADS: 'eps'; 'x'; 'v' = alpha eps - sigma x; 'o' = eps - x, flow matching's;
      'score' = -eps / sigma; 'F', EDM's preconditioned output (see `network_input`).
    output: the network's output, of z's shape.
    z: the noisy data [B ...].
    log_snr: [B].

  Returns:
    Prediction(x, eps) with z = alpha x + sigma eps.
  """
  return HEADS[head](output, z, expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z))


def posterior(
  z_t: Float[Array, 'b ...'],
  x: Float[Array, 'b ...'],
  log_snr_t: Float[Array, ' b'],
  log_snr_s: Float[Array, ' b'],
) -> tuple[Float[Array, 'b ...'], Float[Array, ' b']]:
  """Mean [B ...] and variance [B] of q(z_s | z_t, x), s < t (VDM eq. 25 to 27).

  With c = -expm1(log_snr_t - log_snr_s), the share of the noise at t that was added after s:
  mean = (alpha_s / alpha_t) (1 - c) z_t + alpha_s c x, variance = sigma_s^2 c.
  """
  c = -jnp.expm1(log_snr_t - log_snr_s)
  alpha_s = alpha(log_snr_s)
  keep = alpha_s / alpha(log_snr_t) * jnp.exp(log_snr_t - log_snr_s)
  mean = expand_to(keep, z_t) * z_t + expand_to(alpha_s * c, x) * x
  return mean, sigma(log_snr_s) ** 2 * c


def kl_to_standard_normal(
  mean: Float[Array, 'b ...'], variance: Float[Array, '...']
) -> Float[Array, ' b']:
  """KL(N(mean, variance I) || N(0, I)) in nats, summed over dimensions; variance broadcasts."""
  return 0.5 * sum_over_dims(mean**2 + variance - jnp.log(variance) - 1)


def standard_normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, 'b ...']:
  """eps ~ N(0, I) of `shape` for each of B keys: [B, *shape], the same on any number of devices."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def fold_in(key: Array, index: Array) -> Array:
  """One key per example: `index` [B] integers folded into one key, or one by one into B keys."""
  return jax.vmap(jax.random.fold_in, (0 if key.ndim else None, 0))(key, index)
