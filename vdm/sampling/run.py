"""--mode=sample: images of a checkpoint in shards, with a manifest and a grid of the first."""

import hashlib
import itertools
import math
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vdm import build
from vdm.build.state import named_params
from vdm.diffusion.samplers import num_evaluations
from vdm.sampling.draw import make_guidance, make_sampler
from vdm.sampling.folder import check_format, open_samples, read_shards, write_shard
from vdm.sampling.labels import drawn_classes, embeddings_of, labels_of
from vdm.sampling.picture import image_grid, save_png
from vdm.system import files
from vdm.workdir import checkpoint, config_file
from vdm.workdir.load import read_run

LOG_EVERY_SECONDS = 10.0


def run(
  config: ConfigDict,
  workdir: pathlib.Path,
  step: str = 'newest',
  out: pathlib.Path | None = None,
) -> int:
  """--mode=sample: images from a checkpoint, in shards, and the first of them as a grid.

  `step` chooses it as in `vdm.workdir.load.read_run`. Everything is in samples/<name> of `out`, the
  workdir unless it is given, with manifest.json; the grid is samples/<name>.png. A second run draws
  what is missing. The first process writes.
  """
  config, model, mesh, train_state = read_run(config, workdir, step)
  check_format(config.sample.format, config.data.image_shape[-1])
  folder = config_file.out_folder(workdir, out) / 'samples'
  settings, guidance = config.sample, make_guidance(config, model, mesh)
  params = named_params(train_state, settings.params)
  draw, labels = make_sampler(config, model, mesh, guidance), labels_of(config)
  manifest = manifest_of(
    config, int(train_state.step), checkpoint.fingerprint((params, guidance[1]))
  )
  folder /= folder_name(config, int(train_state.step))
  starts = open_samples(folder, manifest)
  logging.info(
    '%s, %d steps, %d network evaluations an image%s',
    settings.sampler.name,
    settings.num_steps,
    manifest['network_evaluations'],
    '' if settings.guidance.kind == 'none' else ', each twice where guidance acts',
  )
  batches = progress(draw(params, starts=starts), starts, settings)
  for start, images in zip(starts, batches, strict=True):
    if jax.process_index() == 0:
      of = labels(start + np.arange(len(images))) if config.model.class_conditional else None
      write_shard(folder, settings.format, start, images, model.decoder, of)
  if jax.process_index() == 0:
    few = itertools.islice(
      read_shards(folder), math.ceil(settings.preview_images / settings.batch_size)
    )
    images = np.concatenate(list(few))[: settings.preview_images]
    pixels = model.decoder.to_pixels(images) if settings.format == 'npz' else images
    save_png(folder.with_name(f'{folder.name}.png'), image_grid(pixels))
    logging.info('%s and .png have %d images', folder, settings.num_images)
  return 0


def _what_is_drawn(settings: ConfigDict) -> dict[str, Any]:
  """config.sample, but for what no image depends on."""
  return {k: v for k, v in settings.to_dict().items() if k != 'preview_images'}


def folder_name(config: ConfigDict, step: int) -> str:
  """Short, and another one for other settings: its end is a hash of step and config.sample."""
  settings = config.sample
  ending = files.short_hash({'step': step} | _what_is_drawn(settings))
  return f'step{step:08d}_{settings.params}_{settings.sampler.name}{settings.num_steps}_{ending}'


def manifest_of(config: ConfigDict, step: int, fingerprint: str) -> dict[str, Any]:
  """What the images of a folder are: config.sample, and of what."""
  settings, classes, top = config.sample, config.data.num_classes, config.data.num_values - 1
  labels = f'class {settings.label}'
  if settings.label < 0:
    drawn = drawn_classes(config)
    of_rule = {'balanced': 'image number % {}', 'uniform': 'uniform over {} classes'}
    labels = of_rule[settings.label_rule].format(len(drawn))
    if len(drawn) < classes:
      labels += f' with images, {hashlib.sha256(drawn.tobytes()).hexdigest()[:16]}'
  if config.data.embedding_size:
    rows = embeddings_of(config)(np.arange(min(settings.num_images, 100)))
    labels = f'embeddings, the first {len(rows)} {hashlib.sha256(rows.tobytes()).hexdigest()[:16]}'
  sampler = build.sampler(config.sample.sampler)
  return _what_is_drawn(settings) | {
    'step': step,
    'fingerprint': fingerprint,  # of the parameters, and of the guide's
    'labels': labels if config.model.class_conditional or config.data.embedding_size else 'none',
    'pixels': f'u in 0 .. {top}' if settings.format == 'npz' else f'round(255 u / {top})',
    'num_values': config.data.num_values,
    'image_shape': list(config.data.image_shape),
    'network_evaluations': num_evaluations(sampler, settings.num_steps, settings.denoise_last),
    'dtype': str(build.dtype(config.model.dtype)),
  }


def progress(
  batches: Iterable[np.ndarray], starts: list[int], settings: ConfigDict
) -> Iterator[np.ndarray]:
  """Passes the batches that begin at `starts` on, and logs how far they are and how fast."""
  total = settings.num_images
  left = sum(min(settings.batch_size, total - start) for start in starts)
  if left < total:
    logging.info('%d of %d images are there already', total - left, total)
  clock = logged = timed = 0.0
  for batch in batches:
    now, left = time.monotonic(), left - len(batch)
    timed += len(batch) if clock else 0
    clock = clock or now  # the first batch is not timed: it was compiled
    if now - logged > LOG_EVERY_SECONDS or not left:
      rate = timed / max(now - clock, 1e-9)
      speed = f', {rate:.3g} images/s, {left / rate:.0f} s left' if timed else ''
      logging.info('%d of %d images%s', total - left, total, speed)
      logged = now
    yield batch
