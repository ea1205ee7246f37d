"""Bits per dimension of a whole split, each image once, with its standard error."""

import itertools
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build, cards, data
from vdm.diffusion.elbo import DiffusionTerm, coefficients_of_variation, moments, variational_bound
from vdm.diffusion.gaussian import Schedule, count_dims, end_levels, fold_in, standard_normal
from vdm.diffusion.multivariate import on_path
from vdm.diffusion.times import BLOCK, stratified_in_blocks
from vdm.evaluation.study import Study, batches, write_card
from vdm.system import parallel

NUM_BINS = 20
TERMS = ('recon', 'prior', 'diffusion')


def log_snr_bins(
  term: DiffusionTerm, ends: jax.Array, elbo: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """Returns what is spent per unit of log-SNR, 1/2 |eps_hat - eps|^2 / D, for any schedule.

  `elbo` [B] is the unweighted term of each example in the likelihood's unit, such as bits/dim.
  'spent' are sums of it, and 'width' of -dlog_snr/dt, over the examples in NUM_BINS equal bins from
  ends[1] to ends[0]. Their ratio is the mean over the levels of a bin, each as much as any other
  however the schedule goes through it: ratios times the bins' width add up to the diffusion term,
  up to how evenly times fall into the bins.
  """
  position = (term.log_snr - ends[1]) / (ends[0] - ends[1])
  number = jnp.clip((position * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
  # Both at once: two scatters, each compiled with a rounding of its own, could put a level that is
  # on a bin's edge, as in discrete time, into two bins.
  columns = jnp.stack([elbo * mask, -term.slope * mask], axis=1)
  sums = jnp.zeros((NUM_BINS, 2)).at[number].add(columns)
  return {'spent': sums[:, 0], 'width': sums[:, 1]}


def make_eval_step(model: build.Model, settings: ConfigDict) -> Callable:
  """Returns step(params, batch, num_images, seed) -> what each image has, and sums over the batch.

  Each image has 'terms' [draws, B, 3] in the likelihood's unit and 'loss' [draws, B], the training
  loss in nats/dim, beside the batch's 'index' and 'mask'. Sums over those that count are 'bins' and
  'moments' [3] of the diffusion term. Every random number of an image is a function of its index,
  the seed and `num_images`, of the whole evaluation: none knows of batches, devices or hosts.
  """

  def step(params, batch, num_images, seed):
    u, index, mask, valid = batch['image'], batch['index'], batch['mask'], batch.get('valid')
    num_dims, decoder = count_dims(model.image_shape, valid), model.decoder_of(params)
    conditions = data.conditions_of(batch)
    denoiser, schedule = model.denoiser(params, conditions), model.schedule(params, conditions)
    ends = end_levels(schedule)

    def draw(number):
      key = jax.random.fold_in(jax.random.key(seed), number)
      key_t, key_eps, key_recon = jax.random.split(key, 3)
      bound = variational_bound(
        denoiser,
        schedule,
        decoder,
        model.weighting,
        u,
        stratified_in_blocks(key_t, index, num_images),
        standard_normal(fold_in(key_recon, index), model.image_shape),
        standard_normal(fold_in(key_eps, index), model.image_shape),
        settings.num_timesteps,
        valid=valid,
      )
      nats = (bound.recon, bound.prior, bound.diffusion.elbo)
      terms = jnp.stack([decoder.per_dim(part, num_dims) for part in nats], axis=1)  # [B, 3]
      loss = (bound.recon + bound.prior + bound.diffusion.loss) / num_dims
      diffusion = bound.diffusion._replace(loss=terms[:, 2])
      spread = mask @ moments(diffusion, ends[0] - ends[1])
      bins = log_snr_bins(diffusion, ends, terms[:, 2], mask)
      return terms, loss, bins, spread

    terms, loss, bins, spread = jax.lax.map(draw, jnp.arange(settings.draws))
    return {
      'terms': terms,
      'loss': loss,
      'index': index,
      'mask': mask,
      'bins': jax.tree.map(lambda a: a.sum(axis=0), bins),
      'moments': spread.mean(axis=0),
      'ends': jnp.stack(ends),
    }

  return step


class BitsPerDim(NamedTuple):
  """Holds an evaluation.

  Values are in `unit`, 'bits/dim', or 'nats/dim' of densities per unit of the data. `stderr` is the
  Monte Carlo error of the value for these very images, `dof` its degrees of freedom: a single draw
  has none, and no error. `stderr_images` is the error as an estimate for the population they come
  from, None for a single image. `cv` are the coefficients of variation of the diffusion term
  (`elbo.coefficients_of_variation`).
  """

  value: float
  stderr: float | None
  dof: float
  stderr_images: float | None
  terms: dict[str, dict[str, float | None]]
  num_images: int
  # the training loss on these images, nats/dim, and its Monte Carlo error
  loss: tuple[float, float | None]
  bins: np.ndarray  # [NUM_BINS] spent per unit of log-SNR, nan where none fell
  cv: tuple[float, float]
  unit: str = 'bits/dim'
  # log_snr_max and log_snr_min of the evaluation, between which the bins are
  ends: tuple[float, float] = (math.nan, math.nan)

  @property
  def metric(self) -> str:
    """Returns the name of the value in cards and TensorBoard, `Decoder.metric`."""
    return self.unit.replace('/', '_per_')


def summarize(parts: list[dict]) -> BitsPerDim:
  """Returns the evaluation from what `make_eval_step` says of every batch, in float64.

  Draws are independent, and so are blocks of images (`times.block_of`), which have strata of their
  own. So the error is that of the blocks' totals over draws: Student's t with as many degrees of
  freedom as variances in proportion to the blocks' sizes give (Welch and Satterthwaite).
  """
  joined = {
    k: np.concatenate(
      [np.moveaxis(part[k], 1, 0) if part[k].ndim > 1 else part[k] for part in parts]
    )
    for k in ('index', 'mask', 'terms', 'loss')
  }
  kept = np.flatnonzero(joined['mask'])
  order = kept[np.argsort(joined['index'][kept])]
  num_images = len(order)
  terms, loss = (joined[k][order].astype(np.float64) for k in ('terms', 'loss'))  # [N draws (3)]
  draws = terms.shape[1]
  starts = np.arange(0, max(num_images - BLOCK, 0) + 1, BLOCK)
  sizes = np.diff([*starts, num_images])
  dof = float((draws - 1) * num_images**2 / (sizes**2).sum())

  def mean_and_error(values):  # [N draws]
    mean = float(values.mean())
    if draws == 1:
      return mean, None
    totals = np.add.reduceat(values, starts)
    return mean, float(np.sqrt(totals.var(axis=1, ddof=1).sum() / draws) / num_images)

  per_image = terms.sum(axis=2)
  value, stderr = mean_and_error(per_image)
  per_term = dict(zip(TERMS, map(mean_and_error, np.moveaxis(terms, 2, 0)), strict=True))
  bins = {k: sum(part['bins'][k].astype(np.float64) for part in parts) for k in ('spent', 'width')}
  with np.errstate(invalid='ignore'):
    bins = bins['spent'] / bins['width']
  moments = sum(part['moments'].astype(np.float64) for part in parts) / num_images
  return BitsPerDim(
    value=value,
    stderr=stderr,
    dof=dof,
    stderr_images=cards.stderr_of(per_image.mean(axis=1)),
    terms={name: {'value': v, 'stderr': e} for name, (v, e) in per_term.items()},
    num_images=num_images,
    loss=mean_and_error(loss),
    bins=bins,
    ends=(float(parts[0]['ends'][0]), float(parts[0]['ends'][1])),
    cv=coefficients_of_variation(moments),
  )


def jit_step(model: build.Model, mesh: Mesh, settings: ConfigDict) -> Callable:
  """Returns `make_eval_step`, jitted: what each image has stays on its device."""
  by_image, sums = parallel.batch_sharding(mesh), parallel.replicated(mesh)
  by_draw = parallel.batch_sharding(mesh, axis=1)
  each = dict(terms=by_draw, loss=by_draw, index=by_image, mask=by_image)
  shardings = each | dict(bins=sums, moments=sums, ends=sums)
  return parallel.jit(make_eval_step(model, settings), mesh, out_shardings=shardings)


def make_evaluator(
  model: build.Model, mesh: Mesh, settings: ConfigDict
) -> Callable[[Any, Iterable[data.Batch], int], BitsPerDim]:
  """Returns (params, batches, number of images) -> BitsPerDim; compiled once, for any parameters.

  `settings` is config.eval. If that has a schedule of its own, which lies between the end points of
  the parameters, the step is compiled once for each.
  """
  own = jit_step(model, mesh, settings)

  def evaluate(params, batches, num_images):
    parts, compiled = [], own
    if settings.schedule.name != 'schedule':
      fixed = build.other_schedule(settings.schedule, 'eval.schedule', model.schedule(params))
      compiled = jit_step(_under(model, fixed), mesh, settings)
    on_devices = parallel.prefetch(batches, lambda batch: parallel.to_devices(mesh, batch))
    launched = (compiled(params, batch, num_images, settings.seed) for batch in on_devices)
    # the next batch is under way while the last one is fetched
    for part, _ in itertools.pairwise(itertools.chain(launched, [None])):
      parts.append(parallel.on_host(part))
    return summarize(parts)._replace(unit=model.decoder.unit)

  return evaluate


def _under(model: build.Model, levels: Schedule) -> build.Model:
  """Returns the model under a fixed schedule, or along its own path with these mean levels."""

  def schedule(params, conditions=None):
    return lambda t: on_path(model.schedule(params, conditions), levels(t))

  return model._replace(schedule=schedule if model.multivariate else lambda *_: levels)


def _or_none(number: float) -> float | None:
  """Returns None for a number that could not be estimated, as a card has it: JSON has no NaN."""
  return None if math.isnan(number) else float(number)


def make_scorer(of: Study, settings: ConfigDict) -> Callable[[Any, str, int], BitsPerDim]:
  """Returns (params, their name, step) -> BitsPerDim of the split, which writes a card.

  Args:
    of: the study.
    settings: config.eval.
  """
  evaluator, unit = make_evaluator(of.model, of.mesh, settings), of.model.decoder.unit

  def score(params, name, step):
    of_host = batches(of.source, settings)
    result = evaluator(params, of_host, data.num_eval_images(of.source, settings.max_images))
    if not math.isfinite(result.value):
      raise FloatingPointError(f'step {step}: {unit} of {name} parameters is {result.value}')
    if not math.isfinite(result.loss[0]):  # a weighting of one's own, where training has not been
      raise FloatingPointError(f'step {step}: the loss of {name} parameters is {result.loss[0]}')
    path = card_path(of, settings, name, step)
    write_card(of, path, params, name, step, elbo_fields(settings, result))
    return result

  return score


def sentence(bounds: dict[str, BitsPerDim], identity: dict[str, Any]) -> str:
  """Returns '2.268 +- 0.008 bits/dim on 360 test images (ema), 2.301 +- 0.009 (raw)'.

  Args:
    bounds: by the name of the parameters, of which the last one's come first.
    identity: `Source.identity` of the split.
  """
  (name, first), *others = reversed(bounds.items())
  count, split, total = first.num_images, identity['split'], identity['num_images']
  kind = f'{split} images' if split.isidentifier() else f'images of {split}'
  which = f'{count:,} {kind}' if count == total else f'the first {count:,} of {total:,} {kind}'
  value_of = lambda bound: cards.plus_minus(bound.value, bound.stderr)
  parts = [f'{value_of(first)} {first.unit} on {which} ({name})']
  parts += [f'{value_of(bound)} ({name})' for name, bound in others]
  if count == total and 'exact_nats_per_dim' in identity:
    parts.append(f'exact: {identity["exact_nats_per_dim"]:.4f}')
  return ', '.join(parts)


def elbo_fields(settings: ConfigDict, result: BitsPerDim) -> dict[str, Any]:
  """Returns what a number card says of a variational bound; `settings` is config.eval."""
  steps, schedule = settings.num_timesteps, settings.schedule.name
  bound = f'discrete-time ELBO, T = {steps}' if steps else 'continuous-time ELBO'
  return {
    'value': result.value,
    **cards.error_fields(result.value, result.stderr, result.dof),
    'stderr_images': result.stderr_images,
    'terms': result.terms,
    'bound': bound if schedule == 'schedule' else f'{bound}, {schedule} schedule',
    'num_images': result.num_images,
    'draws_per_image': settings.draws,
    'training_loss': {'value': result.loss[0], 'stderr': result.loss[1]},
    'diffusion_cv': _or_none(result.cv[0]),
    'diffusion_cv_linear': _or_none(result.cv[1]),
    f'{result.metric}_per_log_snr': list(map(_or_none, result.bins)),
    'log_snr_max': result.ends[0],
    'log_snr_min': result.ends[1],
  }


def card_path(of: Study, settings: ConfigDict, name: str, step: int) -> pathlib.Path:
  """Returns where the card of a bound goes (`cards.path_of`).

  That is cards/<metric>_<params>_<bound>_<images>x<draws>_seed<seed>_<hash>_step<step>.json.
  """
  num_images = data.num_eval_images(of.source, settings.max_images)
  time = f'T{settings.num_timesteps}' if settings.num_timesteps else 'continuous'
  own = [] if settings.schedule.name == 'schedule' else [settings.schedule.name]
  times = f'{num_images}x{settings.draws}', f'seed{settings.seed}'
  same = ('num_timesteps', 'schedule', 'draws', 'seed')
  made_of = {k: v for k, v in settings.to_dict().items() if k in same} | {
    'num_images': num_images,
    'data': of.source.identity,
    'dtype': of.model.dtype,
  }
  metric = of.model.decoder.metric
  return cards.path_of(of.folder, (metric, name, time, *own, *times), made_of, step)
