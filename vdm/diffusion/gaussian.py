"""The Gaussian process q(z_t | x), and the types that join everything else.

Everything is a function of the log signal-to-noise ratio (VDM eq. 2; gamma = -log_snr there):
alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr), z = alpha x + sigma eps.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

# t [B] in [0, 1] -> log_snr [B]; a multivariate one -> [B ...], which broadcasts against z, and if
# it depends on conditions of B examples takes a t of [1] as that of all
Schedule = Callable[[Float[Array, ' b']], Float[Array, 'b ...']]
Denoiser = Callable[[Array, Array], 'Prediction']  # (z [B ...], log_snr as above) -> Prediction


class Prediction(NamedTuple):
  """Holds what a denoiser says of z: the data in it and the noise in it, each of z's shape."""

  x: Array
  eps: Array


def alpha(log_snr: Float[Array, '*b']) -> Float[Array, '*b']:
  """Returns the signal's scale, sqrt(sigmoid(log_snr)), exact in float32 for |log_snr| <= 80."""
  return jnp.sqrt(jax.nn.sigmoid(log_snr))


def sigma(log_snr: Float[Array, '*b']) -> Float[Array, '*b']:
  """Returns the noise's scale, sqrt(sigmoid(-log_snr)); never sqrt(1 - alpha^2), which cancels."""
  return jnp.sqrt(jax.nn.sigmoid(-log_snr))


def expand_to(a: Shaped[Array, '...'], z: Shaped[Array, '...']) -> Shaped[Array, '...']:
  """Appends axes of length one to `a` until it broadcasts against z.

  `a` is [B] or a scalar; that of a multivariate schedule has z's number of axes already, and stays.
  """
  return a.reshape(a.shape + (1,) * (z.ndim - a.ndim))


def per_channel(values: Any, z: Shaped[Array, '...']) -> Float[Array, '...']:
  """Returns one number per channel [C] as float32 that broadcasts against z [... C]."""
  return jnp.asarray(values, jnp.float32).reshape((1,) * (z.ndim - 1) + (-1,))


def sum_over_dims(
  a: Float[Array, 'b ...'], valid: Shaped[Array, 'b ...'] | None = None
) -> Float[Array, ' b']:
  """Sums over all axes but the first, where `valid`, which broadcasts against a, if it is given."""
  if valid is not None:
    a = jnp.where(valid, a, 0)
  return a.reshape(a.shape[0], -1).sum(axis=1)


def count_dims(shape: tuple[int, ...], valid: Shaped[Array, 'b ...'] | None = None):
  """Returns the number of dimensions of an example, or [B], of those that are `valid`."""
  if valid is None:
    return math.prod(shape)
  return sum_over_dims(jnp.broadcast_to(valid, (len(valid), *shape)).astype(jnp.float32))


def mean_over_dims(a: Float[Array, 'b ...']) -> Float[Array, ' b']:
  """Averages over all axes but the first, if there are any."""
  return a.reshape(a.shape[0], -1).mean(axis=1)


def q_sample(
  x: Float[Array, 'b ...'], eps: Float[Array, 'b ...'], log_snr: Float[Array, 'b ...']
) -> Float[Array, 'b ...']:
  """Returns z = alpha x + sigma eps (VDM eq. 1) for x, eps [B ...] and log_snr [B], or [B ...]."""
  return expand_to(alpha(log_snr), x) * x + expand_to(sigma(log_snr), x) * eps


def log_snr_and_slope(schedule: Schedule, t: Float[Array, ' b']):
  """Returns (log_snr, dlog_snr/dt), each [B], for any schedule, a learned one too."""
  return jax.jvp(schedule, (t,), (jnp.ones_like(t),))


def is_multivariate(schedule: Schedule) -> bool:
  """Returns whether log_snr is [B ...], by its shape alone."""
  return len(jax.eval_shape(schedule, jnp.zeros(1)).shape) > 1


def end_points(schedule: Schedule) -> tuple[Array, Array]:
  """Returns (log_snr_max, log_snr_min), the schedule at t = 0 and at t = 1.

  They are scalars or, of a multivariate schedule, [1 ...], and [B ...] of a conditional one.
  """
  if is_multivariate(schedule):
    return schedule(jnp.zeros(1)), schedule(jnp.ones(1))
  ends = schedule(jnp.array([0.0, 1.0]))
  return ends[0], ends[1]


def end_levels(schedule: Schedule) -> tuple[Array, Array]:
  """Returns the end points as scalars, of a multivariate schedule the means over dimensions."""
  high, low = end_points(schedule)
  return (high, low) if high.ndim == 0 else (high.mean(), low.mean())


def density(schedule: Schedule, t: Float[Array, ' b']) -> Float[Array, ' b']:
  """Returns p(log_snr) = -dt/dlog_snr at schedule(t), for uniform t [B] (VDM++ section 2)."""
  return -1 / log_snr_and_slope(schedule, t)[1]


def posterior(
  z_t: Float[Array, 'b ...'],
  x: Float[Array, 'b ...'],
  log_snr_t: Float[Array, 'b ...'],
  log_snr_s: Float[Array, 'b ...'],
) -> tuple[Float[Array, 'b ...'], Float[Array, 'b ...']]:
  """Returns the mean [B ...] and variance of q(z_s | z_t, x), s < t (VDM eq. 25 to 27).

  With c = -expm1(log_snr_t - log_snr_s), the share of the noise at t that was added after s:
  mean = (alpha_s / alpha_t) (1 - c) z_t + alpha_s c x, variance = sigma_s^2 c, of log_snr's shape.
  """
  c = -jnp.expm1(log_snr_t - log_snr_s)
  alpha_s = alpha(log_snr_s)
  keep = alpha_s / alpha(log_snr_t) * jnp.exp(log_snr_t - log_snr_s)
  mean = expand_to(keep, z_t) * z_t + expand_to(alpha_s * c, x) * x
  return mean, sigma(log_snr_s) ** 2 * c


def kl_to_standard_normal(
  mean: Float[Array, 'b ...'],
  variance: Float[Array, '...'],
  valid: Shaped[Array, 'b ...'] | None = None,
) -> Float[Array, ' b']:
  """Returns KL(N(mean, variance I) || N(0, I)) in nats, over `valid` dims; variance broadcasts."""
  return 0.5 * sum_over_dims(mean**2 + variance - jnp.log(variance) - 1, valid)


def standard_normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, 'b ...']:
  """Draws eps ~ N(0, I) [B, *shape], one for each of B keys, the same on any number of devices."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def fold_in(key: Array, index: Array) -> Array:
  """Returns one key per example: integers `index` [B] folded into one key, or each into its own."""
  return jax.vmap(jax.random.fold_in, (0 if key.ndim else None, 0))(key, index)
