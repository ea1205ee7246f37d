"""Settles what a config leaves to the data: shapes and counts as found, statistics as measured."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vdm.configs import default
from vdm.data.load import IGNORED, ignored, load
from vdm.data.load import found as found_in
from vdm.data.source import Source
from vdm.errors import require
from vdm.system.progress import Progress

# leaves of config.data that config.data.as_found leaves to the data
FOUND = (
  'train_images',
  'eval_images',
  'image_shape',
  'num_values',
  'num_classes',
  'embedding_size',
  'condition_shape',
  'masked',
)
# of these: what is said to be otherwise in the data; sizes in a config are another data set's
SAID = 'num_classes', 'embedding_size', 'condition_shape', 'masked'
# by the name in a batch: the leaves that hold the mean and standard deviation of each channel
STATISTICS = {
  'image': ('shift', 'scale'),
  'condition': ('condition_shift', 'condition_scale'),
  'vector': ('vector_shift', 'vector_scale'),
}
EXAMPLES_AT_ONCE = 64
STEPS_PER_STD = 32  # of float32, at least


def settle(
  data: ConfigDict, continuous: bool, known: Mapping[str, Any] | None = None
) -> ConfigDict:
  """Returns config.data with the leaves filled in that are to be found or measured.

  Args:
    data: config.data.
    continuous: whether the decoder is of real values, whose statistics are needed.
    known: config.data of the run that is read or goes on: what it has found stays. Only a part of
      the data that it does not know, another evaluation split or place, is counted.

  Raises:
    ValueError: the data are not there, are no data of this kind, or a channel is constant.
  """
  data = data.copy_and_resolve_references().unlock()
  if known is not None:
    moved = any(data[leaf] and data[leaf] != known.get(leaf) for leaf in ('name', 'path'))
    counted = data.as_found and (moved or data.eval_split != known.get('eval_split'))
    for leaf in FOUND if data.as_found else ():
      data[leaf] = known.get(leaf, data[leaf])
    for leaf in (leaf for pair in STATISTICS.values() for leaf in pair):
      data[leaf] = data[leaf] or known.get(leaf, ())
    if counted:
      data.eval_images = found_in(data).get('eval_images', data.eval_images)
    return data.lock()
  data = as_found(data).unlock()
  wanted = {
    'image': continuous,
    'condition': bool(data.condition_shape),
    'vector': data.embedding_size > 0,
  }
  missing = [name for name, asked in wanted.items() if asked and not data[STATISTICS[name][1]]]
  if missing:
    for name, (shift, scale) in measure(load(data, 'train'), missing).items():
      constant = np.flatnonzero(scale == 0)
      rule = 'given for data of which a channel is constant'
      remedy = f'channel {constant[:1]} is {shift[constant[:1]]} in float32: leave it out, or take '
      remedy += 'an offset off'
      require(name != 'image' or not len(constant), 'config.data.scale', (), rule, remedy)
      _require_room(name, shift, scale)
      leaves = STATISTICS[name]
      data[leaves[0]] = tuple(map(float, shift))
      data[leaves[1]] = tuple(float(s) if s else 1.0 for s in scale)
  return data.lock()


def as_found(data: ConfigDict) -> ConfigDict:
  """Returns config.data with what it leaves to the data to be found; nothing is measured."""
  data = data.copy_and_resolve_references().unlock()
  if data.as_found:
    made = ('condition', 'mask') if data.derive else ()  # the config says what these are
    left_out = dict(IGNORED[name] for name in ignored(data) if name not in made)
    there, usual = found_in(data), default.get_config().data
    others = [
      f'{leaf}={there[leaf]}, not {data[leaf]}'
      for leaf in SAID
      if leaf in there and leaf not in left_out
      if data[leaf] not in (there[leaf], usual[leaf])
    ]
    if others:
      logging.warning('taken from the data by config.data.as_found: %s', '; '.join(others))
    data.update(there | left_out)
  return data.lock()


def _require_room(name: str, shift: np.ndarray, scale: np.ndarray):
  """Refuses values whose mean is so far off, or whose unit so large, that float32 loses them."""
  numbers = np.finfo(np.float32)
  step = np.maximum(np.spacing(np.abs(shift).astype(np.float32)), numbers.tiny)
  coarse = np.flatnonzero((scale > 0) & (scale < STEPS_PER_STD * step))
  if len(coarse):
    channel = coarse[0]
    raise ValueError(
      f'{name} has the mean {shift[channel]:.9g} and a standard deviation of {scale[channel]:.3g} '
      f'in channel {channel}: float32 has steps of {step[channel]:.3g} there; take an offset off, '
      'or change the unit.'
    )


def measure(source: Source, names: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns the mean and standard deviation [C] of each channel over all examples of a split.

  Dimensions that a mask leaves out do not count, nor, of real values, those of a condition that lie
  where the image is to be inpainted. Each example is read once, in order.
  """
  sums: dict[str, np.ndarray] = {}
  first: dict[str, np.ndarray] = {}
  for batch in _in_order(source):
    for name in names:
      rows = np.asarray(batch[name], np.float64)
      rows = rows.reshape(-1, rows.shape[-1])
      if name == 'image' and 'valid' in batch:
        rows = rows[batch['valid'].reshape(-1)]
      elif name == 'condition' and _has_hole(source.identity):
        rows = rows[~batch['valid'].reshape(-1)]
      if name not in first:  # a pivot, so that the squares do not cancel
        first[name], sums[name] = rows.mean(axis=0), np.zeros((3, rows.shape[1]))
      off = rows - first[name]
      sums[name] += np.stack([np.full(rows.shape[1], len(rows)), off.sum(0), (off**2).sum(0)])
  found = {}
  for name, (count, total, square) in sums.items():
    mean = total / count
    spread = np.sqrt(np.maximum(square / count - mean**2, 0))
    spread[spread < 1e-9 * np.abs(first[name])] = 0  # rounding of the sums
    found[name] = first[name] + mean, spread
  return found


def _has_hole(identity: Mapping[str, Any]) -> bool:
  """Returns whether conditions are real values around what is to be inpainted (`data.derive`)."""
  return identity.get('derive') == 'inpainting' and not identity['num_values']


def _in_order(source: Source) -> Iterator[Any]:
  """Yields all batches of a split, read by as many threads as it asks for; says how far it is."""
  count = len(source)
  starts, tell = range(0, count, EXAMPLES_AT_ONCE), Progress('measuring the data', 'examples')
  fetch = lambda start: source.fetch(np.arange(start, min(start + EXAMPLES_AT_ONCE, count)))
  ahead = max(1, source.num_threads)
  with ThreadPoolExecutor(ahead) as pool:
    for group in range(0, len(starts), ahead):
      yield from pool.map(fetch, starts[group : group + ahead])
      tell(min(count, EXAMPLES_AT_ONCE * (group + ahead)), count)
