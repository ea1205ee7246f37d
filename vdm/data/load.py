"""Loads a split by the kind of its data set."""

import contextlib
from typing import Any

import numpy as np

from vdm.data import arrays, digits, folder, gaussian_field, huggingface, tfds, wavelet
from vdm.data.derive import derived
from vdm.data.identity import checked, identify
from vdm.data.source import Source
from vdm.errors import confirm, require

# by config.data.name; any other name is that of a TFDS data set
KINDS = {
  'digits': digits,
  'folder': folder,
  'arrays': arrays,
  'huggingface': huggingface,
  'gaussian_field': gaussian_field,
}
# by the name in config.data.ignore: the leaf that says that it is not used, and its value then
IGNORED: dict[str, tuple[str, Any]] = {
  'label': ('num_classes', 0),
  'vector': ('embedding_size', 0),
  'condition': ('condition_shape', ()),
  'mask': ('masked', False),
}


def load(data, split: str) -> Source:
  """Returns the split of config.data that 'train' or 'eval' names, checked against the config.

  Raises:
    ValueError: the data set, directory or split is not there, or is not what the config says.
  """
  require(split in ('train', 'eval'), 'split', split, "'train' or 'eval'", 'choose one')

  by_visit = data.derive in wavelet.KINDS
  stored = wavelet.stored(data) if by_visit else _stored(data)
  with wavelet.of_pixels(data) if by_visit else contextlib.nullcontext():
    loaded = KINDS.get(data.name, tfds).load(stored, split)
  fetch, labels, full_name, num_images, num_threads = loaded
  field, text = f'config.data.{split}_split', data[f'{split}_split']
  confirm(num_images > 0, field, text, 'has no examples', 'name some')
  if data.num_bits:
    fetch = _quantized(stored, fetch)
  if by_visit:
    fetch = checked(stored, full_name, fetch)
    fetch = wavelet.transformed(data, fetch, num_images, ('train', 'eval').index(split))
  elif data.derive:
    fetch = derived(data, fetch)
  identity = {'name': data.name, 'full_name': full_name, 'split': data[f'{split}_split']}
  identity |= {'num_bits': data.num_bits, 'resize': data.resize}
  identity |= {'derive': data.derive} if data.derive else {}
  identity |= {'level': data.level, 'dequantize': data.dequantize} if by_visit else {}
  fetch = checked(data, full_name, fetch)
  identity |= identify(data, split, full_name, fetch, num_images)
  if data.name == 'gaussian_field' and not data.derive:
    identity['exact_nats_per_dim'] = gaussian_field.exact(data, split)
  return Source(fetch, identity, num_threads, labels, by_visit)


def found(data) -> dict[str, Any]:
  """Returns the leaves of config.data as the data have them, for config.data.as_found."""
  rule, remedy = f'False with derive={data.derive!r}', 'say the shapes of the coefficients'
  require(data.derive not in wavelet.KINDS, 'config.data.as_found', True, rule, remedy)
  leaves = KINDS.get(data.name, tfds).found(_stored(data))
  leaves |= {'num_values': 2**data.num_bits} if data.num_bits else {}
  if not data.derive:
    return leaves
  made = {'condition': 'condition_shape', 'mask': 'masked'}  # of the image, by the config
  there = [name for name, leaf in made.items() if leaves.get(leaf) and name not in ignored(data)]
  rule = f"'' for data with a {' and a '.join(there)}, which what is derived does not know"
  flag = ','.join([*ignored(data), *there])
  remedy = f'leave out what the data have by --config.data.ignore={flag}'
  require(not there, 'config.data.derive', data.derive, rule, remedy)
  return {leaf: value for leaf, value in leaves.items() if leaf not in made.values()}


def ignored(data) -> list[str]:
  """Returns the names in config.data.ignore.

  Raises:
    ValueError: one of them is none of IGNORED.
  """
  names = [name.strip() for name in data.ignore.split(',') if name.strip()]
  rule = f'of {", ".join(IGNORED)}'
  remedy = 'name what is there and not to be used'
  require(set(names) <= set(IGNORED), 'config.data.ignore', data.ignore, rule, remedy)
  return names


def _stored(data):
  """Returns config.data of the images that conditions are derived from: nothing else of each."""
  if not data.derive:
    return data
  stored = data.copy_and_resolve_references().unlock()
  stored.update(condition_shape=(), masked=False)
  return stored


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
  if data.name in KINDS:
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
