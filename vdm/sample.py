"""Draws images from a model; an image depends on its own number and the seed alone."""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from vdm import build, checkpoint, parallel
from vdm.gaussian import Denoiser, fold_in
from vdm.guidance import guide, label_pair, pair
from vdm.likelihood import from_grid
from vdm.samplers import num_evaluations, sample, time_grid
from vdm.state import named_params


def make_sampler(
  config: ConfigDict, model: build.Model, mesh: Mesh
) -> Callable[[Any], Iterator[np.ndarray]]:
  """params -> iterator over batches [B H W C] of integers, config.sample.num_images in all."""
  settings = config.sample
  labels, sampler, threshold = labels_of(config), build.sampler(config), build.threshold(config)
  guided, guide_params = make_guidance(config, model, mesh)

  def draw(params, guide_params, log_snrs, index, label):
    x = sample(
      fold_in(jax.random.key(settings.seed), index),
      sampler,
      threshold(guided(params, guide_params, label)),
      log_snrs,
      model.image_shape,
      settings.denoise_last,
    )
    return from_grid(x, model.num_values)  # the decoder's mode

  compiled = jax.jit(draw, out_shardings=parallel.replicated(mesh))
  sharding = parallel.batch_sharding(mesh)

  def run(params):
    grid = build.other_schedule(config, 'sample.grid', model.schedule(params))
    log_snrs = np.asarray(time_grid(grid, settings.num_steps - settings.denoise_last))
    for start in range(0, settings.num_images, settings.batch_size):
      index = start + np.arange(settings.batch_size)
      inputs = (index.astype(np.int32), labels(index))
      placed = [
        jax.make_array_from_callback(a.shape, sharding, lambda part, a=a: a[part]) for a in inputs
      ]
      images = compiled(params, guide_params, log_snrs, *placed)
      yield np.asarray(images)[: settings.num_images - start]

  return run


def make_guidance(
  config: ConfigDict, model: build.Model, mesh: Mesh
) -> tuple[Callable[[Any, Any, jax.Array], Denoiser], Any]:
  """config.sample.guidance: (params, guide's params, label) -> Denoiser, and the guide's params."""
  settings = config.sample.guidance
  limits = (settings.log_snr_min, settings.log_snr_max)
  if settings.kind == 'none':
    return lambda params, _, label: model.denoiser(params, label), None
  if settings.kind == 'classifier_free':

    def classifier_free(params, _, label):
      of = functools.partial(model.denoiser, params)
      return guide(of(label), label_pair(of, label), settings.weight, *limits)

    return classifier_free, None
  other, guide_state = checkpoint.read_guide(settings.checkpoint, mesh)
  build.check(
    (other.image_shape, other.num_values) == (model.image_shape, model.num_values),
    'sample.guidance.checkpoint',
    settings.checkpoint,
    f'a model of {model.num_values} values and images {model.image_shape}, '
    f'not {other.num_values} and {other.image_shape}',
    'name another run',
  )

  def auto(params, guide_params, label):
    own, weak = model.denoiser(params, label), other.denoiser(guide_params, label)
    # only where the guide, too, was trained
    high, low = other.schedule(guide_params)(jnp.array([0.0, 1.0]))
    low, high = jnp.maximum(low, limits[0]), jnp.minimum(high, limits[1])
    return guide(own, pair(own, weak), settings.weight, low, high)

  return auto, guide_state.ema_params


def labels_of(config: ConfigDict) -> Callable[[np.ndarray], np.ndarray]:
  """Image number -> class: config.sample.label, or each class in turn where that is -1."""
  label, classes = config.sample.label, max(1, config.data.num_classes)
  build.check(
    -1 <= label < classes,
    'sample.label',
    label,
    f'a class, 0 .. {classes - 1}, or -1',
    'use -1 for each class in turn',
  )
  return lambda index: (index % classes if label < 0 else np.full_like(index, label)).astype(
    np.int32
  )


def grid(images: np.ndarray, num_values: int, columns: int = 0) -> np.ndarray:
  """Images [N H W C] of integers as one picture uint8 [.. .. C], with a one-pixel frame."""
  columns = columns or math.ceil(math.sqrt(len(images)))
  rows = math.ceil(len(images) / columns)
  picture = np.zeros((rows * columns, *images.shape[1:]), np.uint8)
  picture[: len(images)] = np.round(images * (255 / (num_values - 1)))
  picture = np.pad(picture, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
  _, h, w, c = picture.shape
  return picture.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def save_png(path: pathlib.Path, picture: np.ndarray, least_side: int = 256):
  """Writes a picture uint8 [H W C], enlarged by whole pixels where it is small."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if picture.shape[2] not in (1, 3):
    picture = picture[..., :1]
  image = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
  scale = max(1, math.ceil(least_side / min(image.size)))
  image.resize([side * scale for side in image.size], Image.NEAREST).save(path)


def run(config: ConfigDict, workdir: pathlib.Path) -> int:
  """--mode=sample: images from the newest checkpoint, as a PNG grid and as an NPZ file."""
  model, mesh, train_state = checkpoint.read_run(config, workdir)
  step, settings = int(train_state.step), config.sample
  evaluations = num_evaluations(build.sampler(config), settings.num_steps, settings.denoise_last)
  logging.info(
    '%s, %d steps, %d network evaluations an image%s',
    settings.sampler.name,
    settings.num_steps,
    evaluations,
    '' if settings.guidance.kind == 'none' else ', each twice where guidance acts',
  )
  batches = []
  for batch in make_sampler(config, model, mesh)(named_params(train_state, settings.params)):
    batches.append(batch)
    logging.info('%d of %d images', sum(map(len, batches)), settings.num_images)
  images = np.concatenate(batches)
  if jax.process_index() == 0:
    way = settings.sampler.name
    if settings.guidance.kind != 'none':
      way += f'_{settings.guidance.kind}{settings.guidance.weight:g}'
    name = f'step{step:08d}_{settings.params}_{way}_{settings.num_steps}steps_seed{settings.seed}'
    path = workdir / 'samples' / f'{name}.png'
    save_png(path, grid(images[:100], model.num_values))
    labels = labels_of(config)(np.arange(len(images)))
    np.savez_compressed(path.with_suffix('.npz'), images=images.astype(np.uint8), labels=labels)
    logging.info('wrote %s and .npz', path)
  return 0
