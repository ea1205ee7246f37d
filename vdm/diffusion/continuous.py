"""Decoders of continuous values: densities, in nats per dimension and per unit of the data.

x = (u - shift) / scale per channel. With y = z_0 / alpha_0 and s_0 = exp(-log_snr_max / 2), the
noise of y, a value is normal about y: with s_0, the posterior of x under a flat prior, or with a
standard deviation that is learned. As log_snr_max grows the reconstruction term falls like
-D/2 log_snr_max while the diffusion term grows like D/2 log_snr_max: their sum converges.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from vdm.diffusion.decoders import Decoder
from vdm.diffusion.gaussian import (
  alpha,
  expand_to,
  per_channel,
  standard_normal,
  sum_over_dims,
)
from vdm.errors import require

SHOWN_STDS = 3.0  # either side of the mean, from black to white


def normal(
  shift: Sequence[float],
  scale: Sequence[float],
  log_snr_max: float,
  learned_std: bool = False,
) -> Decoder:
  """Returns the decoder u ~ N(y scale + shift, (s scale)^2) of real values.

  Args:
    shift: of each channel, in the data's units.
    scale: of each channel, positive.
    log_snr_max: of the untrained schedule, where a learned s starts from s_0.
    learned_std: whether s is a parameter for each channel; else it is s_0.
  """

  def to_data(x):
    return x * per_channel(scale, x) + per_channel(shift, x)

  def log_likelihood(u, x, offset, std):
    return _log_normal(offset / std, std) - jnp.log(per_channel(scale, x))

  return _decoder(shift, scale, log_snr_max, learned_std, to_data, log_likelihood, 'real values')


def censored(
  shift: Sequence[float],
  scale: Sequence[float],
  log_snr_max: float,
  learned_std: bool = False,
  low: float = 0.0,
  high: float = 1.0,
) -> Decoder:
  """Returns the decoder of values in [low, high] that are often a bound itself, such as rain.

  At a bound it is the probability that a normal value lies beyond, log Phi((low - y) / s) and
  log Phi((y - high) / s), and a density between: the likelihood is mixed, and not comparable with
  one of densities alone. Beyond the bounds it is 0.

  Args:
    shift: of each channel, in the data's units.
    scale: of each channel, positive.
    log_snr_max: of the untrained schedule, where a learned s starts from s_0.
    learned_std: whether s is a parameter for each channel; else it is s_0.
    low: bound, in the data's units.
    high: bound, in the data's units.
  """
  require(low < high, 'low', low, f'below high={high}', 'swap them')

  def to_data(x):
    return jnp.clip(x * per_channel(scale, x) + per_channel(shift, x), low, high)

  def log_likelihood(u, x, offset, std):
    unit, zero = per_channel(scale, x), per_channel(shift, x)
    between = _log_normal(offset / std, std) - jnp.log(unit)
    y, least, most = x + offset, (low - zero) / unit, (high - zero) / unit
    below, above = norm.logcdf((least - y) / std), norm.logcdf((y - most) / std)
    inside = jnp.where(u <= low, below, jnp.where(u >= high, above, between))
    return jnp.where((low <= u) & (u <= high), inside, -jnp.inf)

  units = f'values in [{low:g}, {high:g}], censored'
  how = shift, scale, log_snr_max, learned_std, to_data, log_likelihood, units
  return _decoder(*how, has_density=False)  # at a bound there is a probability


def _log_normal(eps, std):
  """Returns log N(eps std; 0, std^2), elementwise."""
  return -0.5 * eps**2 - 0.5 * math.log(2 * math.pi) - jnp.log(std)


def _decoder(
  shift: Sequence[float],
  scale: Sequence[float],
  log_snr_max: float,
  learned_std: bool,
  to_data: Callable,
  log_likelihood: Callable,
  units: str,
  has_density: bool = True,
) -> Decoder:
  """Returns a decoder of (u, x, y - x, std) -> log p(u | y) per dimension, in the data's units."""
  good = len(shift) == len(scale) and all(s > 0 and math.isfinite(s) for s in scale)
  rule, remedy = f'{len(shift)} positive numbers', 'a channel that is constant is no data'
  require(good, 'scale', tuple(scale), rule, remedy)

  def to_model(u):
    u = jnp.asarray(u, jnp.float32)
    return (u - per_channel(shift, u)) / per_channel(scale, u)

  def dequantize(keys, u, log_snr_max, valid=None):
    """Returns x itself and, for log q, the logarithm of du/dx: nothing is drawn."""
    log_scale = jnp.broadcast_to(jnp.log(per_channel(scale, u)), u.shape)
    return to_model(u), sum_over_dims(log_scale, valid)

  def bound_to(log_std):
    def std_at(log_snr_max, z):
      log_s = -log_snr_max / 2
      return jnp.exp(expand_to(log_s, z) if log_std is None else per_channel(log_std, z))

    def log_prob(u, z_0, log_snr_max, valid=None):
      x, y = to_model(u), z_0 / expand_to(alpha(log_snr_max), z_0)
      return sum_over_dims(log_likelihood(u, x, y - x, std_at(log_snr_max, z_0)), valid)

    def loss(u, eps, log_snr_max, valid=None):
      noise = expand_to(jnp.exp(-log_snr_max / 2), eps) * eps
      each = log_likelihood(u, to_model(u), noise, std_at(log_snr_max, eps))
      return -sum_over_dims(each, valid)

    def sample(keys, z_0, log_snr_max):
      y, std = z_0 / expand_to(alpha(log_snr_max), z_0), std_at(log_snr_max, z_0)
      return to_data(y + std * standard_normal(keys, z_0.shape[1:]))

    return Decoder(
      to_model=to_model,
      from_model=to_data,
      log_prob=log_prob,
      loss=loss,
      sample=sample,
      dequantizations={'none': dequantize} if has_density else {},
      to_pixels=to_pixels,
      dtype=np.dtype(np.float32),
      units=units,
      unit='nats/dim',
    )

  def to_pixels(u):
    x = (np.asarray(u, np.float32) - np.asarray(shift)) / np.asarray(scale)
    shown = np.clip(x / (2 * SHOWN_STDS) + 0.5, 0, 1)
    return np.round(255 * np.nan_to_num(shown)).astype(np.uint8)

  if not learned_std:
    return bound_to(None)
  init = lambda: {'log_std': jnp.full(len(scale), -log_snr_max / 2, jnp.float32)}
  return bound_to(init()['log_std'])._replace(
    init=init, bind=lambda params: bound_to(params['log_std'])
  )
