"""Likelihoods of single examples, with their errors, and where in an example they are spent."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from vdm import build, data
from vdm.diffusion.decoders import Decoder
from vdm.diffusion.elbo import variational_bound
from vdm.diffusion.gaussian import Denoiser, Schedule, end_levels, fold_in, standard_normal
from vdm.diffusion.times import in_own_strata
from vdm.diffusion.weightings import elbo
from vdm.errors import require
from vdm.system import parallel

STRATA = 2  # neighbouring strata that count as draws of one distribution


class LogProb(NamedTuple):
  """Holds estimates of log p(x), or of a lower bound on it, of each of N examples, in nats.

  Attributes:
    estimates: [draws N]; the mean over draws is unbiased.
    alike: neighbouring draws that count as draws of one distribution: all that are independent, or
      STRATA of times in strata, which overstates their error if anything.
    terms: of the bound on -log p(x), [N 3]: reconstruction, prior and diffusion; None of the ODE.
  """

  estimates: np.ndarray
  alike: int
  terms: np.ndarray | None = None

  @property
  def value(self) -> np.ndarray:
    """Returns the mean of the draws, [N] nats."""
    return self.estimates.mean(axis=0)

  @property
  def stderr(self) -> np.ndarray:
    """Returns the standard error of `value` as an estimate, [N] nats; nan for a single draw."""
    return standard_error(self.estimates, self.alike)

  @property
  def dof(self) -> int:
    """Returns the degrees of freedom of one example's error: draws less groups of those alike."""
    return len(self.estimates) - len(_groups(len(self.estimates), self.alike))

  def minus(self, other: 'LogProb') -> 'LogProb':
    """Returns the differences of two with the same noise, whose errors are smaller for it."""
    terms = None if self.terms is None or other.terms is None else self.terms - other.terms
    return LogProb(self.estimates - other.estimates, self.alike, terms)


def standard_error(estimates: np.ndarray, alike: int = STRATA) -> np.ndarray:
  """Returns the standard error of the mean over draws, [...]; nan for a single draw.

  Draws of one stratum each have no spread to be seen. Neighbours have, to which the difference of
  their means adds: an estimate of the variance by collapsed strata (Cochran, Sampling Techniques,
  section 5A.12), which is above it if anything.

  Args:
    estimates: [draws ...].
    alike: neighbouring draws that count as draws of one distribution.
  """
  draws = len(estimates)
  if draws == 1:
    return np.full(estimates.shape[1:], np.nan)
  groups = np.split(np.asarray(estimates, np.float64), _groups(draws, alike)[1:])
  total = sum(len(group) * group.var(axis=0, ddof=1) for group in groups)
  return np.sqrt(total) / draws


def _groups(draws: int, alike: int) -> np.ndarray:
  """Returns the first draw of each group of `alike`; the last one takes what is left over."""
  return np.arange(0, max(draws - alike, 0) + 1, alike)


def bound_by_draw(
  denoiser: Denoiser,
  schedule: Schedule,
  decoder: Decoder,
  u: Shaped[Array, 'b ...'],
  index: Int[Array, ' b'],
  key: Array,
  draws: int,
  num_timesteps: int = 0,
  valid: Shaped[Array, 'b ...'] | None = None,
  intervals: int = 0,
) -> tuple[Float[Array, 'draws b 3'], Float[Array, 'b intervals ...']]:
  """Returns estimates of the bound's terms, in nats, and the diffusion term by dimension.

  Draw k of an example has a time of stratum k (`times.in_own_strata`), and noise of its own, all
  functions of key, index and k alone: the same for any conditions, whose differences are paired.

  Args:
    denoiser: (z, log_snr) -> Prediction.
    schedule: t -> log_snr.
    decoder: of the data.
    u: examples [B ...], in the data's units.
    index: numbers of the examples, [B].
    key: of all draws.
    draws: how many.
    num_timesteps: T of the bound; 0 for continuous time.
    valid: the dimensions that count, broadcasting against u; None: all.
    intervals: equal parts of the range of log-SNR, from its upper end, that the second result has;
      of a multivariate schedule the mean over dimensions counts. They add up to the term, in nats
      of each dimension.
  """
  high, low = end_levels(schedule)
  shape = u.shape[1:]

  def draw(maps, number):
    key_t, key_eps, key_recon = jax.random.split(jax.random.fold_in(key, number), 3)
    bound = variational_bound(
      denoiser,
      schedule,
      decoder,
      elbo(),
      u,
      in_own_strata(key_t, index, number, draws),
      standard_normal(fold_in(key_recon, index), shape),
      standard_normal(fold_in(key_eps, index), shape),
      num_timesteps,
      valid=valid,
    )
    terms = jnp.stack([bound.recon, bound.prior, bound.diffusion.elbo], axis=1)
    if intervals:
      share = (high - bound.diffusion.log_snr) / (high - low)
      part = jnp.clip((share * intervals).astype(jnp.int32), 0, intervals - 1)
      maps = maps.at[jnp.arange(len(u)), part].add(bound.diffusion.by_dim / draws)
    return maps, terms

  zeros = jnp.zeros((len(u), intervals, *shape))
  maps, terms = jax.lax.scan(jax.checkpoint(draw), zeros, jnp.arange(draws))
  return terms, maps


def by_condition(
  denoiser: Callable[..., Denoiser],
  schedule: Callable[..., Schedule],
  decoder: Decoder,
  u: Shaped[Array, 'b ...'],
  seed: int,
  draws: int,
  num_timesteps: int = 0,
  valid: Shaped[Array, 'b ...'] | None = None,
) -> Callable[..., Array]:
  """Returns a function of conditions to estimates of log p(u | conditions), [draws B] nats.

  Args:
    denoiser: (label=, vector=, condition=) -> (z, log_snr) -> Prediction; each given or not.
    schedule: of the same -> t -> log_snr.
    decoder: of the data.
    u: examples [B ...], in the data's units.
    seed: of the draws, which are the same for all conditions.
    draws: how many.
    num_timesteps: T of the bound; 0 for continuous time.
    valid: the dimensions that count, broadcasting against u; None: all.
  """
  axes = dict(label=0, vector=1, condition=u.ndim - 1)  # of one for all examples

  def estimates(**conditions: jax.Array | None) -> jax.Array:
    for name, value in conditions.items():
      require(name in axes, 'conditions', name, 'label, vector or condition', 'name one of them')
      if value is None:
        continue
      alone, value = jnp.ndim(value) == axes[name], jnp.asarray(value)
      conditions[name] = jnp.broadcast_to(value, (len(u), *value.shape)) if alone else value
    terms, _ = bound_by_draw(
      denoiser(**conditions),
      schedule(**conditions),
      decoder,
      u,
      jnp.arange(len(u)),
      jax.random.key(seed),
      draws,
      num_timesteps,
      valid,
    )
    return -terms.sum(axis=2)

  return estimates


def jit_step(
  model: build.Model, mesh: Mesh, draws: int, num_timesteps: int = 0, intervals: int = 0
) -> Callable:
  """Returns step(params, batch, seed) -> 'terms' [draws B 3], 'maps' [B ...], 'mask' [B].

  They are those of `bound_by_draw` for the examples of a batch of the data; what each image has
  stays on its device.
  """

  def step(params, batch, seed):
    conditions = data.conditions_of(batch)
    terms, maps = bound_by_draw(
      model.denoiser(params, conditions),
      model.schedule(params, conditions),
      model.decoder_of(params),
      batch['image'],
      batch['index'],
      jax.random.key(seed),
      draws,
      num_timesteps,
      batch.get('valid'),
      intervals,
    )
    return {'terms': terms, 'maps': maps, 'mask': batch['mask']}

  by_image, by_draw = (parallel.batch_sharding(mesh, axis) for axis in (0, 1))
  shardings = dict(terms=by_draw, maps=by_image, mask=by_image)
  return parallel.jit(step, mesh, out_shardings=shardings)


def nats_of(parts: list[dict]) -> LogProb:
  """Returns the estimates of the images of all batches, from what `jit_step` says of each."""
  kept = [part['terms'][:, part['mask'] > 0].astype(np.float64) for part in parts]
  terms = np.concatenate(kept, axis=1)
  return LogProb(-terms.sum(axis=2), STRATA, terms.mean(axis=0))
