"""Bits per dimension of a split by the probability-flow ODE: slow, so it says how far it is."""

import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build, cards, data
from vdm.build.state import named_params
from vdm.diffusion import ode
from vdm.diffusion.decoders import bits_per_dim
from vdm.diffusion.gaussian import end_points, fold_in
from vdm.errors import require
from vdm.evaluation.bound import ends_of, write_card
from vdm.system import parallel

LOG_EVERY_SECONDS = 10.0
STDERR = (
  'standard deviation over images of one estimate each (its own dequantisation draws and probes), '
  'over sqrt(num_images): an error as an estimate for the population the images come from'
)


class OdeBitsPerDim(NamedTuple):
  """An evaluation; `stderr` is what STDERR says."""

  value: float
  stderr: float | None  # None for a single image
  num_images: int
  evaluations: float  # of the network and its vector-Jacobian product: mean over images
  max_evaluations: int  # of the image that took most


def make_step(config: ConfigDict, model: build.Model) -> Callable:
  """step(params, batch, seed) -> sums over the batch's real images; see `make_evaluator`."""
  settings = config.eval.ode
  num_dims = math.prod(model.image_shape)
  solver = {k: settings[k] for k in ('importance_samples', 'rtol', 'atol')}

  def step(params, batch, seed):
    u, index, mask = batch['image'], batch['index'], batch['mask']
    key_draw, key_probe = jax.random.split(jax.random.key(seed))
    ends = end_points(model.schedule(params))
    if settings.trace == 'exact':
      probes = ode.exact_probes(len(u), model.image_shape)
    else:
      keys = fold_in(key_probe, index)
      probes = ode.PROBES[settings.probe](keys, (settings.num_probes, *model.image_shape))
    solution = ode.data_log_prob(
      model.denoiser(params, batch['label']),
      u,
      fold_in(key_draw, index),
      *ends,
      model.decoder.dequantizations[settings.dequantization],
      probes=probes,
      max_steps=settings.max_steps,
      **solver,
    )
    bits = bits_per_dim(-solution.log_prob, num_dims)
    return {
      'images': mask.sum(),
      'bits': mask @ bits,
      'bits_squared': mask @ bits**2,
      'evaluations': mask @ solution.evaluations.astype(jnp.float32),
      'max_evaluations': solution.evaluations.max(),
      'unfinished': mask @ (1.0 - solution.finished),
    }

  return step


def make_evaluator(
  config: ConfigDict, model: build.Model, mesh: Mesh
) -> Callable[[Any, Iterator[dict], int], OdeBitsPerDim]:
  """(params, batches, number of images) -> OdeBitsPerDim, data-parallel over the mesh.

  Raises:
    ValueError: a solve did not reach the end in config.eval.ode.max_steps steps.
    FloatingPointError: a likelihood is not finite.
  """
  compiled = parallel.jit(make_step(config, model), mesh, out_shardings=parallel.replicated(mesh))

  def evaluate(params, batches, num_images):
    sums, done, clock, logged = [], 0, time.monotonic(), 0.0
    for batch in parallel.prefetch(batches, lambda batch: parallel.to_devices(mesh, batch)):
      part = jax.device_get(compiled(params, batch, config.eval.seed))
      _check(config, part)  # now: not after hours
      sums.append(jax.tree.map(np.float64, part))
      done += int(part['images'])
      now = time.monotonic()
      if now - logged > LOG_EVERY_SECONDS or done == num_images:
        logged, result = now, summarize(sums)
        logging.info(
          'ode: %d of %d images, %.4f bits/dim, %.0f evaluations an image, %.0f s left',
          done,
          num_images,
          result.value,
          result.evaluations,
          (now - clock) / done * (num_images - done),
        )
    return summarize(sums)

  return evaluate


def _check(config: ConfigDict, part: dict):
  settings = config.eval.ode
  require(
    part['unfinished'] == 0,
    'config.eval.ode.max_steps',
    settings.max_steps,
    f'larger: {part["unfinished"]:.0f} images of a batch needed more steps',
    f'raise it, or raise config.eval.ode.rtol={settings.rtol} and atol={settings.atol}',
  )
  if not np.isfinite(part['bits']):
    raise FloatingPointError(f'the ODE gives {part["bits"]} bits/dim for a batch; stopped.')


def summarize(sums: list[dict]) -> OdeBitsPerDim:
  """From the sums of every batch, in float64."""
  total = {k: sum(part[k] for part in sums) for k in sums[0]}
  n = total['images']
  mean = total['bits'] / n
  variance = max(0.0, total['bits_squared'] / n - mean**2)
  return OdeBitsPerDim(
    value=float(mean),
    stderr=math.sqrt(variance / (n - 1)) if n > 1 else None,
    num_images=int(n),
    evaluations=float(total['evaluations'] / n),
    max_evaluations=int(max(part['max_evaluations'] for part in sums)),
  )


def evaluate(
  config: ConfigDict, model: build.Model, mesh: Mesh, source: data.Source, params: Any
) -> OdeBitsPerDim:
  """Scores the parameters on the split, or on its first config.eval.max_images."""
  batches = data.eval_batches(
    source,
    batch_size=config.eval.batch_size,
    max_images=config.eval.max_images,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  num_images = data.num_eval_images(source, config.eval.max_images)
  return make_evaluator(config, model, mesh)(params, batches, num_images)


def card_fields(config: ConfigDict, result: OdeBitsPerDim) -> dict[str, Any]:
  """What a number card says of such a value and of no other."""
  settings = config.eval.ode
  trace = (
    'exact trace'
    if settings.trace == 'exact'
    else f'Hutchinson trace with {settings.num_probes} {settings.probe} probe(s) an image'
  )
  return {
    'value': result.value,
    **cards.error_fields(result.value, result.stderr, result.num_images - 1),
    'stderr_is': STDERR,
    'bound': f'probability-flow ODE, {settings.dequantization} dequantisation, '
    f'{settings.importance_samples} importance sample(s), {trace}, '
    f'{type(ode.SOLVER).__name__} rtol {settings.rtol:g} atol {settings.atol:g}',
    'num_images': result.num_images,
    'mean_evaluations': result.evaluations,
    'max_evaluations': result.max_evaluations,
  }


def evaluate_ode_and_write(
  config: ConfigDict,
  model: build.Model,
  mesh: Mesh,
  source: data.Source,
  train_state: Any,
  workdir: pathlib.Path,
) -> OdeBitsPerDim:
  """Scores config.eval.ode.params by the ODE and writes its card (`cards.path_of`): cards/
  ode_bits_per_dim_<params>_<dequantisation><K>_<trace>_<images>_seed<seed>_<hash>_step<step>.json.
  """
  settings, step = config.eval.ode, int(train_state.step)
  params = named_params(train_state, settings.params)
  result = evaluate(config, model, mesh, source, params)
  parts = (
    'ode_bits_per_dim',
    settings.params,
    f'{settings.dequantization}{settings.importance_samples}',
    settings.trace,
    result.num_images,
    f'seed{config.eval.seed}',
  )
  made_of = settings.to_dict() | {
    'seed': config.eval.seed,
    'num_images': result.num_images,
    'data': source.identity,
    'dtype': str(build.dtype(config.model.dtype)),
  }
  path = cards.path_of(workdir, parts, made_of, step)
  fields = card_fields(config, result)
  write_card(path, config, source.identity, settings.params, step, ends_of(model, params), fields)
  return result
