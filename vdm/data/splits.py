"""Which examples are for training and which for evaluation, of data that come without splits."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vdm.errors import confirm, require

HELD_OUT = ('test', 'eval', 'validation', 'val', 'valid')  # names of what is not 'train'
RANGE = re.compile(r'([^\[\]]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?')


class Split(NamedTuple):
  """Holds a split of a kind of data.

  Attributes:
    fetch: indices [b] -> a dictionary of arrays with a row for each of them.
    labels: indices [b] -> int32 [b], for which nothing else is read.
    full_name: what identifies the data, for errors and number cards.
    num_images: how many examples there are.
    num_threads: threads that read ahead; 0 where the examples are in memory already.
  """

  fetch: Callable[[np.ndarray], dict[str, np.ndarray]]
  labels: Callable[[np.ndarray], np.ndarray]
  full_name: str
  num_images: int
  num_threads: int


def rows_of(
  data,
  split: str,
  count: int,
  hashes: Callable[[], np.ndarray],
  named: Mapping[str, range] | None = None,
) -> np.ndarray:
  """Returns the examples of a split, as numbers below `count`, int64 [n], ascending.

  The name in config.data.train_split or eval_split may be

  - one of `named`, the splits that the data come with;
  - without those, 'train' or one of HELD_OUT: an example is held out if its hash is below
    config.data.eval_share 2**32, so that it stays where it is when others come or go;
  - '[a:b]', a range of all examples in their order, in numbers or percent as TFDS writes them:
    '[:90%]', '[1000:2000]', '[-500:]';
  - a name and a range, 'train[:90%]': that part of the named split;
  - for train_split alone '', no example: all may be evaluated.

  Args:
    data: config.data.
    split: 'train' or 'eval'.
    count: the number of all examples.
    hashes: returns uint32 [count], called only if they are needed.
    named: ranges of examples, by name.

  Raises:
    ValueError: there is no such split, it is empty, or the two splits share an example.
  """
  require(0 < data.eval_share < 1, 'config.data.eval_share', data.eval_share, 'in (0, 1)', 'try .1')
  named = named or {}
  rows = {which: _rows(data, which, count, hashes, named) for which in ('train', 'eval')}
  seen = np.zeros(count, bool)
  seen[rows['train']] = True
  shared = int(seen[rows['eval']].sum())
  fact = f'shares {shared} examples with config.data.train_split={data.train_split!r}'
  remedy = "choose splits that share none, such as '[:90%]' and '[90%:]'"
  confirm(not shared, 'config.data.eval_split', data.eval_split, fact, remedy)
  return rows[split]


def _rows(data, which, count, hashes, named):
  """Returns the examples of the split 'train' or 'eval'; an empty one is refused."""
  field, text = f'config.data.{which}_split', data[f'{which}_split']
  if which == 'train' and not text:
    return np.arange(0)
  match = RANGE.fullmatch(text)
  known = ('train', *HELD_OUT) if not named else tuple(named)
  remedy = f"choose from {', '.join(map(repr, known))}, or a range such as '[:90%]'"
  good = bool(match) and (match[1] in known or (not match[1] and '[' in text))
  confirm(good, field, text, f'is none of the splits of {data.path}', remedy)
  if not match[1]:
    rows = np.arange(count)
  elif named:
    rows = np.arange(named[match[1]].start, named[match[1]].stop)
  else:
    held_out = hashes() < data.eval_share * 2**32
    rows = np.flatnonzero(held_out if match[1] in HELD_OUT else ~held_out)
  if '[' in text:
    low, high = _place(match[2] or '0', len(rows)), _place(match[3] or '100%', len(rows))
    good = 0 <= low <= len(rows) and 0 <= high <= len(rows)
    confirm(good, field, text, f'is outside of its {len(rows)} examples', 'choose a range within')
    rows = rows[low:high]
  remedy = 'choose another split, or change config.data.eval_share'
  confirm(len(rows) > 0, field, text, f'has none of the {count} examples', remedy)
  return rows


def _place(text, count):
  """Returns the end of a range of `count` examples, from '1000', '-1000' or '90%'."""
  number = int(text.rstrip('%'))
  place = round(number * count / 100) if text.endswith('%') else number
  return place + count if text.startswith('-') else place


def hashes_of_paths(paths: Iterable[str]) -> np.ndarray:
  """Returns uint32 [n]: the sha256 of each path, modulo 2**32."""
  digests = b''.join(
    hashlib.sha256(path.encode(errors='surrogateescape')).digest()[-4:] for path in paths
  )
  return np.frombuffer(digests, '>u4').astype(np.uint32)


def hashes_of_rows(count: int) -> np.ndarray:
  """Returns uint32 [count]: the splitmix64 of each number from 0, modulo 2**32.

  It is the finaliser of Steele, Lea and Flood, Fast splittable pseudorandom number generators,
  with a step of the golden ratio: ten million take a second.
  """
  z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (z ^ (z >> np.uint64(31))).astype(np.uint32)
