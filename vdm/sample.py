"""Draws images from a model; an image depends on its own number and the seed alone."""

import functools
import hashlib
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image

from vdm import build, checkpoint, data, files, parallel, shards
from vdm.errors import require
from vdm.gaussian import Denoiser, fold_in
from vdm.guidance import guide, label_pair, pair
from vdm.likelihood import from_grid
from vdm.samplers import num_evaluations, sample, time_grid
from vdm.state import named_params

LABEL_RULES = ('balanced', 'uniform')
LOG_EVERY_SECONDS = 10.0

# (params, guide's params, label) -> Denoiser, and the guide's params
Guidance = tuple[Callable[[Any, Any, jax.Array], Denoiser], Any]


def make_sampler(
  config: ConfigDict, model: build.Model, mesh: Mesh, guidance: Guidance | None = None
) -> Callable[..., Iterator[np.ndarray]]:
  """run(params, num_images=0, starts=None) -> iterator over batches [B H W C] of integers.

  The first `num_images` of them, 0: of config.sample.num_images, the last batch cut; where `starts`
  are given only the batches whose first image has one of these numbers. `guidance` is
  config.sample.guidance where it was made already.
  """
  settings = config.sample
  labels, sampler, threshold = labels_of(config), build.sampler(config), build.threshold(config)
  guided, guide_params = guidance or make_guidance(config, model, mesh)

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

  compiled = parallel.jit(draw, mesh, out_shardings=parallel.replicated(mesh))
  sharding = parallel.batch_sharding(mesh)

  def run(params, num_images=0, starts=None):
    num_images = num_images or settings.num_images
    grid = build.other_schedule(config, 'sample.grid', model.schedule(params))
    log_snrs = np.asarray(time_grid(grid, settings.num_steps - settings.denoise_last))

    def launch(start):
      index = start + np.arange(settings.batch_size)
      inputs = (index.astype(np.int32), labels(index))
      placed = [
        jax.make_array_from_callback(a.shape, sharding, lambda part, a=a: a[part]) for a in inputs
      ]
      return start, compiled(params, guide_params, log_snrs, *placed)

    if starts is None:
      starts = range(0, num_images, settings.batch_size)
    launched = itertools.chain(map(launch, starts), [None])
    # the next batch is under way while the caller has this one
    for (start, images), _ in itertools.pairwise(launched):
      yield np.asarray(images)[: num_images - start]

  return run


def make_guidance(config: ConfigDict, model: build.Model, mesh: Mesh) -> Guidance:
  """config.sample.guidance."""
  settings = config.sample.guidance
  limits = (settings.log_snr_min, settings.log_snr_max)
  if settings.kind == 'none':
    return lambda params, _, label: model.denoiser(params, label), None
  if settings.kind == 'classifier_free':

    def classifier_free(params, _, label):
      of = functools.partial(model.denoiser, params)
      return guide(of(label), label_pair(of, label), settings.weight, *limits)

    return classifier_free, None
  other, guide_state = checkpoint.read_guide(config, model, mesh)
  high, low = map(float, other.schedule(guide_state.ema_params)(jnp.array([0.0, 1.0])))
  low, high = max(low, limits[0]), min(high, limits[1])  # only where the guide, too, was trained
  own = config.schedule.log_snr_min, config.schedule.log_snr_max
  require(
    max(low, own[0]) < min(high, own[1]),
    'config.sample.guidance.checkpoint',
    settings.checkpoint,
    f"trained where the model is, at log-SNR {own[0]:g} to {own[1]:g} and within guidance's "
    f'limits: the two overlap nowhere, {low:g} to {high:g}',
    'name another run, or other limits',
  )

  def auto(params, guide_params, label):
    own, weak = model.denoiser(params, label), other.denoiser(guide_params, label)
    return guide(own, pair(own, weak), settings.weight, low, high)

  return auto, guide_state.ema_params


def labels_of(config: ConfigDict) -> Callable[[np.ndarray], np.ndarray]:
  """Image number -> class: config.sample.label; where that is -1, by config.sample.label_rule.

  'balanced' takes each class in turn, 'uniform' draws one from the image's own key; of a
  class-conditional model's, only those of which the training split has images. For a model of
  embeddings: image number -> row of config.sample.embeddings, in turn.
  """
  if config.data.embedding_size:
    return embeddings_of(config)
  settings, classes = config.sample, max(1, config.data.num_classes)
  label, rule = settings.label, settings.label_rule
  fact, remedy = f'a class, 0 .. {classes - 1}, or -1', 'use -1 for config.sample.label_rule'
  require(-1 <= label < classes, 'config.sample.label', label, fact, remedy)
  choices = ' or '.join(map(repr, LABEL_RULES))
  require(rule in LABEL_RULES, 'config.sample.label_rule', rule, choices, 'choose one')

  if label >= 0:
    return lambda index: np.full(len(index), label, np.int32)
  drawn = drawn_classes(config)

  def uniform(index):
    keys = fold_in(jax.random.key(settings.seed), jnp.asarray(index))
    keys = fold_in(keys, jnp.full(len(index), 2))  # `samplers.sample` splits them in two: 0 and 1
    numbers = np.asarray(jax.vmap(lambda key: jax.random.randint(key, (), 0, len(drawn)))(keys))
    return drawn[numbers].astype(np.int32)

  return uniform if rule == 'uniform' else lambda index: drawn[index % len(drawn)].astype(np.int32)


def drawn_classes(config: ConfigDict) -> np.ndarray:
  """The classes that config.sample.label_rule draws from."""
  if config.model.class_conditional:
    return _classes_with_images(FrozenConfigDict(config.data))
  return np.arange(max(1, config.data.num_classes))


@functools.lru_cache
def _classes_with_images(settings: FrozenConfigDict) -> np.ndarray:
  """Those of config.data's training split; all of them, which is said, where it is not here."""
  every = np.arange(settings.num_classes)
  try:
    source = data.load(settings, 'train')
  except ValueError as error:
    cause = str(error).partition(';')[0]  # what is to be done about it matters to training alone
    logging.info(
      'labels are drawn from all %d classes, not those with images: %s', len(every), cause
    )
    return every
  found = data.classes(source, len(every))
  if len(found) < len(every):
    missing = np.setdiff1d(every, found)
    logging.warning(
      '%d of %d classes have no images in %r and are not drawn: %s%s',
      len(missing),
      len(every),
      settings.train_split,
      ', '.join(map(str, missing[:8])),
      ', ...' if len(missing) > 8 else '',
    )
  return found


def embeddings_of(config: ConfigDict) -> Callable[[np.ndarray], np.ndarray]:
  """Image numbers [b] -> embeddings float32 [b, E]: each in turn of the file [N, E] of
  config.sample.embeddings, or of the evaluation split."""
  path, size = config.sample.embeddings, config.data.embedding_size
  if not path:
    source = data.load(config.data, 'eval')
    return lambda index: source.fetch(index % len(source))['label']
  try:
    rows = np.load(path)
  except (OSError, ValueError) as error:
    raise ValueError(
      f'config.sample.embeddings={path!r} cannot be read ({error}); name a file of np.save.'
    ) from error
  good = rows.ndim == 2 and rows.shape[1] == size and len(rows) > 0 and np.isfinite(rows).all()
  fact = f'an array [N, {size}] of finite numbers, not {rows.dtype} {list(rows.shape)}'
  require(good, 'config.sample.embeddings', path, fact, 'see config.data.embedding_size')
  return lambda index: rows[index % len(rows)].astype(np.float32)


def grid(images: np.ndarray, num_values: int, columns: int = 0) -> np.ndarray:
  """Returns images [N H W C] of integers as one picture uint8 [.. .. 1 or 3], in grey frames.

  Images of one or three channels are grey or RGB; of any others the channels stand side by side.
  """
  columns = columns or math.ceil(math.sqrt(len(images)))
  rows = math.ceil(len(images) / columns)
  cells = shards.to_uint8(images, num_values)
  if images.shape[3] not in (1, 3):
    cells = cells.transpose(0, 1, 3, 2).reshape(*images.shape[:2], -1, 1)
  cells = np.pad(cells, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
  _, h, w, c = cells.shape
  picture = np.full((rows * columns, h, w, c), 128, np.uint8)
  picture[: len(images)] = cells
  return picture.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def save_png(path: pathlib.Path, picture: np.ndarray, least_side: int = 256):
  """Writes a picture uint8 [H W 1 or 3], enlarged by whole pixels where it is small."""
  image = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
  scale = max(1, math.ceil(least_side / min(image.size)))
  image = image.resize([side * scale for side in image.size], Image.NEAREST)
  files.write(path, shards.png(image))


def run(
  config: ConfigDict,
  workdir: pathlib.Path,
  step: str = 'newest',
  out: pathlib.Path | None = None,
) -> int:
  """--mode=sample: images from a checkpoint, in shards, and the first of them as a grid.

  `step` chooses it as in `checkpoint.read_run`. Everything is in samples/<name> of `out`, the
  workdir unless it is given, with manifest.json; the grid is samples/<name>.png. A second run draws
  what is missing. The first process writes.
  """
  config, model, mesh, train_state = checkpoint.read_run(config, workdir, step)
  shards.check(config.sample.format, config.data.image_shape[-1])
  folder = checkpoint.out_folder(workdir, out) / 'samples'
  settings, guidance = config.sample, make_guidance(config, model, mesh)
  params = named_params(train_state, settings.params)
  draw, labels = make_sampler(config, model, mesh, guidance), labels_of(config)
  manifest = manifest_of(
    config, int(train_state.step), checkpoint.fingerprint((params, guidance[1]))
  )
  folder /= folder_name(config, int(train_state.step))
  starts = shards.open_folder(folder, manifest)
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
      shards.write(folder, settings.format, start, images, model.num_values, of)
  if jax.process_index() == 0:
    few = itertools.islice(
      shards.read(folder), math.ceil(settings.preview_images / settings.batch_size)
    )
    images = np.concatenate(list(few))[: settings.preview_images]
    stored_values = model.num_values if settings.format == 'npz' else 256
    save_png(folder.with_name(f'{folder.name}.png'), grid(images, stored_values))
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
  sampler = build.sampler(config)
  return _what_is_drawn(settings) | {
    'step': step,
    'fingerprint': fingerprint,  # of the parameters, and of the guide's
    'labels': labels if config.model.class_conditional or config.data.embedding_size else 'none',
    'pixels': f'u in 0 .. {top}' if settings.format == 'npz' else f'round(255 u / {top})',
    'num_values': config.data.num_values,
    'image_shape': list(config.data.image_shape),
    'network_evaluations': num_evaluations(sampler, settings.num_steps, settings.denoise_last),
    'dtype': str(build.dtype(config)),
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
