"""Guidance and thresholding: functions from denoisers to a denoiser, and withheld conditions.

Two predictions for one z are combined with weights that sum to one, so that z = alpha x + sigma eps
holds of the guided prediction too, and guiding x, eps or v is the same thing.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm.diffusion.gaussian import Denoiser, Prediction, alpha, expand_to, mean_over_dims, sigma
from vdm.errors import require

# (z, log_snr) -> (the model's own prediction, the guide's)
Pair = Callable[[Array, Array], tuple[Prediction, Prediction]]
Limit = float | Float[Array, '']
# 'label' [B], 'vector' [B E], 'condition' [B *spatial C], 'valid' [B *spatial 1]: any of them
Conditions = Mapping[str, Array]


def guide(
  own: Denoiser, both: Pair, weight: float, log_snr_min: Limit, log_snr_max: Limit
) -> Denoiser:
  """Returns guide + weight (own - guide) where log_snr is within the limits, `own` elsewhere.

  It is classifier-free guidance (Ho & Salimans 2022, eq. 6, with weight = 1 + their w), limited to
  an interval (arXiv 2404.07724), or autoguidance (arXiv 2406.02507), by a worse model. Where no
  example of the batch is within the limits, `own` alone is computed. The log_snr of a multivariate
  schedule counts as its mean over dimensions.

  Args:
    own: the model's denoiser.
    both: its prediction and the guide's, together.
    weight: 1 is no guidance, 0 the guide alone.
    log_snr_min: lower limit.
    log_snr_max: upper limit.
  """

  def denoise(z, log_snr):
    level = mean_over_dims(log_snr)
    inside = (log_snr_min <= level) & (level <= log_snr_max)
    extra = expand_to(jnp.where(inside, weight - 1.0, 0.0), z)

    def guided():
      return jax.tree.map(lambda a, b: a + extra * (a - b), *both(z, log_snr))

    return jax.lax.cond(inside.any(), guided, lambda: own(z, log_snr))

  return denoise


def pair(own: Denoiser, other: Denoiser) -> Pair:
  """Returns the pair that asks two denoisers, one after the other."""
  return lambda z, log_snr: (own(z, log_snr), other(z, log_snr))


def without(conditions: Conditions) -> Conditions:
  """Returns what networks take for no condition: -1 for classes, NaN for vectors and fields.

  Which dimensions are `valid` is no condition that could be withheld.
  """

  def absent(name, value):
    if name == 'valid':
      return value
    if name == 'label':
      return jnp.full_like(value, -1)
    return jnp.full(value.shape, jnp.nan, jnp.float32)

  return {name: absent(name, value) for name, value in conditions.items()}


def conditions_pair(denoiser_of: Callable[[Conditions], Denoiser], conditions: Conditions) -> Pair:
  """Returns the pair that asks one network with and without conditions, in one call of 2 B.

  Args:
    denoiser_of: conditions -> Denoiser.
    conditions: of each example.
  """

  def both(z, log_snr):
    # Each example beside its copy: a batch that is split over devices stays where it is.
    def beside(value, absent):
      return jnp.stack([value.astype(absent.dtype), absent], 1).reshape(-1, *value.shape[1:])

    doubled = jax.tree.map(beside, dict(conditions), without(conditions))
    prediction = denoiser_of(doubled)(jnp.repeat(z, 2, axis=0), jnp.repeat(log_snr, 2, axis=0))
    split = jax.tree.map(lambda a: a.reshape(len(z), 2, *a.shape[1:]), prediction)
    return tuple(jax.tree.map(lambda a, i=i: a[:, i], split) for i in (0, 1))

  return both


def drop(keys: Array, conditions: Conditions, rate: float) -> Conditions:
  """Withholds all conditions of an example with probability `rate`; one key per example."""
  dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)

  def either(absent, value):
    return jnp.where(expand_to(dropped, value), absent, value.astype(absent.dtype))

  return jax.tree.map(either, without(conditions), dict(conditions))


def no_threshold() -> Callable[[Denoiser], Denoiser]:
  """Returns the function that leaves a denoiser as it is."""
  return lambda denoiser: denoiser


def static_threshold() -> Callable[[Denoiser], Denoiser]:
  """Returns the function that clips x_hat to [-1, 1], the data's range (Imagen, section 2.3)."""
  return lambda denoiser: _with_x(denoiser, lambda x: jnp.clip(x, -1.0, 1.0))


def dynamic_threshold(percentile: float = 0.995) -> Callable[[Denoiser], Denoiser]:
  """Returns the function that clips x_hat to [-s, s] and divides it by s (Imagen, section 2.3).

  s is the given percentile, in (0, 1], of |x_hat| over each example, or 1 where that is less.
  """
  require(0 < percentile <= 1, 'percentile', percentile, 'in (0, 1]', 'Imagen has 0.995')

  def threshold(x):
    s = jnp.quantile(jnp.abs(x).reshape(x.shape[0], -1), percentile, axis=1)
    s = expand_to(jnp.maximum(s, 1.0), x)
    return jnp.clip(x, -s, s) / s

  return lambda denoiser: _with_x(denoiser, threshold)


def _with_x(denoiser: Denoiser, change: Callable[[Array], Array]) -> Denoiser:
  """Returns the denoiser with x_hat changed, and eps_hat so that still z = alpha x + sigma eps."""

  def denoise(z, log_snr):
    x, eps = denoiser(z, log_snr)
    changed = change(x)
    # (z - alpha x) / sigma would lose the digits of eps_hat where there is little noise
    return Prediction(changed, eps + expand_to(alpha(log_snr) / sigma(log_snr), x) * (x - changed))

  return denoise


THRESHOLDS = {'none': no_threshold, 'static': static_threshold, 'dynamic': dynamic_threshold}
