"""Reads what the commands code: images and conditions of a file, or of a split of the data."""

from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vdm import build, data
from vdm.errors import require
from vdm.system import files

NAMES = ('images', 'arr_0', 'x')  # of images in an NPZ file
CONDITIONS = ('label', 'vector', 'condition', 'mask')  # there, as `compress` takes them


class Inputs(NamedTuple):
  """Holds images, and the conditions of those kinds that the model takes, by their names."""

  images: np.ndarray
  told: dict[str, Any]  # arrays, one row for each image

  @property
  def valid(self) -> np.ndarray:
    """Returns the dimensions that count, bool, as the images."""
    mask = self.told['mask'] != 0 if 'mask' in self.told else np.ones(1, bool)
    return np.broadcast_to(mask, self.images.shape)

  @property
  def num_dims(self) -> int:
    """Returns how many dimensions of all images count."""
    return int(self.valid.sum())


def of_file(path: str, takes: build.conditioning.Takes, more: str = '') -> Inputs:
  """Returns the images of an NPY or NPZ file, and what each is conditioned on.

  Args:
    path: of an array [N *spatial C], or of an NPZ file with one of NAMES and any of CONDITIONS.
    takes: what the model takes; other conditions are passed over.
    more: an NPZ file of conditions, if they are not with the images.

  Raises:
    ValueError: the file cannot be read, or holds no images.
  """
  if path.endswith('.npz'):
    arrays = files.read_arrays(files.path_of(path))
    name = next((name for name in NAMES if name in arrays), '')
    rule = f'an NPZ file with an array {" or ".join(NAMES)}'
    require(bool(name), '--images', path, rule, f'it has {", ".join(arrays) or "none"}')
    own = _taken(arrays, takes)
    return Inputs(arrays[name], own | (conditions_of(more, takes) if more else {}))
  with files.reading(path, 'give an NPY or NPZ file'):
    images = np.load(files.path_of(path), allow_pickle=False)
  return Inputs(images, conditions_of(more, takes) if more else {})


def conditions_of(path: str, takes: build.conditioning.Takes) -> dict[str, np.ndarray]:
  """Returns the conditions of an NPZ file that the model takes.

  Raises:
    ValueError: the file cannot be read, or holds none of them.
  """
  found = _taken(files.read_arrays(files.path_of(path)), takes)
  rule, remedy = f'an NPZ file with {" or ".join(CONDITIONS)}', 'the model takes none of its arrays'
  require(bool(found), '--conditions', path, rule, remedy)
  return found


def of_split(
  settings: ConfigDict, split: str, num_images: int, takes: build.conditioning.Takes
) -> Inputs:
  """Returns the first images of a split, and what each is conditioned on.

  Args:
    settings: config.data.
    split: 'train', 'eval', or what the config calls one of them, such as 'test'.
    num_images: how many; 0: all.
    takes: what the model takes.

  Raises:
    ValueError: there is no such split, or it has fewer images.
  """
  names = {settings.train_split: 'train', settings.eval_split: 'eval'}
  names |= {'train': 'train', 'eval': 'eval'}
  known = split in names
  require(known, '--split', split, f'one of {", ".join(map(repr, names))}', 'choose one')
  source = data.load(settings, names[split])
  good = 0 <= num_images <= len(source)
  require(
    good, '--num', num_images, f'at most the {len(source)} images of {split!r}', '0 is all of them'
  )
  batch: dict[str, Any] = dict(source.fetch(np.arange(num_images or len(source))))
  if 'valid' in batch:
    batch['mask'] = batch.pop('valid')
  return Inputs(batch['image'], _taken(batch, takes))


def _taken(arrays: dict[str, np.ndarray], takes: build.conditioning.Takes) -> dict[str, np.ndarray]:
  kinds = {
    'label': takes.num_classes,
    'vector': takes.vector_size,
    'condition': takes.condition_shape,
    'mask': takes.masked,
  }
  return {name: arrays[name] for name, taken in kinds.items() if taken and name in arrays}


def check_name(path: str):
  """Refuses the name of a file that `write` cannot write."""
  rule, remedy = 'a file *.npz or *.npy', 'name one'
  require(path.endswith(('.npz', '.npy')), '--out', path, rule, remedy)


def write(path: str, images: np.ndarray, index: np.ndarray | None = None):
  """Writes images to an NPY file, or to an NPZ file that has their numbers too, if given."""
  check_name(path)
  place = files.path_of(path)
  if path.endswith('.npy'):
    files.write(place, files.content(lambda file: np.save(file, images)))
  else:
    arrays: dict[str, Any] = {'images': images} | ({} if index is None else {'index': index})
    files.write(place, files.content(lambda file: np.savez_compressed(file, **arrays)))
  return place
