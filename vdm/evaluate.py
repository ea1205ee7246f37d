"""Bits per dimension of a whole split, each image once, with its standard error."""

import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build, cards, data, evaluate_ode, parallel
from vdm.gaussian import fold_in, standard_normal
from vdm.likelihood import bits_per_dim
from vdm.losses import DiffusionTerm, coefficients_of_variation, moments, variational_bound
from vdm.state import named_params
from vdm.times import stratified

NUM_BINS = 20
TERMS = ('recon', 'prior', 'diffusion')


def log_snr_bins(
  term: DiffusionTerm, ends: jax.Array, num_dims: int, mask: jax.Array
) -> dict[str, jax.Array]:
  """Bits/dim spent per unit of log-SNR, 1/2 |eps_hat - eps|^2 / (D ln 2), under any schedule.

  Sum over examples and number of them in NUM_BINS equal bins from ends[1] to ends[0]; the means
  times the bin width add up to the diffusion term.
  """
  position = (term.log_snr - ends[1]) / (ends[0] - ends[1])
  number = jnp.clip((position * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)
  zeros, value = jnp.zeros(NUM_BINS), bits_per_dim(term.elbo / -term.slope, num_dims)
  return {'sum': zeros.at[number].add(value * mask), 'count': zeros.at[number].add(mask)}


def make_eval_step(config: ConfigDict, model: build.Model) -> Callable:
  """step(params, batch, batch_number, seed) -> sums over the batch's real images, in bits per dim.

  'terms' [draws, 3] over images, 'loss' [draws] the training loss in nats/dim; 'image' the sum,
  and 'image_squared' the sum of squares, of each image's mean over draws; 'bins' and 'moments' [3]
  of the diffusion term.
  """
  num_dims = math.prod(model.image_shape)
  settings = config.eval

  def step(params, batch, batch_number, seed):
    u, index, mask = batch['image'].astype(jnp.int32), batch['index'], batch['mask']
    position = index % settings.batch_size  # eval batches are consecutive parts of the split
    denoiser, schedule = model.denoiser(params, batch['label']), model.schedule(params)
    ends = schedule(jnp.array([0.0, 1.0]))

    def draw(number):
      key = jax.random.fold_in(jax.random.key(seed), number)
      key_t, key_eps, key_recon = jax.random.split(key, 3)
      bound = variational_bound(
        denoiser,
        schedule,
        model.weighting,
        u,
        stratified(jax.random.fold_in(key_t, batch_number), position, settings.batch_size),
        standard_normal(fold_in(key_recon, index), model.image_shape),
        standard_normal(fold_in(key_eps, index), model.image_shape),
        model.num_values,
        settings.num_timesteps,
      )
      terms = jnp.stack([bound.recon, bound.prior, bound.diffusion.elbo], axis=1)
      terms = bits_per_dim(terms, num_dims)  # [B, 3]
      loss = (bound.recon + bound.prior + bound.diffusion.loss) / num_dims
      diffusion = bound.diffusion._replace(loss=terms[:, 2])
      spread = mask @ moments(diffusion, ends[0] - ends[1])
      bins = log_snr_bins(diffusion, ends, num_dims, mask)
      return mask @ terms, mask @ loss, terms.sum(axis=1), bins, spread

    terms, loss, image, bins, spread = jax.lax.map(draw, jnp.arange(settings.draws))
    image = image.mean(axis=0)
    return {
      'terms': terms,
      'loss': loss,
      'image': mask @ image,
      'image_squared': mask @ image**2,
      'bins': jax.tree.map(lambda a: a.sum(axis=0), bins),
      'moments': spread.mean(axis=0),
    }

  return step


class BitsPerDim(NamedTuple):
  """An evaluation. `stderr` is the Monte Carlo error of the value for these very images (nan for a
  single draw); `stderr_images` the error as an estimate for the population they come from. `cv` are
  the coefficients of variation of the diffusion term (`losses.coefficients_of_variation`)."""

  value: float
  stderr: float
  stderr_images: float
  terms: dict[str, dict[str, float]]
  num_images: int
  loss: tuple[
    float, float
  ]  # the training loss on these images, nats/dim, and its Monte Carlo error
  bins: np.ndarray  # [NUM_BINS] bits/dim per unit of log-SNR, nan where none fell
  cv: tuple[float, float]


def summarize(sums: list[dict], counts: list[int]) -> BitsPerDim:
  """From the sums of every batch, in float64.

  Batches and draws are independent, and t is stratified within a batch, so the spread of a batch's
  total over draws is what its Monte Carlo error is estimated from.
  """
  num_images = sum(counts)
  terms = np.stack([s['terms'] for s in sums]).astype(np.float64)  # [batches, draws, 3]
  draws = terms.shape[1]

  def mean_and_error(totals):  # [batches, draws]
    if draws == 1:
      return totals.sum() / num_images, math.nan
    variance = totals.var(axis=1, ddof=1) / draws
    return totals.mean(axis=1).sum() / num_images, math.sqrt(variance.sum()) / num_images

  value, stderr = mean_and_error(terms.sum(axis=2))
  loss = mean_and_error(np.stack([s['loss'] for s in sums]).astype(np.float64))
  per_term = dict(zip(TERMS, map(mean_and_error, np.moveaxis(terms, 2, 0)), strict=True))
  mean = sum(s['image'].astype(np.float64) for s in sums) / num_images
  square = sum(s['image_squared'].astype(np.float64) for s in sums) / num_images
  bins = {k: sum(s['bins'][k].astype(np.float64) for s in sums) for k in ('sum', 'count')}
  with np.errstate(invalid='ignore'):
    bins = bins['sum'] / bins['count']
  return BitsPerDim(
    value=float(value),
    stderr=float(stderr),
    stderr_images=math.sqrt(max(0.0, square - mean**2) / max(1, num_images - 1)),
    terms={k: {'value': float(v), 'stderr': float(e)} for k, (v, e) in per_term.items()},
    num_images=num_images,
    loss=tuple(map(float, loss)),
    bins=bins,
    cv=coefficients_of_variation(sum(s['moments'].astype(np.float64) for s in sums) / num_images),
  )


def make_evaluator(
  config: ConfigDict, model: build.Model, mesh: Mesh
) -> Callable[[Any, Iterable[dict]], BitsPerDim]:
  """(params, batches) -> BitsPerDim; compiled once, then used for any parameters.

  With a config.eval.schedule, which lies between the end points of the parameters, once for each.
  """

  def compile_for(model):
    return parallel.jit(
      make_eval_step(config, model), mesh, out_shardings=parallel.replicated(mesh)
    )

  own = compile_for(model)

  def evaluate(params, batches):
    sums, compiled = [], own
    if config.eval.schedule.name != 'schedule':
      fixed = build.other_schedule(config, 'eval.schedule', model.schedule(params))
      compiled = compile_for(model._replace(schedule=lambda params: fixed))
    on_devices = parallel.prefetch(batches, lambda batch: parallel.to_devices(mesh, batch))
    for number, batch in enumerate(on_devices):
      sums.append((compiled(params, batch, number, config.eval.seed), batch['mask'].sum()))
    sums, counts = zip(*jax.device_get(sums), strict=True)
    return summarize(list(sums), [int(c) for c in counts])

  return evaluate


def write_card(
  path: pathlib.Path,
  config: ConfigDict,
  identity: dict,
  params: str,
  step: int,
  ends: tuple[float, float],
  fields: dict[str, Any],
):
  """The number card of one evaluation: `fields`, which hold what is particular to its kind, and
  what every evaluation has."""
  cards.write(
    path,
    {
      'metric': 'bits_per_dim',
      **fields,
      'whole_split': fields['num_images'] == identity['num_images'],
      'eval_batch_size': config.eval.batch_size,
      'eval_seed': config.eval.seed,
      'data': identity,
      'params': params,
      'step': step,
      'images_seen': step * config.train.batch_size,
      'log_snr_max': ends[0],
      'log_snr_min': ends[1],
      'dtype': str(build.dtype(config)),
      'config': config.to_dict(),
    },
  )


def elbo_fields(config: ConfigDict, result: BitsPerDim) -> dict[str, Any]:
  """What a number card says of a variational bound."""
  steps, schedule = config.eval.num_timesteps, config.eval.schedule.name
  bound = f'discrete-time ELBO, T = {steps}' if steps else 'continuous-time ELBO'
  return {
    'value': result.value,
    'stderr': result.stderr,
    'stderr_images': result.stderr_images,
    'terms': result.terms,
    'bound': bound if schedule == 'schedule' else f'{bound}, {schedule} schedule',
    'num_images': result.num_images,
    'draws_per_image': config.eval.draws,
    'training_loss': {'value': result.loss[0], 'stderr': result.loss[1]},
    'diffusion_cv': result.cv[0],
    'diffusion_cv_linear': result.cv[1],
    'bits_per_dim_per_log_snr': [None if math.isnan(b) else float(b) for b in result.bins],
  }


def _ends(model: build.Model, params: Any) -> tuple[float, float]:
  """log_snr_max and log_snr_min."""
  return tuple(map(float, jax.device_get(model.schedule(params)(jnp.array([0.0, 1.0])))))


def evaluate_and_write(
  config: ConfigDict,
  model: build.Model,
  evaluator: Callable,
  source: data.Source,
  train_state: Any,
  workdir: pathlib.Path,
) -> dict[str, BitsPerDim]:
  """Scores config.eval.params on the split and writes a card for each:
  cards/bits_per_dim_<params>_T<T>_step<step>.json."""
  step, steps = int(train_state.step), config.eval.num_timesteps
  time = f'T{steps}' if steps else 'continuous'
  if config.eval.schedule.name != 'schedule':
    time += f'_{config.eval.schedule.name}'
  results = {}
  for name in config.eval.params.split(','):
    params = named_params(train_state, name)
    batches = data.eval_batches(
      source,
      batch_size=config.eval.batch_size,
      max_images=config.eval.max_images,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    results[name] = evaluator(params, batches)
    path = workdir / 'cards' / f'bits_per_dim_{name}_{time}_step{step:08d}.json'
    fields = elbo_fields(config, results[name])
    write_card(path, config, source.identity, name, step, _ends(model, params), fields)
  return results


def evaluate_ode_and_write(
  config: ConfigDict,
  model: build.Model,
  mesh: Mesh,
  source: data.Source,
  train_state: Any,
  workdir: pathlib.Path,
) -> evaluate_ode.OdeBitsPerDim:
  """Scores config.eval.ode.params by the ODE and writes its card:
  cards/ode_bits_per_dim_<params>_<dequantisation><K>_<trace>_step<step>.json."""
  settings, step = config.eval.ode, int(train_state.step)
  params = named_params(train_state, settings.params)
  result = evaluate_ode.evaluate(config, model, mesh, source, params)
  how = f'{settings.dequantization}{settings.importance_samples}_{settings.trace}'
  path = workdir / 'cards' / f'ode_bits_per_dim_{settings.params}_{how}_step{step:08d}.json'
  fields = evaluate_ode.card_fields(config, result)
  write_card(path, config, source.identity, settings.params, step, _ends(model, params), fields)
  return result


def say(results: dict[str, BitsPerDim], step: int):
  """Logs evaluations of the bound, a line each."""
  for name, result in results.items():
    terms = ', '.join(f'{k} {v["value"]:.4f}' for k, v in result.terms.items())
    logging.info(
      '%s parameters, step %d, %d images: %.4f +- %.4f bits/dim (%s)',
      name,
      step,
      result.num_images,
      result.value,
      result.stderr,
      terms,
    )
