"""Bits per dimension of a split by the probability-flow ODE: slow, so it says how far it is."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build, cards, data
from vdm.diffusion import ode
from vdm.diffusion.gaussian import count_dims, end_points, fold_in
from vdm.errors import require
from vdm.evaluation.likelihood import LogProb
from vdm.evaluation.study import Study, batches, write_card
from vdm.system import parallel
from vdm.system.progress import Progress

STDERR = (
  'standard deviation over images of one estimate each (its own dequantisation draws and probes), '
  'over sqrt(num_images): an error as an estimate for the population the images come from'
)
DTYPE = 'float32'  # of the network's activations, whatever config.model.dtype is


class OdeBitsPerDim(NamedTuple):
  """Holds an evaluation; `stderr` is what STDERR says."""

  value: float
  stderr: float | None  # None for a single image
  num_images: int
  evaluations: float  # of the network and its vector-Jacobian product: mean over images
  max_evaluations: int  # of the image that took most


class OdeSettings(NamedTuple):
  """Holds config.eval.ode: how the likelihood by the ODE is computed."""

  params: str
  trace: str  # 'hutchinson' or 'exact'
  probe: str  # a name in `ode.PROBES`
  num_probes: int
  dequantization: str  # a name in `Decoder.dequantizations`
  importance_samples: int
  rtol: float
  atol: float
  max_steps: int


def make_step(model: build.Model, settings: OdeSettings) -> Callable:
  """Returns step(params, batch, seed) -> what each image of the batch has, each [B].

  All is in float32, and no product is rounded on the way: an integrator takes what bfloat16 rounds
  for a field that bends, and needs more steps for a likelihood that is further off.
  """

  def step(params, batch, seed):
    u, index, mask, valid = batch['image'], batch['index'], batch['mask'], batch.get('valid')
    key_draw, key_probe = jax.random.split(jax.random.key(seed))
    conditions = data.conditions_of(batch)
    schedule = model.schedule(params, conditions)
    if settings.trace == 'exact':
      probes = ode.exact_probes(len(u), model.image_shape)
    else:
      keys = fold_in(key_probe, index)
      probes = ode.PROBES[settings.probe](keys, (settings.num_probes, *model.image_shape))
    with jax.default_matmul_precision('highest'):
      solution = ode.data_log_prob(
        model.denoiser(params, conditions, precise=True),
        u,
        fold_in(key_draw, index),
        *end_points(schedule),
        model.decoder.dequantizations[settings.dequantization],
        probes=probes,
        importance_samples=settings.importance_samples,
        rtol=settings.rtol,
        atol=settings.atol,
        max_steps=settings.max_steps,
        valid=valid,
        schedule=schedule if model.multivariate else None,
      )
    num_dims = count_dims(model.image_shape, valid)
    return {
      'log_prob': solution.log_prob,
      'value': model.decoder.per_dim(-solution.log_prob, num_dims),
      'evaluations': solution.evaluations,
      'finished': solution.finished,
      'mask': mask,
    }

  return step


def jit_step(model: build.Model, mesh: Mesh, settings: OdeSettings) -> Callable:
  """Returns `make_step`, jitted: what each image has stays where it is."""
  by_image = parallel.batch_sharding(mesh)
  return parallel.jit(make_step(model, settings), mesh, out_shardings=by_image)


def make_evaluator(
  model: build.Model, mesh: Mesh, settings: OdeSettings, seed: int
) -> Callable[[Any, Iterable[data.Batch], int], OdeBitsPerDim]:
  """Returns (params, batches, number of images) -> OdeBitsPerDim, data-parallel over the mesh.

  Raises:
    ValueError: a solve did not reach the end in config.eval.ode.max_steps steps.
    FloatingPointError: a likelihood is not finite.
  """
  compiled = jit_step(model, mesh, settings)

  def evaluate(params, batches, num_images):
    parts, done, tell = [], 0, Progress('ode', 'images')
    for batch in parallel.prefetch(batches, lambda batch: parallel.to_devices(mesh, batch)):
      part = _solved(compiled(params, batch, seed), settings)
      parts.append(part)
      done, so_far = done + len(part['value']), summarize(parts)
      value = f'{so_far.value:.4f} {model.decoder.unit}'
      tell(done, num_images, f'{value}, {so_far.evaluations:.0f} evaluations an image')
    return summarize(parts)

  return evaluate


def nats_of(
  step: Callable, params: Any, batches: Iterable[Any], settings: OdeSettings, draws: int, seed: int
) -> LogProb:
  """Returns estimates of log p of the images of all batches, one for each of `seeds_of`.

  Args:
    step: of `jit_step`.
    params: of the model.
    batches: on devices.
    settings: of `step`.
    draws: of each image.
    seed: of the draws.

  Raises:
    ValueError: a solve did not reach the end in config.eval.ode.max_steps steps.
    FloatingPointError: a likelihood is not finite.
  """
  seeds = seeds_of(seed, draws)
  solved = [
    [_solved(step(params, batch, s), settings)['log_prob'] for s in seeds] for batch in batches
  ]
  return LogProb(np.concatenate(list(map(np.stack, solved)), axis=1).astype(np.float64), draws)


def seeds_of(seed: int, draws: int) -> list[int]:
  """Returns a seed for each draw, the first `seed` itself; another `seed` shares none of them."""
  words = lambda number: np.random.SeedSequence((seed % 2**32, number)).generate_state(1)
  return [seed, *(int(words(number)[0]) >> 1 for number in range(1, draws))]


def _solved(part: dict[str, jax.Array], settings: OdeSettings) -> dict[str, np.ndarray]:
  """Returns what the images of a batch that count have; refuses what is no likelihood now."""
  found = parallel.on_host(part)
  found = {k: v[found['mask'] > 0] for k, v in found.items()}
  _check(settings, found)
  return found


def _check(settings: OdeSettings, part: dict):
  unfinished = np.sum(~part['finished'])
  require(
    unfinished == 0,
    'config.eval.ode.max_steps',
    settings.max_steps,
    f'larger: {unfinished} images of a batch needed more steps',
    f'raise it, or raise config.eval.ode.rtol={settings.rtol} and atol={settings.atol}',
  )
  bad = part['value'][~np.isfinite(part['value'])]
  if bad.size:
    raise FloatingPointError(f'the ODE gives {bad[0]} per dimension for an image; stopped.')


def summarize(parts: list[dict[str, np.ndarray]]) -> OdeBitsPerDim:
  """Returns the evaluation from what each image of every batch has, in float64."""
  joined = (np.concatenate([part[k] for part in parts]) for k in ('value', 'evaluations'))
  values, evaluations = (values.astype(np.float64) for values in joined)
  return OdeBitsPerDim(
    value=float(values.mean()),
    stderr=cards.stderr_of(values),
    num_images=len(values),
    evaluations=float(evaluations.mean()),
    max_evaluations=int(evaluations.max()),
  )


def make_scorer(of: Study, eval_settings: ConfigDict) -> Callable[[Any, int], OdeBitsPerDim]:
  """Returns (params, step) -> OdeBitsPerDim of the split, which writes a card.

  The card is (`cards.path_of`) cards/ode_bits_per_dim_<params>_<dequantisation><K>_<trace>_<images>
  _seed<seed>_<hash>_step<step>.json.

  Args:
    of: the study.
    eval_settings: config.eval.
  """
  settings, seed = OdeSettings(**eval_settings.ode), eval_settings.seed
  evaluator = make_evaluator(of.model, of.mesh, settings, seed)

  def score(params, step):
    of_host = batches(of.source, eval_settings)
    num_images = data.num_eval_images(of.source, eval_settings.max_images)
    result = evaluator(params, of_host, num_images)
    parts = (
      f'ode_{of.model.decoder.metric}',
      settings.params,
      f'{settings.dequantization}{settings.importance_samples}',
      settings.trace,
      result.num_images,
      f'seed{seed}',
    )
    made_of = settings._asdict() | {
      'seed': seed,
      'num_images': result.num_images,
      'data': of.source.identity,
      'dtype': DTYPE,
    }
    path = cards.path_of(of.folder, parts, made_of, step)
    write_card(of, path, params, settings.params, step, card_fields(settings, result))
    return result

  return score


def title(settings: OdeSettings) -> str:
  """Returns what a number card calls a likelihood by the ODE, as its bound."""
  trace = (
    'exact trace'
    if settings.trace == 'exact'
    else f'Hutchinson trace with {settings.num_probes} {settings.probe} probe(s) an image'
  )
  return (
    f'{cards.ODE}, {settings.dequantization} dequantisation, '
    f'{settings.importance_samples} importance sample(s), {trace}, '
    f'{type(ode.SOLVER).__name__} rtol {settings.rtol:g} atol {settings.atol:g}'
  )


def card_fields(settings: OdeSettings, result: OdeBitsPerDim) -> dict[str, Any]:
  """Returns what a number card says of such a value and of no other."""
  return {
    'value': result.value,
    **cards.error_fields(result.value, result.stderr, result.num_images - 1),
    'stderr_is': STDERR,
    'stderr_over': 'images',
    'bound': title(settings),
    'dtype': DTYPE,
    'num_images': result.num_images,
    'mean_evaluations': result.evaluations,
    'max_evaluations': result.max_evaluations,
  }
