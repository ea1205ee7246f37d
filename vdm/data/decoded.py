"""Pictures as examples: decoded once, into a file that is mapped, or whenever they are read."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from vdm.data import kept, pictures
from vdm.data.splits import Split, rows_of
from vdm.errors import confirm
from vdm.system import files

VERSION = 2  # of what becomes of a picture: those that another version decoded are decoded again
IN_MEMORY = 2**30  # bytes of a mapped file that need no threads to read ahead
NAMED = 3  # pictures that are named, of each kind of those left out
SLOW = 'its pictures are decoded whenever they are read.'


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Holds encoded pictures, numbered from 0.

  Attributes:
    title: what they are called together.
    full_name: what identifies them, for number cards.
    stamp: changes if a picture does.
    count: how many there are.
    name: number -> what errors call the picture.
    open: number -> a path, or an open file.
    labels: int32 [count], zeros where there are no classes.
    num_classes: how many classes there are; 0: none.
    hashes: returns uint32 [count], as `rows_of` takes them.
    named: the splits they come with, as `rows_of` takes them.
    others: how many files were seen that are no pictures.
  """

  title: str
  full_name: str
  stamp: str
  count: int
  name: Callable[[int], str]
  open: Callable[[int], Any]
  labels: np.ndarray
  num_classes: int
  hashes: Callable[[], np.ndarray]
  named: Mapping[str, range]
  others: int = 0


def load(data, split: str, encoded: Pictures) -> Split:
  """Returns a split of pictures, without those that cannot be read.

  A split is chosen among all pictures, so that it is the same with and without the others.
  """
  require_pictures(data, encoded)
  rows = rows_of(data, split, encoded.count, encoded.hashes, encoded.named)
  shape = tuple(data.image_shape)
  read, left_out, num_threads = _images(encoded, shape, data.resize, data.cache)
  rows = _without(rows, left_out, data, split)
  labels = encoded.labels[rows] * np.int32(bool(data.num_classes))
  fetch = lambda indices: {'image': read(rows[indices]), 'label': labels[indices]}
  return Split(fetch, lambda indices: labels[indices], encoded.full_name, len(rows), num_threads)


def found(data, encoded: Pictures) -> dict[str, Any]:
  """Returns the leaves of config.data as the pictures have them."""
  if data.resize:
    _require_shape(data)
  shape = tuple(data.image_shape) if data.resize else _shape(encoded)
  left_out = _images(encoded, shape, data.resize, data.cache)[1]
  counts = {}
  for split in ('train', 'eval'):
    rows = rows_of(data, split, encoded.count, encoded.hashes, encoded.named)
    counts[f'{split}_images'] = len(_without(rows, left_out, data, split))
  return counts | {
    'image_shape': shape,
    'num_values': 256,
    'num_classes': encoded.num_classes,
    'embedding_size': 0,
    'condition_shape': (),
    'masked': False,
  }


def require_pictures(data, encoded: Pictures):
  """Refuses what config.data asks for and pictures do not have."""
  for leaf, nothing in (('embedding_size', 0), ('condition_shape', ()), ('masked', False)):
    value = data[leaf] if leaf != 'condition_shape' else tuple(data[leaf])
    fact, remedy = f'but {encoded.title} has pictures alone', f'set --config.data.{leaf}={nothing}'
    confirm(value == nothing, f'config.data.{leaf}', value, fact, remedy)
  _require_shape(data)
  field, value, classes = 'config.data.num_classes', data.num_classes, encoded.num_classes
  remedy = f'set --{field}={classes}' + (', or 0 to ignore labels' if classes else '')
  confirm(value in (0, classes), field, value, f'but {encoded.title} has {classes}', remedy)


def _require_shape(data):
  shape = tuple(data.image_shape)
  good = len(shape) == 3 and min(shape) > 0 and shape[2] in pictures.MODES
  fact, remedy = 'is no shape of pictures', 'give height, width and channels, such as 64,64,3'
  confirm(good, 'config.data.image_shape', shape, fact, remedy)


def _without(rows, left_out, data, split):
  """Returns the rows that can be read; a split that has none is refused."""
  good = ~np.isin(rows, list(left_out))
  name, fact = data[f'{split}_split'], f'has {len(rows)} pictures, none of which can be read'
  remedy = 'see the line above for the causes, and write them again'
  confirm(good.any(), f'config.data.{split}_split', name, fact, remedy)
  return rows[good]


def sorted_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Returns rows of an array, read in the order in which they lie in its file."""
  out = np.empty((len(rows), *array.shape[1:]), array.dtype)
  for place in np.argsort(rows, kind='stable'):
    out[place] = array[rows[place]]
  return out


def threads() -> int:
  """Returns how many threads read ahead: decoding holds the interpreter's lock half of the time."""
  return min(8, os.cpu_count() or 1)


# --- images of one shape


def _images(encoded, shape, resize, cache):
  """Returns a function from numbers of pictures to images, those left out, and threads.

  With `cache` all are decoded at once, into the user's cache, unless it has no room. Otherwise
  headers are read here, and a picture that turns out to be damaged stops whoever reads it.
  """
  decode = functools.partial(_decode, encoded, shape, resize)
  once = _once(encoded, shape, resize, decode) if cache else None
  if once:
    array, left_out = once
    num_threads = threads() if array.nbytes > IN_MEMORY else 0
    tell(_summary(encoded, left_out))
    return functools.partial(sorted_rows, array), left_out, num_threads

  def read(numbers):
    try:
      return np.stack([decode(int(number)) for number in numbers])
    except (files.Damaged, pictures.Unsuitable) as error:
      more = '--config.data.cache=True leaves such pictures out.'
      raise files.Damaged(f'{error} {more}') from error

  left_out = _headers(encoded)[1]
  tell(_summary(encoded, left_out))
  return read, left_out, threads()


def _once(encoded, shape, resize, decode):
  """Returns all pictures, decoded once, and those left out; None: there is no room for them."""
  settings = {'stamp': encoded.stamp, 'shape': shape, 'resize': bool(resize), 'version': VERSION}
  row = lambda number: _or_cause(encoded, number, decode)
  size, doing = encoded.count * math.prod(shape), f'decoding {encoded.title}'
  folder = files.cache_folder() / 'pictures'
  try:
    return kept.rows(folder, settings, (encoded.count, *shape), row, doing)
  except files.NoSpace:
    tell(f'{folder} lacks the {size / 1e9:,.1f} GB that {encoded.title} takes when decoded: {SLOW}')
  except OSError as error:
    tell(f'{folder} cannot be written ({error.strerror}): {SLOW}')
  return None


def _decode(encoded, shape, resize, number):
  """Returns picture `number` as uint8 of the shape."""
  name = encoded.name(number)
  image = pictures.decode(encoded.open(number), name, shape[2], upright=True)
  if resize:
    return pictures.centre_crop(image, *shape[:2])
  if image.shape != shape:
    remedy = 'set --config.data.resize=True to scale and crop pictures of any size'
    fact = f'but {name} is {image.shape}'
    raise ValueError(f'config.data.image_shape={shape} {fact}; {remedy}')
  return image


def _shape(encoded):
  """Returns the shape that all pictures have, by their headers."""
  shapes, left_out = _headers(encoded)
  if not shapes:
    tell(_summary(encoded, left_out))
  fact, remedy = 'has no picture that can be read', 'write them again'
  confirm(bool(shapes), 'config.data.path', encoded.title, fact, remedy)
  one, other = shapes[0], shapes[-1]
  one_is, other_is = (f'{encoded.name(n)} is {h} x {w}' for h, w, _, n in (one, other))
  remedy = 'set --config.data.resize=True to scale and crop them to config.data.image_shape'
  confirm(len(shapes) == 1, 'config.data.resize', False, f'but {one_is} and {other_is}', remedy)
  return tuple(one[:3])


def _headers(encoded):
  """Returns the shapes of pictures, each as [H, W, C, number], at most two; and those left out.

  C is 3 if any picture has colour. Headers that were read before are remembered.
  """
  path = files.cache_folder() / 'pictures' / f'{encoded.stamp[:16]}_headers_{VERSION}.json'
  if path.exists():
    with files.reading(path, 'remove it'):
      known = json.loads(path.read_text())
      return known['shapes'], {int(k): tuple(v) for k, v in known['left_out'].items()}

  def work(block):
    return [(n, _or_cause(encoded, n, lambda n: _header(encoded, n))) for n in block]

  seen, left_out, channels = {}, {}, 1
  for block in kept.in_blocks(work, encoded.count, f'looking at {encoded.title}'):
    for number, shape, cause in ((n, *pair) for n, pair in block):
      if cause:
        left_out[number] = cause
        continue
      channels = max(channels, shape[2])
      if shape[:2] not in seen and len(seen) < 2:
        seen[shape[:2]] = number
  shapes = [[*size, channels, number] for size, number in seen.items()]
  with contextlib.suppress(OSError):
    files.write(path, json.dumps({'shapes': shapes, 'left_out': left_out}))
  return shapes, left_out


def _header(encoded, number):
  return pictures.shape_of(encoded.open(number), encoded.name(number))


def _or_cause(encoded, number, read):
  """Returns (what `read(number)` does, None), or (None, (kind, cause)) of a picture left out."""
  try:
    return read(number), None
  except pictures.Unsuitable as error:
    return None, (error.why, '')
  except files.Damaged as error:
    cause = re.sub(r" (<_io.*>|'.*')$", '', ' '.join(str(error.__cause__).split()))
    return None, ('broken', cause)


def _summary(encoded, left_out):
  """Returns a line about the pictures, and those left out by their kinds; '' if there are none."""
  kinds: dict[str, list[str]] = {}
  for number, (kind, cause) in sorted(left_out.items()):
    name = encoded.name(number).removeprefix(f'{encoded.title}/')
    kinds.setdefault(kind, []).append(f'{name}: {cause}' if cause else name)
  parts = []
  for kind, names in kinds.items():
    more = f', and {len(names) - NAMED} more' if len(names) > NAMED else ''
    parts.append(f'{len(names)} {kind} ({", ".join(names[:NAMED])}{more})')
  if encoded.others:
    parts.append(f'{encoded.others} not named as a picture')
  good = encoded.count - len(left_out)
  return f'{encoded.title}: {good} pictures; left out: {", ".join(parts)}.' if parts else ''


@functools.lru_cache(maxsize=256)
def tell(line: str):
  """Logs a line, unless this process has done so before."""
  if line:
    logging.warning('%s', line)
