"""Draws batches of images; an image depends on its own number and the seed alone."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build
from vdm.diffusion.gaussian import Denoiser, end_levels, fold_in
from vdm.diffusion.guidance import conditions_pair, guide, pair
from vdm.diffusion.multivariate import on_path
from vdm.diffusion.samplers import Sampler, sample, time_grid, times
from vdm.errors import require
from vdm.sampling.labels import Conditions, conditions_of
from vdm.system import parallel
from vdm.workdir.load import read_guide

# (params, guide's params, conditions) -> Denoiser, and the guide's params
Guidance = tuple[Callable[[Any, Any, dict[str, jax.Array]], Denoiser], Any]


def make_sampler(
  config: ConfigDict, model: build.Model, mesh: Mesh, num_examples: int = 0
) -> Callable[..., Iterator[np.ndarray]]:
  """Returns `make_draw` of config.sample.

  Args:
    config: of the run.
    model: of the images.
    mesh: the devices.
    num_examples: image k has the conditions of number k modulo this many of the evaluation split,
      whatever config.sample says of conditions; 0: those of config.sample.
  """
  by_class = config.model.class_conditional
  if num_examples:
    of_example = conditions_of(config.sample, config.data, by_class, own=True)
    conditions = lambda index: of_example(index % num_examples)
  else:
    conditions = conditions_of(config.sample, config.data, by_class)
  guidance = make_guidance(config.sample.guidance, config.schedule, model, mesh)
  return make_draw(model, mesh, config.sample, conditions, guidance)


def make_draw(
  model: build.Model,
  mesh: Mesh,
  settings: ConfigDict,
  conditions: Conditions,
  guidance: Guidance | None = None,
  sampler: Sampler | None = None,
) -> Callable[..., Iterator[np.ndarray]]:
  """Returns run(params, num_images=0, starts=None) -> iterator over batches [B *spatial C] of data.

  These are the first `num_images` of them (0: of config.sample.num_images), the last batch cut; if
  `starts` are given, only the batches whose first image has one of these numbers.

  Args:
    model: of the images.
    mesh: the devices.
    settings: config.sample.
    conditions: of the images.
    guidance: none by default.
    sampler: that of the settings by default.
  """
  sampler, threshold = (
    sampler or build.sampler(settings.sampler),
    build.threshold(settings.threshold),
  )
  guided, guide_params = guidance or unguided(model)

  def path(params, told):
    """Returns levels of the grid [B] -> log_snr [B ...] of a multivariate schedule."""
    own = model.schedule(params, told)
    return own if settings.grid.name == 'schedule' else functools.partial(on_path, own)

  def draw(params, guide_params, levels, index, told):
    x = sample(
      fold_in(jax.random.key(settings.seed), index),
      sampler,
      threshold(guided(params, guide_params, told)),
      levels,
      model.image_shape,
      settings.denoise_last,
      schedule=path(params, told) if model.multivariate else None,
    )
    if 'valid' in told:  # elsewhere x is the noise it was at first
      x = jnp.where(told['valid'], x, 0)
    # the decoder's mode, of which every number has one
    return model.decoder.from_model(x), jnp.isfinite(x).all()

  compiled = parallel.jit(draw, mesh, out_shardings=parallel.replicated(mesh))
  sharding = parallel.batch_sharding(mesh)

  def run(params, num_images=0, starts=None):
    num_images = num_images or settings.num_images
    grid = build.other_schedule(settings.grid, 'sample.grid', model.schedule(params))
    steps = settings.num_steps - settings.denoise_last
    own_times = model.multivariate and settings.grid.name == 'schedule'
    levels = np.asarray(times(steps) if own_times else time_grid(grid, steps))

    def launch(start):
      index = start + np.arange(settings.batch_size)
      place = lambda a: jax.make_array_from_callback(a.shape, sharding, lambda part: a[part])
      placed = jax.tree.map(place, (index.astype(np.int32), conditions(index)))
      return start, compiled(params, guide_params, levels, *placed)

    if starts is None:
      starts = range(0, num_images, settings.batch_size)
    launched = itertools.chain(map(launch, starts), [None])
    # the next batch is under way while the caller has this one
    for (start, (images, finite)), _ in itertools.pairwise(launched):
      if not finite:
        raise FloatingPointError(
          f'samples {start} to {start + settings.batch_size - 1} are not finite; choose another '
          'checkpoint, sampler or config.sample.threshold.'
        )
      yield np.asarray(images)[: num_images - start]

  return run


def unguided(model: build.Model) -> Guidance:
  """Returns the model's own denoiser, as a guidance."""
  return lambda params, _, given: model.denoiser(params, given), None


def make_guidance(
  settings: ConfigDict, schedule: ConfigDict, model: build.Model, mesh: Mesh
) -> Guidance:
  """Returns config.sample.guidance as a function; 'auto' reads the guiding run.

  Args:
    settings: config.sample.guidance.
    schedule: config.schedule.
    model: to be guided.
    mesh: the devices.

  Raises:
    ValueError: the guiding run cannot be read, or does not fit `model`.
  """
  limits = (settings.log_snr_min, settings.log_snr_max)
  if settings.kind == 'none':
    return unguided(model)
  if settings.kind == 'classifier_free':

    def classifier_free(params, _, told):
      of = functools.partial(model.denoiser, params)
      return guide(of(told), conditions_pair(of, told), settings.weight, *limits)

    return classifier_free, None
  other, guide_state = read_guide(settings.checkpoint, model, mesh)
  high, low = map(float, end_levels(other.schedule(guide_state.averages['ema'])))
  low, high = max(low, limits[0]), min(high, limits[1])  # only where the guide, too, was trained
  least, most = schedule.log_snr_min, schedule.log_snr_max
  require(
    max(low, least) < min(high, most),
    'config.sample.guidance.checkpoint',
    settings.checkpoint,
    f"trained where the model is, at log-SNR {least:g} to {most:g} and within guidance's "
    f'limits: the two overlap nowhere, {low:g} to {high:g}',
    'name another run, or other limits',
  )

  def auto(params, guide_params, told):
    known = {name: told[name] for name in told if name in (*model.takes.names, 'valid')}
    own, weak = model.denoiser(params, known), other.denoiser(guide_params, known)
    return guide(own, pair(own, weak), settings.weight, low, high)

  return auto, guide_state.averages['ema']
