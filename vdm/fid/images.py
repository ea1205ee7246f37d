"""Anyone's images as a `data.Source`: a folder of pictures, an NPZ file, or a folder of those."""

import bisect
import functools
import itertools
import pathlib
import zipfile

import numpy as np
from absl import logging

from vdm import data
from vdm.system import files as files_lib

PICTURES = {'.png', '.jpg', '.jpeg', '.bmp', '.webp'}
LOSSY = {'.jpg', '.jpeg', '.webp'}
AGAIN = 'write it again'
KEYS = ('arr_0', 'images')  # ADM's name of images in an NPZ file, and ours


def load(path: str) -> data.Source:
  """Returns the images of `path` in the order of their names; labels are 0.

  Raises:
    ValueError: there are none, they differ in shape, or the first file cannot be read.
  """
  root = pathlib.Path(path)
  if not root.exists():
    raise ValueError(f'{path} does not exist; give a folder of PNG files, an NPZ file or shards.')
  files = [root] if root.is_file() else sorted(p for p in root.rglob('*') if _counts(root, p))
  shards = [file for file in files if file.suffix == '.npz']
  pictures = [file for file in files if file.suffix.lower() in PICTURES]
  if shards and pictures:
    raise ValueError(f'{path} holds pictures and NPZ files; give a folder of either kind.')
  if not shards and not pictures:
    raise ValueError(
      f'{path} holds no picture and no NPZ file; give PNG files, or an NPZ of uint8.'
    )
  fetch, count = _of_shards(shards) if shards else _of_pictures(pictures)
  first = fetch(np.arange(min(64, count)))
  identity = {
    'name': str(root),
    'num_images': count,
    'image_shape': list(first.shape[1:]),
    'sha256_first_64': data.fingerprint(first),
  }

  def fetch_batch(index):
    return {'image': fetch(index), 'label': np.zeros(len(index), np.int32)}

  return data.Source(fetch_batch, identity, 0 if shards else 8)


def _counts(root: pathlib.Path, path: pathlib.Path) -> bool:
  """Returns whether it is a file, and not a part that `vdm.sampling.folder` was writing."""
  return path.is_file() and not any(p.startswith('.') for p in path.relative_to(root).parts)


def _of_pictures(files):
  lossy = [file.name for file in files if file.suffix.lower() in LOSSY]
  if lossy:
    logging.warning(
      '%s and %d more are JPEG or WebP, whose loss moves FID by whole points; save PNG.',
      lossy[0],
      len(lossy) - 1,
    )

  def fetch(index):
    images = [_read_picture(files[i]) for i in index]
    for i, image in zip(index, images, strict=True):
      if image.shape != images[0].shape:
        raise ValueError(
          f'{files[i]} is {image.shape}, but {files[index[0]]} {images[0].shape}; '
          'give images of one shape.'
        )
    return np.stack(images)

  return fetch, len(files)


def _read_picture(file: pathlib.Path) -> np.ndarray:
  """Returns uint8 [H, W, 1] of a grey picture, [H, W, 3] of any other without transparency."""
  return data.decode(file, str(file))


def _of_shards(files):
  counts = [_header(file)[0] for file in files]
  shapes = {_header(file)[1:] for file in files}
  if len(shapes) > 1:
    raise ValueError(f'{files[0].parent} has images of shapes {sorted(shapes)}; give one shape.')
  ends = list(itertools.accumulate(counts))
  read = functools.lru_cache(maxsize=2)(lambda number: _array(files[number]))

  def fetch(index):
    places = [bisect.bisect_right(ends, i) for i in index]
    return np.stack(
      [read(p)[i - (ends[p] - counts[p])] for p, i in zip(places, index, strict=True)]
    )

  return fetch, ends[-1]


def _header(file: pathlib.Path) -> tuple[int, ...]:
  """Returns the shape of a shard's images, without reading them."""
  with files_lib.reading(file, AGAIN), zipfile.ZipFile(file) as archive:
    key = _key(file, [name.removesuffix('.npy') for name in archive.namelist()])
    with archive.open(f'{key}.npy') as member:
      shape, dtype = files_lib.array_header(member)
  if dtype != np.uint8 or len(shape) != 4 or not shape[0]:
    raise ValueError(
      f'{file} has {key} of {dtype} {shape}, must be uint8 [N, H, W, C]; quantise it.'
    )
  return shape


def _array(file: pathlib.Path) -> np.ndarray:
  arrays = files_lib.read_arrays(file, AGAIN)
  return arrays[_key(file, list(arrays))]


def _key(file: pathlib.Path, names: list[str]) -> str:
  for key in KEYS:
    if key in names:
      return key
  raise ValueError(f'{file} has arrays {names}, must have images as {" or ".join(KEYS)}.')
