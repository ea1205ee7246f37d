"""Images behind one small interface: `load` a split, then iterate over batches of it.

Two kinds: `digits` (8x8, embedded in scikit-learn, for offline runs and tests), and any image data
set of TensorFlow Datasets by name, read at random from ArrayRecord files through Grain. Nothing is
ever downloaded here, and reading imports no TensorFlow. Images are uint8 [H, W, C], labels int32 or
embeddings float32 [E].

  python -m vdm.data show --name=fashion_mnist --data_dir=DIR     # the lines for config.data
  python -m vdm.data convert --name=fashion_mnist --data_dir=DIR  # TFRecord -> ArrayRecord
"""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator

import grain
import numpy as np

Batch = dict[str, np.ndarray]

# Decoded images are kept in memory while the whole split fits: PNG is read at 4 000 images/s and
# core, memory at a hundred times that.
CACHE_BYTES = 2**30
CHECKED_IMAGES = 1024
MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # Pillow's, by the number of channels


@dataclasses.dataclass(frozen=True)
class Source:
  """A split with random access: `len(source)`, `source[i]`, `source.fetch(indices)`.

  Attributes:
    fetch: indices [b] -> {'image': uint8 [b, H, W, C], 'label': int32 [b]}; labels are 0 where
      config.data.num_classes is 0. With config.data.embedding_size E, 'label' is the embedding
      stored with each image, float32 [b, E].
    identity: what was loaded, in plain values, for number cards.
    num_threads: threads that read ahead; 0 where the images are in memory already.
    labels: indices [b] -> int32 [b], the labels alone, for which no image is decoded.
  """

  fetch: Callable[[np.ndarray], Batch]
  identity: dict
  num_threads: int = 0
  labels: Callable[[np.ndarray], np.ndarray] | None = None

  def __len__(self) -> int:
    return self.identity['num_images']

  def __getitem__(self, index) -> Batch:
    if not 0 <= index < len(self):  # also what ends `for image in source`
      raise IndexError(index)
    return {name: value[0] for name, value in self.fetch(np.array([index])).items()}


def load(data, split: str) -> Source:
  """The split of `config.data` that `split` ('train' or 'eval') names, checked against the config.

  Raises:
    ValueError: the data set, directory or split is not there, or is not what the config says.
  """
  if split not in ('train', 'eval'):
    raise ValueError(f'{split=} must be "train" or "eval"')
  load_kind = _load_digits if data.name == 'digits' else _load_tfds
  fetch, labels, full_name, num_images, num_threads = load_kind(data, split)
  if data.num_bits:
    fetch = _quantized(data, fetch)
  identity = {'name': data.name, 'full_name': full_name, 'split': data[f'{split}_split']}
  identity |= {'num_bits': data.num_bits, 'resize': data.resize}
  fetch = _checked(data, full_name, fetch)
  identity |= _check(data, split, full_name, fetch, num_images)
  return Source(fetch, identity, num_threads, labels)


def classes(source: Source, num_classes: int) -> np.ndarray:
  """Returns the classes that have images, ascending, int [C <= num_classes].

  Reads labels in random order until it has seen every class: all of them only if one has none.
  """
  seen = np.zeros(num_classes, bool)
  order = np.random.RandomState(0).permutation(len(source))
  for start in range(0, len(order), 1024):
    seen[source.labels(order[start : start + 1024])] = True
    if seen.all():
      break
  return np.flatnonzero(seen)


def num_images(data, split: str) -> int:
  """Images in the split of `config.data` that is there, whatever the config says of it."""
  if data.name == 'digits':
    return data[f'{split}_images']
  info = _builder(data.name, data.dir, 'config.data.name', 'config.data.dir').info
  return info.splits[data[f'{split}_split']].num_examples


def fingerprint(images: np.ndarray) -> str:
  """Returns 16 hexadecimal digits of sha256: equal pixels have the same, wherever they are from."""
  return hashlib.sha256(images.tobytes()).hexdigest()[:16]


def decode(file, name: str, channels: int = 0) -> np.ndarray:
  """Returns the pixels of an encoded picture, uint8 [H, W, C]; training and FID read alike.

  Args:
    file: a path, or a file opened for reading.
    name: what errors call it.
    channels: C, to which grey and colour are converted as TensorFlow does; 0: 1 for a grey picture
      and 3 for any other.

  Raises:
    ValueError: 8 bits per channel, or C channels, would not hold what the picture shows.
  """
  from PIL import Image

  with Image.open(file) as picture:
    kind = picture.mode
    if picture.format == 'PNG' and '16' in str(picture.tile[0][3]):  # Pillow would cut them off
      kind = 'I;16' if kind.startswith('I') else f'{kind};16'
    good = kind in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA')
    if good and channels not in (2, 4) and picture.has_transparency_data:
      good = picture.convert('RGBA').getchannel('A').getextrema()[0] == 255
    if not good:
      raise ValueError(
        f'{name} has pixels of kind {kind}, must be 8-bit grey or RGB without transparency; '
        'flatten it.'
      )
    mode = MODES[channels or (1 if kind in ('1', 'L', 'LA') else 3)]
    image = np.asarray(picture if picture.mode == mode else picture.convert(mode))
  return image.reshape(*image.shape[:2], -1)


def _quantized(data, fetch):
  """The highest config.data.num_bits of each pixel's 8 bits (Glow, arXiv 1807.03039: 5)."""
  bits, remedy = data.num_bits, 'give 5 for 5-bit images with config.data.num_values=32'
  _require(1 <= bits <= 8, 'config.data.num_bits', bits, 'must be from 0 (as stored) to 8', remedy)
  fact = f'must be {2**bits} with config.data.num_bits={bits}'
  _require(data.num_values == 2**bits, 'config.data.num_values', data.num_values, fact, remedy)

  def fetch_quantized(indices):
    batch = fetch(indices)
    return batch | {'image': batch['image'] >> (8 - bits)}

  return fetch_quantized


# --- batches


def train_batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  process_index: int,
  process_count: int,
) -> Iterator[Batch]:
  """Endless batches, of which batch k depends on (seed, k) alone; this host's rows of each.

  Every epoch is a fresh permutation that visits each image once; a batch may straddle two epochs.
  Host h gets rows [h b, (h + 1) b) of the global batch, b = batch_size / process_count, so that
  any number of hosts sees the same images. Starting at any step costs the same.

  Args:
    source: what `load` returned.
    batch_size: images over all hosts.
    seed: any integer; seeds are equal modulo 2**32.
    start_step: k of the first batch.
    process_index: this host.
    process_count: number of hosts.

  Returns:
    An iterator over {'image': uint8 [b, H, W, C], 'label': int32 [b], or float32 [b, E]}.
  """
  local = _local_batch_size('train', batch_size, process_count)
  count = len(source)

  # Not Grain's shuffle, which takes 35 us per index on sets as small as digits and may change with
  # its version: RandomState is frozen, hashes its two seeds, and takes 25 ms for 1.3 million.
  @functools.lru_cache(maxsize=2)
  def permutation(epoch):
    return np.random.RandomState([seed % 2**32, epoch % 2**32]).permutation(count)

  def batch(step):
    rows = step * batch_size + process_index * local + np.arange(local)
    epochs, positions = np.divmod(rows, count)
    parts = [permutation(int(e))[positions[epochs == e]] for e in np.unique(epochs)]
    return source.fetch(np.concatenate(parts))

  return _iterate(range(start_step, sys.maxsize), batch, source)


def num_eval_images(source: Source, max_images: int) -> int:
  """Returns how many images an evaluation counts: at most `max_images`; 0: the whole split."""
  return min(max_images or len(source), len(source))


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  max_images: int = 0,
  process_index: int,
  process_count: int,
) -> Iterator[Batch]:
  """The split once, in order; as many batches on every host, the last filled up with image 0.

  Args:
    source: what `load` returned.
    batch_size: images over all hosts.
    max_images: stop after this many; 0: the whole split.
    process_index: this host.
    process_count: number of hosts.

  Returns:
    An iterator over {'image', 'label', 'mask': float32 [b], 1 for an image that counts and 0 for
    filling, 'index': int32 [b], position of the image in the split}.
  """
  local = _local_batch_size('eval', batch_size, process_count)
  total = num_eval_images(source, max_images)

  def batch(step):
    rows = step * batch_size + process_index * local + np.arange(local)
    index = np.where(rows < total, rows, 0)
    return source.fetch(index) | {
      'mask': (rows < total).astype(np.float32),
      'index': index.astype(np.int32),
    }

  return _iterate(range(-(-total // batch_size)), batch, source)


def _iterate(steps, batch, source):
  # A short queue, since each element is a whole batch.
  options = grain.ReadOptions(
    num_threads=source.num_threads, prefetch_buffer_size=2 * source.num_threads
  )
  dataset = grain.MapDataset.range(steps.start, steps.stop).map(batch)
  return iter(dataset.to_iter_dataset(options))


def _local_batch_size(block, batch_size, process_count):
  low = max(1, batch_size // process_count) * process_count
  good = batch_size > 0 and batch_size % process_count == 0
  fact = f'must be positive and divisible by the {process_count} hosts'
  remedy = f'try {low} or {low + process_count}'
  _require(good, f'config.{block}.batch_size', batch_size, fact, remedy)
  return batch_size // process_count


# --- the identity guard


def _require(good, field, value, fact, remedy):
  if not good:
    raise ValueError(f'{field}={value} {fact}; {remedy}')


def _require_shape(data, full_name, found, number):
  """`found`: the shape of image `number`."""
  field, flag = 'config.data.image_shape', ','.join(map(str, found))
  remedy = f'set --{field}={flag} if all its images have that shape'
  if tuple(found[2:]) == tuple(data.image_shape[2:]):
    remedy += ', or --config.data.resize=True to scale and crop those of any size'
  good = tuple(data.image_shape) == tuple(found)
  fact = f'but {full_name} has {found} in image {number}'
  _require(good, field, tuple(data.image_shape), fact, remedy)


def _checked(data, full_name, fetch):
  """`fetch`, which refuses pixels, labels and embeddings that are not what the config says."""

  def fetch_checked(indices):
    batch = fetch(indices)
    image, label = batch['image'], batch['label']
    _require_shape(data, full_name, image.shape[1:], indices[0])
    field, value, high = 'config.data.num_values', data.num_values, int(image.max())
    number = indices[image.reshape(len(image), -1).max(axis=1).argmax()] if high >= value else 0
    fact = f'but {full_name} has values up to {high} in image {number}'
    _require(high < value, field, value, fact, f'set --{field} to at least {high + 1}')
    if data.embedding_size:
      field, value = 'config.data.embedding_size', data.embedding_size
      bad = indices[~np.isfinite(label).all(axis=1)]
      fact = f'but {full_name} has embeddings of nan or inf'
      _require(not len(bad), field, value, fact, f'correct that of image {bad[:1]}')
      return batch
    field, value = 'config.data.num_classes', data.num_classes
    bad = (label < 0) | (label >= max(value, 1))
    if bad.any():
      low, high = int(label.min()), int(label.max())
      fact = f'but {full_name} has labels {low} .. {high}, as in image {indices[bad.argmax()]}'
      more = f'set --{field} to at least {high + 1}, or 0 to ignore labels'
      _require(False, field, value, fact, more if low >= 0 else f'set --{field}=0 to ignore labels')
    return batch

  return fetch_checked


def _check(data, split, full_name, fetch, num_images):
  """Compares what was loaded with what the config says, and returns it as plain values."""
  field, value, name = (
    f'config.data.{split}_images',
    data[f'{split}_images'],
    data[f'{split}_split'],
  )
  fact = f'but {full_name} has {num_images} images in {name!r}'
  remedy = f'set --{field}={num_images} if this is the data you mean'
  _require(value == num_images, field, value, fact, remedy)
  num_checked = num_images if data.name == 'digits' else min(CHECKED_IMAGES, num_images)
  digest, low, high = '', 255, 0
  for start in range(0, num_checked, 64):
    image = fetch(np.arange(start, min(start + 64, num_checked)))['image']
    digest = digest or fingerprint(image)
    low, high = min(low, int(image.min())), max(high, int(image.max()))

  # Fewer than half of the values is another unit: bits/dim and the range of x would mean little.
  field, value = 'config.data.num_values', data.num_values
  fact = f'but {full_name} has values {low} .. {high} in its first {num_checked} images'
  remedy = f'set --{field}={high + 1}, or at most {2 * high + 1}'
  if not high:
    field, value, fact = f'config.data.{split}_split', repr(name), f'of {full_name} is black'
    remedy = 'choose a split that has its images'
  _require(2 * high + 1 >= data.num_values, field, value, fact, remedy)
  return {
    'num_images': num_images,
    'image_shape': list(data.image_shape),
    'num_values': data.num_values,
    'value_min': low,
    'value_max': high,
    'checked_images': num_checked,
    'sha256_first_64': digest,
  }


# --- digits


def _load_digits(data, split):
  from sklearn.datasets import load_digits  # seconds to import, for this data set only

  field, name = f'config.data.{split}_split', data[f'{split}_split']
  good = name in ('train', 'test')
  _require(good, field, repr(name), 'is no split of digits', "choose 'train' or 'test'")
  field, value = 'config.data.embedding_size', data.embedding_size
  _require(not value, field, value, 'but digits has no embeddings', f'set --{field}=0')
  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
  # RandomState, since its stream is frozen by numpy: the split must outlive this environment.
  random = np.random.RandomState(0)
  test = [random.permutation(np.flatnonzero(labels == digit))[:36] for digit in range(10)]
  rows = np.sort(np.concatenate(test))
  if name == 'train':
    rows = np.delete(np.arange(len(images)), rows)
  images, labels = images[rows], labels[rows].astype(np.int32) * bool(data.num_classes)
  fetch = lambda indices: {'image': images[indices], 'label': labels[indices]}
  return fetch, lambda indices: labels[indices], 'digits/sklearn', len(rows), 0


# --- TensorFlow Datasets


def _load_tfds(data, split):
  builder = _builder(data.name, data.dir, 'config.data.name', 'config.data.dir')
  info, name = builder.info, data[f'{split}_split']
  _require_features(info, data)
  try:
    records, image_of = _open(builder, name, 'config.data.name')
  except KeyError as error:
    splits = f"{', '.join(map(repr, info.splits))}, or a part such as 'train[:90%]'"
    raise ValueError(
      f'config.data.{split}_split={name!r} is no split of {info.full_name}; choose from {splits}'
    ) from error
  shape, count = tuple(data.image_shape), len(records)

  def conditions(rows):
    if data.embedding_size:
      return np.stack([row['embedding'] for row in rows]).astype(np.float32)
    return np.array([row['label'] if data.num_classes else 0 for row in rows], np.int32)

  def read(indices):
    rows = records.__getitems__(indices.tolist())
    images = [image_of(row, i) for row, i in zip(rows, indices, strict=True)]
    if data.resize:
      images = [centre_crop(image, *shape[:2]) for image in images]
    for image, number in zip(images, indices, strict=True):
      _require_shape(data, info.full_name, image.shape, number)
    return {'image': np.stack(images), 'label': conditions(rows)}

  def labels(indices):
    return conditions(records.__getitems__(indices.tolist()))

  # Decoding holds the interpreter lock about half of the time: many threads gain nothing.
  num_threads = min(8, os.cpu_count() or 1)
  if count * (math.prod(shape) + 4 * data.embedding_size) > CACHE_BYTES:
    return read, labels, info.full_name, count, num_threads

  first = read(np.array([0]))
  cache = {k: np.zeros((count, *value.shape[1:]), value.dtype) for k, value in first.items()}
  known = np.zeros(count, bool)

  def fetch(indices):
    missing = np.unique(indices[~known[indices]])
    if missing.size:
      # Threads may decode an image twice: they write the same bytes, and `known` last.
      for name, value in read(missing).items():
        cache[name][missing] = value
      known[missing] = True
    return {name: value[indices] for name, value in cache.items()}

  return fetch, labels, info.full_name, count, num_threads


def centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """The middle of an image uint8 [H, W, C], scaled to cover height x width (ADM's preprocessing).

  Halved by averaging while it is at least twice as large as needed, then bicubic: no aliasing.
  """
  from PIL import Image

  picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
  while picture.width >= 2 * width and picture.height >= 2 * height:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.BOX)
  scale = max(width / picture.width, height / picture.height)
  size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
  scaled = np.asarray(picture.resize(size, Image.BICUBIC))
  top, left = (size[1] - height) // 2, (size[0] - width) // 2
  return scaled[top : top + height, left : left + width].reshape(height, width, -1)


def _open(builder, split, field):
  """Records of a split with random access, and the function (record, number) -> its image."""
  import tensorflow_datasets as tfds

  info = builder.info
  root, name = _root_and_name(builder)
  if not _has_array_record(info):
    fact = f'is prepared in {root} as {info.file_format.value}, which has no random access'
    remedy = f'run once: python -m vdm.data convert --name={name} --data_dir={root}'
    raise ValueError(f'{field}={name!r} {fact}; {remedy}')
  # PIL here is half as fast again as TFDS's decoder, and does without advice to install OpenCV.
  encoded = isinstance(info.features['image'], tfds.features.Image)
  decoders = {'image': tfds.decode.SkipDecoding()} if encoded else None
  try:
    records = builder.as_data_source(split, decoders=decoders, file_format='array_record')
  except ValueError as error:  # what TFDS raises, depending on what is wrong with the name
    raise KeyError(split) from error
  # ArrayRecord would tell at the first read, in a thread, with no name of a field.
  there = {path.name for path in builder.data_path.iterdir()}
  needed = [os.path.basename(part.filename) for part in info.splits[split].file_instructions]
  missing = ', '.join(sorted(set(needed) - there)[:3])
  fact = f'lacks {missing} in {builder.data_path}'
  _require(not missing, field, repr(name), fact, 'copy or prepare it again')
  channels = info.features['image'].shape[-1]

  def image_of(record, number):
    if not encoded:
      return record['image']
    name = f'image {number} of {info.full_name}, {split}'
    return decode(io.BytesIO(record['image']), name, channels)

  return records, image_of


def _root_and_name(builder):
  """The data_dir, and the name under which it holds the data set."""
  parts = builder.info.full_name.split('/')
  return builder.data_path.parents[len(parts) - 1], '/'.join(parts[:-1])


def _has_array_record(info):
  return 'array_record' in {kind.value for kind in info.available_file_formats()}


def _require_features(info, data):
  import tensorflow_datasets as tfds

  features, field, value = info.features, 'config.data.name', repr(data.name)
  names = sorted(features) if isinstance(features, tfds.features.FeaturesDict) else []
  fact = f'has no feature "image" (but {", ".join(names) or "a single one"})'
  _require('image' in names, field, value, fact, 'choose a data set of images')
  dtype, shape = np.dtype(features['image'].np_dtype), features['image'].shape
  good = dtype == np.uint8 and len(shape) == 3
  fact = f'has images of {dtype} {shape}, must be uint8 [H, W, C]'
  _require(good, field, value, fact, 'choose a data set of 8-bit images')
  if data.embedding_size:
    field, value = 'config.data.embedding_size', data.embedding_size
    found = features['embedding'].shape if 'embedding' in names else 'none'
    fact = f'but {info.full_name} has no feature "embedding" of that size; found: {found}'
    size = found[0] if found != 'none' and len(found) == 1 else 0
    _require(found == (value,), field, value, fact, f'set --{field}={size}')
  if data.num_classes:
    field, value = 'config.data.num_classes', data.num_classes
    label = features['label'] if 'label' in names else None
    good = label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer)
    fact = f'but {info.full_name} has no integer feature "label"'
    _require(good, field, value, fact, f'set --{field}=0')
    found = getattr(label, 'num_classes', None) or value
    remedy = f'set --{field}={found}, or 0 to ignore labels'
    _require(found == value, field, value, f'but {info.full_name} has {found}', remedy)


def _builder(name, data_dir, name_field, dir_field):
  """The TFDS builder of what lies prepared in a directory.

  It is read from the files alone: TFDS's own `tfds.builder` fetches metadata from the network.
  """
  import tensorflow_datasets as tfds
  from etils import epath
  from tensorflow_datasets.core import read_only_builder

  chosen = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  root = epath.Path(os.path.expanduser(chosen))
  shown = root if data_dir else f"'' means {root}, which"
  flag = f'--{dir_field.lstrip("-")}'
  prepare = (
    f'download and prepare it: python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', data_dir='{root}').download_and_prepare(file_format='array_record')\""
  )
  remedy = f'set {flag} or $TFDS_DATA_DIR to the directory that holds {name}, or {prepare}'
  _require(root.exists(), dir_field, shown, 'does not exist', remedy)
  try:
    return read_only_builder.builder_from_files(name, data_dir=root)
  except (tfds.core.DatasetNotFoundError, ValueError) as error:
    infos = [path for depth in range(4) for path in root.glob('*/' * depth + 'dataset_info.json')]
    roots = {path.parent: _root_of(path) for path in infos}
    here = [path for path, of in roots.items() if of == root]
    prepared = sorted({'/'.join(path.parent.relative_to(root).parts) for path in here})
    elsewhere = sorted({str(of) for of in roots.values() if of != root})
    if elsewhere and not here:
      fact = f'is not where data sets are prepared, but {elsewhere[0]} is'
      raise ValueError(f'{dir_field}={shown} {fact}; set {flag}={elsewhere[0]}') from error
    holds = f'{root} holds {", ".join(prepared) or "no data set"}'
    known = tfds.list_builders(with_community_datasets=False)
    base = name.split('/')[0].split(':')[0]
    if base in known or any(base == other.split('/')[0] for other in prepared):
      fact = f'is not prepared ({holds})'
      remedy = f'choose one of these, or {prepare}'
    else:
      fact = f"is neither 'digits' nor a TFDS data set ({holds})"
      close = difflib.get_close_matches(base, ['digits', *prepared, *known])
      remedy = f'did you mean {" or ".join(close)}?' if close else 'check the name'
    raise ValueError(f'{name_field}={name!r} {fact}; {remedy}') from error


def _root_of(info):
  """The data_dir of the set with this dataset_info.json, which is in name/[config/]version."""
  facts = json.loads(info.read_text())
  return info.parents[3 if facts.get('configName') else 2]


# --- the command line


def convert(name: str, data_dir: str = '') -> str:
  """Writes ArrayRecord shards beside the TFRecord shards of a prepared data set.

  The serialized examples are copied as they are, in order, shard by shard: nothing is decoded. A
  shard gets its name when it is complete, and dataset_info.json is replaced last, so a conversion
  that was killed leaves the set as it was, and the next one goes on from the finished shards.

  Args:
    name: TFDS name, e.g. 'imagenet_resized/64x64'.
    data_dir: as config.data.dir.

  Returns:
    A sentence that says what was done.
  """
  from rich.progress import Progress
  from tensorflow_datasets.core import dataset_info, file_adapters

  builder = _builder(name, data_dir, '--name', '--data_dir')
  info, again = builder.info, 'copy or prepare the data set again'
  if _has_array_record(info):
    return f'{info.full_name} is in ArrayRecord already: {builder.data_path}'
  require_tensorflow(f'--name={name!r}: reading TFRecord files')
  reader = file_adapters.ADAPTER_FOR_FORMAT[info.file_format]
  writer = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.ARRAY_RECORD]
  with Progress() as progress:
    for split in info.splits.values():
      task = progress.add_task(split.name, total=split.num_examples)
      sources = split.filename_template.sharded_filepaths(split.num_shards)
      template = split.filename_template.replace(filetype_suffix='array_record')
      targets = template.sharded_filepaths(split.num_shards)
      for source, target, length in zip(sources, targets, split.shard_lengths, strict=True):
        if target.exists():
          progress.advance(task, length)
          continue
        _require(source.exists(), '--name', name, f'lacks {source}', again)
        incomplete = target.parent / f'incomplete.{target.name}'
        examples = reader.make_tf_data(source).as_numpy_iterator()
        writer.write_examples(incomplete, progress.track(enumerate(examples), task_id=task))
        count = writer.num_examples(incomplete)
        if count != length:
          incomplete.unlink()
        fact = f'has {count} examples in {source}, but dataset_info.json says {length}'
        _require(count == length, '--name', name, fact, again)
        incomplete.replace(target)
  info.add_alternative_file_format('array_record')
  path = dataset_info.dataset_info_path(builder.data_path)
  incomplete = path.parent / f'incomplete.{path.name}'
  incomplete.write_text(dataset_info.get_dataset_info_json(info.as_proto))
  incomplete.replace(path)
  return f'{info.full_name} is in ArrayRecord now, beside the old files: {builder.data_path}'


def show(name: str, data_dir: str = '') -> str:
  """The lines of config.data for a prepared data set; the choice of splits is a guess.

  Raises ValueError if the data set is not one that `load` takes.
  """
  from vdm.configs import default

  builder = _builder(name, data_dir, '--name', '--data_dir')
  info = builder.info
  counts = {split: part.num_examples for split, part in info.splits.items()}
  train = 'train' if 'train' in counts else next(iter(counts))
  evaluate = next((split for split in ('test', 'validation') if split in counts), train)
  config = default.get_config().data.unlock()
  config.update(name=name, num_classes=0)
  _require_features(info, config)
  records, image_of = _open(builder, train, '--name')
  label = info.features['label'] if 'label' in info.features else None
  one_class = label is not None and label.shape == ()
  first = [image_of(records[i], i) for i in range(min(64, len(records)))]
  high = max(int(image.max()) for image in first)
  lines = {
    'name': name,
    'dir': data_dir,
    'train_split': train,
    'eval_split': evaluate,
    'train_images': counts[train],
    'eval_images': counts[evaluate],
    'image_shape': first[0].shape,
    'num_values': 256 if high > 127 else max(2, high + 1),
    'resize': len({image.shape for image in first}) > 1,
    'num_classes': (one_class and getattr(label, 'num_classes', None)) or 0,
  }
  config.update(lines)
  for split in ('train', 'eval'):
    load(config, split)  # what it refuses is not printed
  head = f'# {info.full_name}: {", ".join(f"{split} {n}" for split, n in counts.items())}'
  return '\n'.join([head, *(f'config.data.{field} = {value!r}' for field, value in lines.items())])


def has_tensorflow() -> bool:
  """Whether TensorFlow is installed: an extra, which most of this package does without."""
  return importlib.util.find_spec('tensorflow') is not None


def require_tensorflow(what: str):
  """Raises ValueError where TensorFlow is missing, with `what` as the subject of the sentence.

  Where it is there, it is kept from accelerators, which are JAX's.
  """
  if not has_tensorflow():
    raise ValueError(f"{what} needs TensorFlow; pip install 'vdm-jax[tensorflow]'.")
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  import tensorflow as tf

  for kind in ('GPU', 'TPU'):
    tf.config.set_visible_devices([], kind)  # before TensorFlow takes one from JAX


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m vdm.data', description='Looks at and converts prepared TFDS data sets.'
  )
  commands = parser.add_subparsers(required=True)
  for function, text in (
    (show, 'Print the lines of config.data for a data set.'),
    (convert, 'Write ArrayRecord files, which have random access, beside the TFRecord files.'),
  ):
    command = commands.add_parser(function.__name__, help=text, description=text)
    command.set_defaults(function=function)
    command.add_argument('--name', required=True, help="e.g. 'imagenet_resized/64x64'")
    command.add_argument(
      '--data_dir', default='', help='default: $TFDS_DATA_DIR, else ~/tensorflow_datasets'
    )
  args = parser.parse_args(argv)
  try:
    print(args.function(args.name, args.data_dir))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
