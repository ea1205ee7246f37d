"""Guidance and thresholding: functions from denoisers to a denoiser, and dropped labels.

Two predictions for one z are combined with weights that sum to one, so that z = alpha x + sigma eps
holds of the guided prediction too, and guiding x, eps or v is the same thing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm.diffusion.gaussian import Denoiser, Prediction, alpha, expand_to, sigma
from vdm.errors import require

# (z, log_snr) -> (the model's own prediction, the guide's)
Pair = Callable[[Array, Array], tuple[Prediction, Prediction]]
Limit = float | Float[Array, '']
Label = Int[Array, ' b'] | Float[Array, 'b e']  # the class, or the embedding, of each example


def guide(
  own: Denoiser, both: Pair, weight: float, log_snr_min: Limit, log_snr_max: Limit
) -> Denoiser:
  """Returns guide + weight (own - guide) where log_snr is within the limits, `own` elsewhere.

  It is classifier-free guidance (Ho & Salimans 2022, eq. 6, with weight = 1 + their w), limited to
  an interval (arXiv 2404.07724), or autoguidance (arXiv 2406.02507), by a worse model. Where no
  example of the batch is within the limits, `own` alone is computed.

  Args:
    own: the model's denoiser.
    both: its prediction and the guide's, together.
    weight: 1 is no guidance, 0 the guide alone.
    log_snr_min: lower limit.
    log_snr_max: upper limit.
  """

  def denoise(z, log_snr):
    inside = (log_snr_min <= log_snr) & (log_snr <= log_snr_max)
    extra = expand_to(jnp.where(inside, weight - 1.0, 0.0), z)

    def guided():
      return jax.tree.map(lambda a, b: a + extra * (a - b), *both(z, log_snr))

    return jax.lax.cond(inside.any(), guided, lambda: own(z, log_snr))

  return denoise


def pair(own: Denoiser, other: Denoiser) -> Pair:
  """Returns the pair that asks two denoisers, one after the other."""
  return lambda z, log_snr: (own(z, log_snr), other(z, log_snr))


def no_label(label: Array) -> Array:
  """Returns what networks take for no label: -1 for labels [B], zeros for embeddings [B, E]."""
  return (
    jnp.zeros_like(label) if jnp.issubdtype(label.dtype, jnp.floating) else jnp.full_like(label, -1)
  )


def label_pair(denoiser_of: Callable[[Array], Denoiser], label: Label) -> Pair:
  """Returns the pair that asks one network with and without labels, in one call of twice the batch.

  Args:
    denoiser_of: labels -> Denoiser.
    label: classes [B], or embeddings [B, E].
  """

  def both(z, log_snr):
    # Each example beside its copy: a batch that is split over devices stays where it is.
    labels = jnp.stack([label, no_label(label)], axis=1).reshape(-1, *label.shape[1:])
    prediction = denoiser_of(labels)(jnp.repeat(z, 2, axis=0), jnp.repeat(log_snr, 2))
    split = jax.tree.map(lambda a: a.reshape(len(z), 2, *a.shape[1:]), prediction)
    return tuple(jax.tree.map(lambda a, i=i: a[:, i], split) for i in (0, 1))

  return both


def drop_labels(keys: Array, label: Label, rate: float) -> Label:
  """Withholds each label or embedding with probability `rate`; one key per example."""
  dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(keys)
  return jnp.where(expand_to(dropped, label), no_label(label), label)


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
