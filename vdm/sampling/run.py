"""--mode=sample: images of a checkpoint in shards, with a manifest and a grid of the first."""

import hashlib
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vdm import build
from vdm.build.state import named_params
from vdm.diffusion.samplers import num_evaluations
from vdm.sampling.draw import make_draw, make_guidance
from vdm.sampling.folder import check_format, open_samples, read_shards, write_shard
from vdm.sampling.labels import Conditions, conditions_of, drawn_classes
from vdm.sampling.picture import class_grid, flat_pictures, image_grid, save_png
from vdm.system import files
from vdm.system.progress import Progress
from vdm.workdir import config_file, integrity
from vdm.workdir.load import Run


def run(of: Run, out: pathlib.Path | None = None) -> int:
  """Runs --mode=sample: writes images from a checkpoint, in shards, and the first as a grid.

  Everything is in samples/<name> of `out`, the workdir unless it is given, with manifest.json; the
  grid is samples/<name>.png. A second run draws what is missing. The first process writes.
  """
  config, model, settings = of.config, of.model, of.config.sample
  check_format(settings.format, config.data.image_shape)
  folder = config_file.out_folder(of.workdir, out) / 'samples'
  guidance = make_guidance(settings.guidance, config.schedule, model, of.mesh)
  params = named_params(of.state, settings.params)
  conditional, data_settings = config.model.class_conditional, config.data
  conditions = conditions_of(settings, data_settings, conditional)
  draw, number = make_draw(model, of.mesh, settings, conditions, guidance), int(of.state.step)
  made_of = {
    'step': number,
    'fingerprint': integrity.fingerprint((params, guidance[1])),  # of the guide's, too
    'dtype': model.dtype,
  }
  manifest = manifest_of(settings, data_settings, conditional, conditions) | made_of
  folder /= folder_name(settings, number)
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
      index = start + np.arange(len(images))
      classes = conditions(index)['label'] if conditional else None
      write_shard(folder, settings.format, start, images, model.decoder, classes)
  if jax.process_index() == 0:
    few = itertools.islice(
      read_shards(folder), math.ceil(settings.preview_images / settings.batch_size)
    )
    images = np.concatenate(list(few))[: settings.preview_images]
    pixels = model.decoder.to_pixels(images) if settings.format == 'npz' else images
    pictures, classes = flat_pictures(pixels), conditions(np.arange(len(pixels)))['label']
    picture = class_grid(pictures, classes) if conditional else image_grid(pictures)
    save_png(folder.with_name(f'{folder.name}.png'), picture)
    logging.info('%s and .png have %d images', folder, settings.num_images)
  return 0


def _what_is_drawn(settings: ConfigDict) -> dict[str, Any]:
  """Returns config.sample, but for what no image depends on."""
  return {k: v for k, v in settings.to_dict().items() if k != 'preview_images'}


def folder_name(settings: ConfigDict, step: int) -> str:
  """Returns a short name, another for other settings: its end is a hash of them and the step."""
  ending = files.short_hash({'step': step} | _what_is_drawn(settings))
  return f'step{step:08d}_{settings.params}_{settings.sampler.name}{settings.num_steps}_{ending}'


def manifest_of(
  settings: ConfigDict,
  data_settings: ConfigDict,
  class_conditional: bool,
  conditions: Conditions | None = None,
) -> dict[str, Any]:
  """Returns what the images of a folder are: config.sample, conditions, units and cost.

  Args:
    settings: config.sample.
    data_settings: config.data.
    class_conditional: whether the model reads classes.
    conditions: of the images, if others than classes.
  """
  classes, top = data_settings.num_classes, data_settings.num_values - 1
  labels = f'class {settings.label}'
  if settings.label < 0:
    drawn = drawn_classes(data_settings, class_conditional)
    of_rule = {'balanced': 'image number % {}', 'uniform': 'uniform over {} classes'}
    labels = of_rule[settings.label_rule].format(len(drawn))
    if len(drawn) < classes:
      labels += f' with images, {hashlib.sha256(drawn.tobytes()).hexdigest()[:16]}'
  count = min(settings.num_images, 100)
  given = conditions(np.arange(count)) if conditions else {}
  names = [name for name in sorted(given) if name != 'label']
  digest = hashlib.sha256(b''.join(given[name].tobytes() for name in names)).hexdigest()[:16]
  told = {'conditions': f'{", ".join(names)}, the first {count} {digest}'} if names else {}
  units = {'npz': f'u in 0 .. {top}', 'png': f'round(255 u / {top})'}
  if not data_settings.num_values:
    units = {'npz': 'u', 'png': 'mean - 3 to mean + 3 standard deviations of u'}
  sampler = build.sampler(settings.sampler)
  return _what_is_drawn(settings) | {
    'labels': labels if class_conditional else 'none',
    **told,
    'pixels': units[settings.format],
    'num_values': data_settings.num_values,
    'image_shape': list(data_settings.image_shape),
    'network_evaluations': num_evaluations(sampler, settings.num_steps, settings.denoise_last),
  }


def progress(
  batches: Iterable[np.ndarray], starts: list[int], settings: ConfigDict
) -> Iterator[np.ndarray]:
  """Passes the batches that begin at `starts` on, and logs how far they are and how fast."""
  total = settings.num_images
  left = sum(min(settings.batch_size, total - start) for start in starts)
  if left < total:
    logging.info('%d of %d images are there already', total - left, total)
  tell = Progress('', 'images')
  for batch in batches:
    left -= len(batch)
    tell(total - left, total)
    yield batch
