"""Image data sets of TensorFlow Datasets, read at random from ArrayRecord files through Grain."""

import difflib
import io
import math
import os

import numpy as np

from vdm.data.identity import require_shape
from vdm.data.pictures import centre_crop, decode
from vdm.errors import confirm
from vdm.system import files

# Decoded images are kept in memory while the whole split fits: PNG is read at 4 000 images/s per
# core, memory at a hundred times that.
CACHE_BYTES = 2**30
SPLITS = ('train', 'eval')


def load(data, split: str):
  """Returns what `vdm.data.load` needs of a split: fetch, labels, full name, images, threads."""
  builder = builder_of(data.name, data.dir, 'config.data.name', 'config.data.dir')
  info, name = builder.info, data[f'{split}_split']
  require_features(info, data)
  try:
    records, image_of = open_records(builder, name, 'config.data.name')
  except KeyError as error:
    splits = f"{', '.join(map(repr, info.splits))}, or a part such as 'train[:90%]'"
    raise ValueError(
      f'config.data.{split}_split={name!r} is no split of {info.full_name}; choose from {splits}'
    ) from error
  shape, count = tuple(data.image_shape), len(records)

  def labels_of(rows):
    return np.array([row['label'] if data.num_classes else 0 for row in rows], np.int32)

  def read(indices):
    rows = records.__getitems__(indices.tolist())
    images = [image_of(row, i) for row, i in zip(rows, indices, strict=True)]
    if data.resize:
      images = [centre_crop(image, *shape[:2]) for image in images]
    for image, number in zip(images, indices, strict=True):
      require_shape(data, info.full_name, image.shape, number)
    batch = {'image': np.stack(images), 'label': labels_of(rows)}
    if data.embedding_size:
      batch['vector'] = np.stack([row['embedding'] for row in rows]).astype(np.float32)
    return batch

  def labels(indices):
    return labels_of(records.__getitems__(indices.tolist()))

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


def found(data) -> dict:
  """Returns the leaves of config.data as the data have them; those that follow are as given."""
  builder = builder_of(data.name, data.dir, 'config.data.name', 'config.data.dir')
  info = builder.info
  for split in ('train', 'eval'):
    field, value = f'config.data.{split}_split', data[f'{split}_split']
    choices = ', '.join(info.splits)
    confirm(value in info.splits, field, value, f'is none of {choices}', 'choose one')
  counts = {f'{split}_images': info.splits[data[f'{split}_split']].num_examples for split in SPLITS}
  records, image_of = open_records(builder, data.train_split, 'config.data.name')
  features = info.features
  label = features['label'] if 'label' in features else None
  one_class = label is not None and label.shape == ()
  first = [image_of(records[i], i) for i in range(min(64, len(records)))]
  high = max(int(image.max()) for image in first)
  depths = [image.shape[2] for image in first]
  other = next((i for i, depth in enumerate(depths) if depth != depths[0]), 0)
  fact = f'but image 0 has channels: {depths[0]}, image {other}: {depths[other]}'
  confirm(not other, 'config.data.name', data.name, fact, 'prepare it with as many in all')
  other = next((i for i, image in enumerate(first) if image.shape[:2] != first[0].shape[:2]), 0)
  sizes = [f'image {i} is {first[i].shape[0]} x {first[i].shape[1]}' for i in (0, other)]
  remedy = 'set --config.data.resize=True to scale and crop them to config.data.image_shape'
  fact = f'but {" and ".join(sizes)}'
  confirm(data.resize or not other, 'config.data.resize', data.resize, fact, remedy)
  return counts | {
    'image_shape': tuple(data.image_shape) if data.resize else first[0].shape,
    'num_values': 256 if high > 127 else max(2, high + 1),
    'num_classes': (one_class and getattr(label, 'num_classes', None)) or 0,
    'embedding_size': features['embedding'].shape[0] if 'embedding' in features else 0,
  }


def open_records(builder, split, field):
  """Returns a split's records with random access, and a function (record, number) -> its image."""
  import tensorflow_datasets as tfds

  info = builder.info
  root, name = _root_and_name(builder)
  if not has_array_record(info):
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
  confirm(not missing, field, name, fact, 'copy or prepare it again')
  channels = info.features['image'].shape[-1]
  records = _Checked(records, f'a record of {name}, {split}, in {builder.data_path}')

  def image_of(record, number):
    if not encoded:
      return record['image']
    name = f'image {number} of {info.full_name}, {split}'
    return decode(io.BytesIO(record['image']), name, channels)

  return records, image_of


class _Checked:
  """Records whose damage is told with the name of their data set."""

  def __init__(self, records, name):
    self._records, self._name = records, name

  def __len__(self):
    return len(self._records)

  def __getitem__(self, number):
    return self.__getitems__([number])[0]

  def __getitems__(self, numbers):
    with files.reading(self._name, 'copy or prepare it again'):
      try:
        return self._records.__getitems__(numbers)
      except RuntimeError as error:  # of ArrayRecord
        raise ValueError(error) from error


def _root_and_name(builder):
  """Returns the data_dir, and the name under which it holds the data set."""
  parts = builder.info.full_name.split('/')
  return builder.data_path.parents[len(parts) - 1], '/'.join(parts[:-1])


def has_array_record(info):
  """Returns whether the prepared data set has files with random access."""
  return 'array_record' in {kind.value for kind in info.available_file_formats()}


def require_features(info, data, conditions=True):
  """Refuses a data set without 8-bit images, or without the `conditions` that the config names."""
  import tensorflow_datasets as tfds

  features, field, value = info.features, 'config.data.name', data.name
  names = sorted(features) if isinstance(features, tfds.features.FeaturesDict) else []
  fact = f'has no feature "image" (but {", ".join(names) or "a single one"})'
  confirm('image' in names, field, value, fact, 'choose a data set of images')
  dtype, shape = np.dtype(features['image'].np_dtype), features['image'].shape
  good = dtype == np.uint8 and len(shape) == 3
  fact = f'has images of {dtype} {shape}, must be uint8 [H, W, C]'
  confirm(good, field, value, fact, 'choose a data set of 8-bit images')
  if conditions and data.embedding_size:
    field, value = 'config.data.embedding_size', data.embedding_size
    found = features['embedding'].shape if 'embedding' in names else 'none'
    fact = f'but {info.full_name} has no feature "embedding" of that size; found: {found}'
    size = found[0] if found != 'none' and len(found) == 1 else 0
    confirm(found == (value,), field, value, fact, f'set --{field}={size}')
  if conditions and data.num_classes:
    field, value = 'config.data.num_classes', data.num_classes
    label = features['label'] if 'label' in names else None
    good = label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer)
    fact = f'but {info.full_name} has no integer feature "label"'
    confirm(good, field, value, fact, f'set --{field}=0')
    found = getattr(label, 'num_classes', None) or value
    remedy = f'set --{field}={found}, or 0 to ignore labels'
    confirm(found == value, field, value, f'but {info.full_name} has {found}', remedy)


def builder_of(name, data_dir, name_field, dir_field):
  """Returns the TFDS builder of what lies prepared in a directory.

  It is read from the files alone: TFDS's own `tfds.builder` fetches metadata from the network.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  chosen = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  root = files.path_of(chosen)
  missing = 'does not exist' if data_dir else f'means {root}, which does not exist'
  flag = f'--{dir_field.lstrip("-")}'
  prepare = (
    f'download and prepare it: python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', data_dir='{root}').download_and_prepare(file_format='array_record')\""
  )
  remedy = f'set {flag} or $TFDS_DATA_DIR to the directory that holds {name}, or {prepare}'
  confirm(root.exists(), dir_field, data_dir, missing, remedy)
  folder = root / name.split(':')[0]
  for info in (p for depth in range(3) for p in folder.glob('*/' * depth + 'dataset_info.json')):
    files.read_json(info, 'copy or prepare it again')
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
      raise ValueError(f'{dir_field}={data_dir!r} {fact}; set {flag}={elsewhere[0]}') from error
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
  """Returns the data_dir of the set with this dataset_info.json, in name/[config/]version."""
  return info.parents[3 if files.read_json(info).get('configName') else 2]
