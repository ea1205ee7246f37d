"""Loads a split by the kind of its data set."""

import numpy as np

from vdm.data import digits, tfds
from vdm.data.identity import checked, identify
from vdm.data.source import Source
from vdm.errors import require


def load(data, split: str) -> Source:
  """Returns the split of config.data that 'train' or 'eval' names, checked against the config.

  Raises:
    ValueError: the data set, directory or split is not there, or is not what the config says.
  """
  require(split in ('train', 'eval'), 'split', split, "'train' or 'eval'", 'choose one')

  kind = digits if data.name == 'digits' else tfds
  fetch, labels, full_name, num_images, num_threads = kind.load(data, split)
  if data.num_bits:
    fetch = _quantized(data, fetch)
  identity = {'name': data.name, 'full_name': full_name, 'split': data[f'{split}_split']}
  identity |= {'num_bits': data.num_bits, 'resize': data.resize}
  fetch = checked(data, full_name, fetch)
  identity |= identify(data, split, full_name, fetch, num_images)
  return Source(fetch, identity, num_threads, labels)


def classes(source: Source, num_classes: int) -> np.ndarray:
  """Returns the classes that have images, ascending, int [C <= num_classes].

  It reads labels in random order until it has seen every class: all of them only if one has none.
  """
  if source.labels is None:
    raise ValueError(f'source={source.identity} must be one with labels; name another.')
  seen = np.zeros(num_classes, bool)
  order = np.random.RandomState(0).permutation(len(source))
  for start in range(0, len(order), 1024):
    seen[source.labels(order[start : start + 1024])] = True
    if seen.all():
      break
  return np.flatnonzero(seen)


def num_images(data, split: str) -> int:
  """Returns how many images the split of `config.data` has, whatever the config says of it."""
  if data.name == 'digits':
    return data[f'{split}_images']
  info = tfds.builder_of(data.name, data.dir, 'config.data.name', 'config.data.dir').info
  return info.splits[data[f'{split}_split']].num_examples


def _quantized(data, fetch):
  """Returns a `fetch` of each pixel's highest num_bits of 8 (Glow, arXiv 1807.03039: 5)."""
  bits, remedy = data.num_bits, 'give 5 for 5-bit images with config.data.num_values=32'
  require(1 <= bits <= 8, 'config.data.num_bits', bits, 'from 0 (as stored) to 8', remedy)
  fact = f'{2**bits} with config.data.num_bits={bits}'
  require(data.num_values == 2**bits, 'config.data.num_values', data.num_values, fact, remedy)

  def fetch_quantized(indices):
    batch = fetch(indices)
    return batch | {'image': batch['image'] >> (8 - bits)}

  return fetch_quantized
