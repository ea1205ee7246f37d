"""A data set that Hugging Face's `datasets` has saved to disk: pictures or arrays, and labels."""

import functools
import hashlib
import io
import itertools
import os
from typing import Any, NamedTuple

import numpy as np

from vdm.data import arrays, decoded
from vdm.data.columns import NAMES, PATH, Column
from vdm.data.splits import Split, hashes_of_rows
from vdm.errors import confirm
from vdm.system import files


class Table(NamedTuple):
  """Holds a data set.

  Attributes:
    path: its folder.
    rows: all splits one after another, a `datasets.Dataset`.
    named: the rows of each split, if it has any.
    digest: of what identifies it.
  """

  path: str
  rows: Any
  named: dict[str, range]
  digest: str


def load(data, split: str) -> Split:
  """Returns the examples of a split of what `save_to_disk` wrote.

  The column 'image' holds pictures (`datasets.Image`), or arrays [*spatial C]; with arrays there
  may be 'condition', 'vector' and 'mask' as in a file of arrays. 'label' holds integers, if it is
  there. The splits are those of a DatasetDict; a Dataset has none.
  """
  table = _open(data.path)
  if _has_pictures(table):
    return decoded.load(data, split, _pictures(table))
  return arrays.split_of(data, split, _arrays(table))


def found(data) -> dict[str, Any]:
  """Returns the leaves of config.data as they are found in the data set."""
  table = _open(data.path)
  if _has_pictures(table):
    return decoded.found(data, _pictures(table))
  return arrays.leaves_of(data, _arrays(table))


def _open(path):
  """Returns the data set in a folder."""
  try:
    import datasets
  except ImportError as error:
    extra = "pip install 'vdm-jax[huggingface]'"
    raise ValueError(f'{PATH}={path!r} needs the package datasets; {extra}') from error

  folder = os.fspath(files.path_of(path))
  remedy = 'give the folder that save_to_disk of the package datasets wrote'
  confirm(bool(path) and os.path.isdir(folder), PATH, path, 'is no folder', remedy)
  with files.reading(path, remedy):
    saved = datasets.load_from_disk(folder)
    parts = dict(saved) if isinstance(saved, datasets.DatasetDict) else {'': saved}
    rows = datasets.concatenate_datasets(list(parts.values()))
  ends = list(itertools.accumulate((len(part) for part in parts.values()), initial=0))
  named = {name: range(*ends[i : i + 2]) for i, name in enumerate(parts) if name}
  facts = [(name, len(part), part._fingerprint) for name, part in parts.items()]
  there = f'has no column image; it has {", ".join(rows.column_names) or "none"}'
  confirm(
    'image' in rows.column_names, PATH, path, there, "rename it: rename_column('...', 'image')"
  )
  confirm(len(rows) > 0, PATH, path, 'has no row', 'give another data set')
  return Table(path, rows, named, hashlib.sha256(repr(facts).encode()).hexdigest())


def _has_pictures(table):
  return type(table.rows.features['image']).__name__ == 'Image'


def _pictures(table):
  """Returns the encoded pictures of a data set."""
  import datasets

  images = table.rows.select_columns('image').cast_column('image', datasets.Image(decode=False))

  def picture(row):
    with files.reading(name(row), 'write it again'):
      value = images[row]['image']
      return io.BytesIO(value['bytes']) if value['bytes'] is not None else value['path']

  title = os.fspath(files.path_of(table.path))
  name = lambda row: f'{title}/row {row}'
  count = len(table.rows)
  labels, num_classes = _labels(table)
  return decoded.Pictures(
    title=title,
    full_name=f'huggingface/{os.path.basename(title)}/{table.digest[:8]}',
    stamp=table.digest,
    count=count,
    name=name,
    open=picture,
    labels=labels,
    num_classes=num_classes,
    hashes=lambda: hashes_of_rows(count),
    named=table.named,
  )


def _labels(table):
  """Returns the labels, int32 [count], and how many classes there are; zeros if there are none."""
  nothing = np.zeros(len(table.rows), np.int32), 0
  if 'label' not in table.rows.column_names:
    return nothing
  feature = table.rows.features['label']
  kind = str(getattr(feature, 'dtype', 'none'))
  if not kind.startswith(('int', 'uint')):
    more = "class_encode_column('label') makes classes of them"
    decoded.tell(f'{table.path}: labels of {kind} are ignored; {more}.')
    return nothing
  with files.reading(table.path):
    labels = np.asarray(table.rows.select_columns('label').with_format('numpy')[:]['label'])
  bad = np.flatnonzero(~((labels >= 0) & (labels < 2**31)))  # a missing one is read as NaN
  if bad.size:
    decoded.tell(f'{table.path}: labels are ignored; example {bad[0]} has {labels[bad[0]]}.')
    return nothing
  labels = labels.astype(np.int32)
  return labels, getattr(feature, 'num_classes', None) or int(labels.max()) + 1


# --- arrays


def _arrays(table):
  names = table.rows.column_names
  columns = {name: _column(table, name) for name in NAMES if name in names and name != 'x'}
  columns = {'x': _column(table, 'image'), **columns}
  return arrays.arrays_of(table.path, columns, names, table.named)


def _column(table, name):
  """Returns a column of the table as rows of an array."""
  feature = table.rows.features[name]
  while hasattr(feature, 'feature'):  # lists of lists
    feature = feature.feature
  dtype = np.dtype(object)
  with files.reading(table.path):
    rows = table.rows.select_columns(name).with_format('numpy')
    first = np.asarray(rows[0][name])
  if first.dtype.kind in 'biuf':
    dtype = np.dtype('bool' if feature.dtype == 'bool' else feature.dtype)
  shape = (len(rows), *first.shape)

  def read(numbers):
    with files.reading(table.path):
      return np.stack(list(rows[numbers][name])).astype(dtype)

  whole = functools.partial(read, slice(None))
  return Column(shape, dtype, read, whole, num_threads=decoded.threads())
