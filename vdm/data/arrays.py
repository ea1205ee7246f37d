"""A file of arrays: fields on one, two or three axes, with conditions, labels and masks."""

import hashlib
import os
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vdm.data.columns import NAMES, PATH, Column, open_columns
from vdm.data.decoded import tell
from vdm.data.splits import Split, hashes_of_rows, rows_of
from vdm.errors import confirm

READ_AT_ONCE = 2**26  # bytes


class Arrays(NamedTuple):
  """Holds the arrays of a file, N examples each.

  Attributes:
    path: the file.
    x: [N *spatial C], with one to three axes of space.
    condition: [N *spatial' Cc], if any; spatial' divides spatial.
    vector: [N E], if any.
    labels: int32 [N], zeros without classes.
    num_classes: the highest label and one; 0: there are no labels.
    mask: [N *spatial] or [N *spatial 1], if any.
    valid: bool [1 *spatial 1], of a mask that all examples share, if any.
    named: the splits that the examples come with, as `rows_of` takes them.
  """

  path: str
  x: Column
  condition: Column | None
  vector: Column | None
  labels: np.ndarray
  num_classes: int
  mask: Column | None
  valid: np.ndarray | None
  named: Mapping[str, range]

  @property
  def name(self) -> str:
    """Returns the file's name without its folders."""
    return os.path.basename(self.path.rstrip('/'))

  @property
  def spatial(self) -> tuple[int, ...]:
    """Returns the shape of an example without its channels."""
    return tuple(self.x.shape[1:-1])


def load(data, split: str) -> Split:
  """Returns the examples of a split of a .npz, .npy, HDF5 or zarr file.

  The file has arrays by the names of `Arrays`: x, and optionally condition, vector, label [N] and
  mask, whose zeros mark dimensions that do not count. A mask may also be one for all examples,
  [*spatial] or [*spatial 1]. An .npy file is x itself. Nothing but labels is read before it is
  asked for, and every number that is read is checked to be finite, where it counts.
  """
  return split_of(data, split, arrays_of(data.path, *open_columns(data.path)))


def found(data) -> dict[str, Any]:
  """Returns the leaves of config.data as they are found in the file."""
  return leaves_of(data, arrays_of(data.path, *open_columns(data.path)))


def split_of(data, split: str, arrays: Arrays) -> Split:
  """Returns a split of arrays that agree with config.data."""
  _require_leaves(data, arrays)
  rows = _rows(data, split, arrays)
  labels = np.zeros(len(rows), np.int32)
  if data.num_classes:
    labels = arrays.labels[rows]
    bad = np.flatnonzero(labels >= data.num_classes)
    fact = f'but {arrays.name} has label {labels[bad].max(initial=0)} in example {rows[bad][:1]}'
    remedy = f'set --config.data.num_classes={arrays.num_classes}, or 0 to ignore labels'
    confirm(not bad.size, 'config.data.num_classes', data.num_classes, fact, remedy)
  wanted = {
    'x': arrays.x,
    'condition': arrays.condition if data.condition_shape else None,
    'vector': arrays.vector if data.embedding_size else None,
    'mask': arrays.mask if data.masked else None,
  }
  used = {name: column for name, column in wanted.items() if column}
  for name, column in used.items():
    if column.chunk > 1:
      line = f'{arrays.name}: {name} is stored in chunks of {column.chunk} examples'
      tell(f'{line}: reading one decompresses them all. Chunks of one example are fastest.')

  def fetch(indices):
    numbers = rows[indices]
    batch = _image(arrays, numbers, data.masked)
    if not data.num_values:
      batch['image'] = batch['image'].astype(np.float32, copy=False)
    batch['label'] = labels[indices]
    for name in {'condition', 'vector'} & set(used):
      batch[name] = _plain(arrays.path, name, used[name].rows(numbers), numbers)
    if 'vector' in batch:
      batch['vector'] = batch['vector'].astype(np.float32, copy=False)
    return batch

  num_threads = max(column.num_threads for column in used.values())
  return Split(fetch, lambda indices: labels[indices], _full_name(arrays), len(rows), num_threads)


def leaves_of(data, arrays: Arrays) -> dict[str, Any]:
  """Returns the leaves of config.data as the arrays have them."""
  return {
    'train_images': len(_rows(data, 'train', arrays)),
    'eval_images': len(_rows(data, 'eval', arrays)),
    'image_shape': tuple(arrays.x.shape[1:]),
    'num_values': _num_values(arrays),
    'num_classes': arrays.num_classes,
    'embedding_size': arrays.vector.shape[1] if arrays.vector else 0,
    'condition_shape': tuple(arrays.condition.shape[1:]) if arrays.condition else (),
    'masked': arrays.mask is not None or arrays.valid is not None,
  }


def _rows(data, split, arrays):
  count = arrays.x.shape[0]
  return rows_of(data, split, count, lambda: hashes_of_rows(count), arrays.named)


# --- what a file must be


def arrays_of(
  path: str,
  columns: dict[str, Column],
  names: list[str],
  named: Mapping[str, range] = types.MappingProxyType({}),
) -> Arrays:
  """Returns arrays once their shapes and kinds agree; `named` are splits that they come with.

  Raises:
    ValueError: they do not agree, or the labels or the mask of all cannot be read.
  """
  there = f'has no array x; it has {", ".join(names) or "none"}'
  confirm('x' in columns, PATH, path, there, 'give the examples that name')
  for name, column in columns.items():
    good = column.dtype.kind in 'biuf' or column.dtype.name == 'bfloat16'
    fact, remedy = f'has {name} of {column.dtype}', 'write integers or floats'
    confirm(good, PATH, path, fact, remedy)
  unread = [name for name in names if name not in columns]
  if unread:
    tell(f'{path}: {", ".join(unread)} not read, for arrays are called {", ".join(NAMES)}')
  x, condition, vector = columns['x'], columns.get('condition'), columns.get('vector')
  fact = f'has x of shape {x.shape}'
  remedy = 'write [examples, one to three axes of space, channels], each at least 1'
  confirm(3 <= len(x.shape) <= 5 and min(x.shape) > 0, PATH, path, fact, remedy)
  _say_axes(path, x.shape)
  labels = _labels(path, columns['label']) if 'label' in columns else np.zeros(x.shape[0], np.int32)
  mask, valid = _mask(path, x, columns.get('mask'))
  lengths = {
    name: column.shape[0] if column.shape else 0
    for name, column in columns.items()
    if name != 'mask' or mask
  }
  fact = f'has {", ".join(f"{count} rows of {name}" for name, count in lengths.items())}'
  confirm(len(set(lengths.values())) == 1, PATH, path, fact, 'write one row for each example')
  if vector:
    fact, remedy = f'has vector of shape {vector.shape}', 'write [examples, size]'
    confirm(len(vector.shape) == 2 and vector.shape[1] > 0, PATH, path, fact, remedy)
  if condition:
    fact = f'has x of shape {x.shape} and condition of shape {condition.shape}'
    remedy = 'write a condition with the axes of x, each as long or an integer part'
    good = len(condition.shape) == len(x.shape) and min(condition.shape) > 0
    axes = zip(x.shape[1:-1], condition.shape[1:-1], strict=False)
    confirm(good and all(a % b == 0 for a, b in axes), PATH, path, fact, remedy)
  num_classes = int(labels.max()) + 1 if 'label' in columns else 0
  return Arrays(path, x, condition, vector, labels, num_classes, mask, valid, named)


def _say_axes(path, shape):
  """Says how an x is read whose channels may be an axis of space."""
  *space, channels = shape[1:]
  if channels >= max(min(space), 5):
    sizes = ' x '.join(map(str, space))
    line = f'{path}: x of shape {shape} is read as examples of {sizes} with {channels} channels'
    tell(f'{line}; if they are not: add an axis of one, x[..., None], or move channels to the end')


def _labels(path, column):
  """Returns all labels, int32 [N]."""
  good = len(column.shape) == 1 and column.dtype.kind in 'biu'
  fact = f'has label of {column.dtype} and shape {column.shape}'
  confirm(good, PATH, path, fact, 'write one integer for each example')
  labels = column.whole()
  bad = np.flatnonzero((labels < 0) | (labels > 2**31 - 2))
  fact = f'has label {labels[bad[:1]]} in example {bad[:1]}'
  confirm(not bad.size, PATH, path, fact, 'number the classes from 0')
  return labels.astype(np.int32)


def _mask(path, x, column):
  """Returns (a mask for each example, None), (None, one for all), or (None, None)."""
  if column is None:
    return None, None
  spatial = tuple(x.shape[1:-1])
  if tuple(column.shape) in (spatial, (*spatial, 1)):
    whole = _plain(path, 'mask', column.whole()[None], np.zeros(1, np.int64))
    valid = (whole != 0).reshape(1, *spatial, 1)
    remedy = 'mark with 1 what counts'
    confirm(bool(valid.any()), PATH, path, 'has a mask of zeros alone', remedy)
    return None, valid
  fact = f'has x of shape {x.shape} and mask of shape {column.shape}'
  remedy = 'write the axes of space, with or without those of examples and of one channel'
  confirm(tuple(column.shape[1:]) in (spatial, (*spatial, 1)), PATH, path, fact, remedy)
  return column, None


def _require_leaves(data, arrays):
  """Refuses leaves of config.data that the file contradicts."""
  condition = tuple(arrays.condition.shape[1:]) if arrays.condition else ()
  size = arrays.vector.shape[1] if arrays.vector else 0
  masked = arrays.mask is not None or arrays.valid is not None
  for leaf, value, there, ignored in (
    ('image_shape', tuple(data.image_shape), tuple(arrays.x.shape[1:]), None),
    ('condition_shape', tuple(data.condition_shape), condition, ()),
    ('embedding_size', data.embedding_size, size, 0),
    ('masked', data.masked, masked, False),
    ('num_classes', bool(data.num_classes), arrays.num_classes > 0, False),
    ('resize', data.resize, False, None),
  ):
    flag = ','.join(map(str, there)) if isinstance(there, tuple) else there
    flag = int(flag) if leaf == 'num_classes' else flag
    shown = data.num_classes if leaf == 'num_classes' else value
    field, fact = f'config.data.{leaf}', f'but {arrays.name} has {there or "none"}'
    confirm(value in (there, ignored), field, shown, fact, f'set --{field}={flag}')
  value, floats = data.num_values, arrays.x.dtype.kind not in 'biu'
  fact = f'but x of {arrays.name} is {arrays.x.dtype}'
  remedy = 'set --config.data.num_values=0 for continuous values, or write integers'
  confirm(not (value and floats), 'config.data.num_values', value, fact, remedy)


# --- what is read


def _image(arrays, numbers, masked):
  """Returns {'image'}, and {'valid'} if it is `masked`, of examples by their numbers."""
  x, valid = arrays.x.rows(numbers), None
  if masked and arrays.valid is not None:
    valid = np.repeat(arrays.valid, len(numbers), axis=0)
  elif masked:
    marks = _plain(arrays.path, 'mask', arrays.mask.rows(numbers), numbers)
    valid = (marks != 0).reshape(-1, *arrays.spatial, 1)
    empty = numbers[~valid.reshape(len(numbers), -1).any(axis=1)]
    remedy = 'mark with 1 what counts, or leave the example out'
    fact = f'has a mask of zeros alone in example {empty[:1]}'
    confirm(not empty.size, PATH, arrays.path, fact, remedy)
  if valid is not None:
    x = np.where(valid, x, x.dtype.type(0))
  image = _plain(arrays.path, 'x', x, numbers)
  if image.dtype == np.int32 and image.min() < 0:
    bad = numbers[(image < 0).reshape(len(image), -1).any(axis=1)]
    fact = f'has {image.min()} in x of example {bad[:1]}'
    confirm(False, PATH, arrays.path, fact, 'write integers from 0, or floats')
  return {'image': image} if valid is None else {'image': image, 'valid': valid}


def _plain(path, name, values, numbers):
  """Returns values as uint8, int32 or float32; those that are not finite are refused."""
  kind = values.dtype.kind
  if kind == 'b' or values.dtype == np.uint8:
    return values.astype(np.uint8, copy=False)
  if kind in 'iu':
    good = values.dtype.itemsize < 4 or abs(int(values.max())) < 2**31 > abs(int(values.min()))
    fact = f'has {name} of 2**31 and more'
    confirm(good, PATH, path, fact, 'write smaller integers, or floats')
    return values.astype(np.int32, copy=False)
  with np.errstate(over='ignore'):
    values = values.astype(np.float32, copy=False)
  if not np.isfinite(values).all():
    bad = numbers[~np.isfinite(values).reshape(len(values), -1).all(axis=1)]
    fact = f'has nan or inf in {name} of example {bad[:1]}'
    remedy = 'correct it' + (
      ', or write a mask beside it, with config.data.masked=True' if name == 'x' else ''
    )
    confirm(False, PATH, path, fact, remedy)
  return values


def _num_values(arrays):
  """Returns how many values integers can have; 0 for floats.

  All examples are read, but of uint8 only until one has a value above 127, which tells 256.
  """
  if arrays.x.dtype.kind not in 'biu':
    return 0
  count, size = arrays.x.shape[0], int(np.prod(arrays.x.shape[1:])) * arrays.x.dtype.itemsize
  masked = arrays.mask is not None or arrays.valid is not None
  rows, high = max(1, READ_AT_ONCE // size), 0
  for start in range(0, count, rows):
    numbers = np.arange(start, min(start + rows, count))
    high = max(high, int(_image(arrays, numbers, masked)['image'].max()))
    if arrays.x.dtype == np.uint8 and high > 127:
      return 256
  return high + 1


def _full_name(arrays):
  """Returns a name that tells these arrays from others: by their kind, the first and the last."""
  ends = arrays.x.rows(np.array([0, arrays.x.shape[0] - 1])).tobytes()
  text = f'{arrays.x.shape}{arrays.x.dtype}'.encode() + ends
  return f'arrays/{arrays.name}/{hashlib.sha256(text).hexdigest()[:8]}'
