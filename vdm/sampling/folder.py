"""A folder of drawn images: a manifest, and shards of one batch each.

A shard is there whole or not at all, and its bytes are those of its images alone, so that a drawing
that was killed goes on at the first shard that is missing, and ends in the same files.
"""

import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from PIL import Image

from vdm.diffusion.decoders import Decoder
from vdm.errors import require
from vdm.system import files

FORMATS = ('npz', 'png')
MANIFEST = 'manifest.json'
REMEDY = 'remove it to have it drawn again'


def check_format(image_format: str, image_shape: tuple[int, ...]):
  """Refuses a config.sample.format that cannot hold the images."""
  field, choices = 'sample.format', "'npz' or 'png'"
  require(image_format in FORMATS, f'config.{field}', image_format, choices, 'choose one')
  held = image_format == 'npz' or (len(image_shape) == 3 and image_shape[-1] in (1, 3))
  fact = f"'npz' for images {tuple(image_shape)}"
  require(held, f'config.{field}', image_format, fact, 'PNG files hold two axes, 1 or 3 channels')


def open_samples(folder: pathlib.Path, manifest: dict[str, Any]) -> list[int]:
  """Makes the folder, or finds the same drawing in it; returns where the missing shards start.

  Call it on every process: the first one looks, for it alone writes.

  Args:
    folder: of one drawing.
    manifest: plain values, with num_images, batch_size and format of the drawing.

  Raises:
    ValueError: the folder holds images of which its manifest says something else, or nothing.
  """
  starts = range(0, manifest['num_images'], manifest['batch_size'])
  missing, refusal = np.zeros(len(starts), np.int32), None
  if jax.process_index() == 0:
    try:
      _claim(folder, manifest)
    except ValueError as error:
      refusal = error
    missing[:] = [not _path(folder, manifest['format'], start).exists() for start in starts]
  missing, refused = multihost_utils.broadcast_one_to_all((missing, np.int32(refusal is not None)))
  if refused:
    raise refusal or ValueError(f'{folder} is refused by the first process, which says why.')
  return [start for start, absent in zip(starts, missing, strict=True) if absent]


def _claim(folder: pathlib.Path, manifest: dict[str, Any]):
  """Writes the manifest into a new folder, or compares it with that of an old one."""
  file, wanted = folder / MANIFEST, json.loads(json.dumps(manifest))
  remedy = 'remove the folder to draw anew'
  if file.exists():
    found = files.read_json(file, remedy)
    for field in sorted(found.keys() | wanted.keys()):
      old, new = found.get(field, 'nothing'), wanted.get(field, 'nothing')
      if old != new:
        raise ValueError(f'{folder} holds images of {field}={old!r}, not {new!r}; {remedy}.')
    return
  if any(folder.glob('[0-9]*')):
    raise ValueError(f'{folder} holds images without {MANIFEST}; {remedy}.')
  files.write(file, files.json_text(manifest))


def _path(folder: pathlib.Path, image_format: str, start: int) -> pathlib.Path:
  """Returns <number of the first image>.npz, or the folder of PNG files of that name."""
  return folder / (f'{start:08d}.npz' if image_format == 'npz' else f'{start:08d}')


def write_shard(
  folder: pathlib.Path,
  image_format: str,
  start: int,
  images: np.ndarray,
  decoder: Decoder,
  labels: np.ndarray | None = None,
):
  """Writes the images [N H W C] from number `start` on, and their classes.

  'npz' holds `images`, as they are, and `labels` if there are any. 'png' is a folder of files
  <number>.png, or <number>_class<label>.png, with pixels as the decoder shows them.
  """
  path = _path(epath.Path(folder), image_format, start)
  if image_format == 'npz':
    arrays = {'images': images.astype(decoder.dtype)}
    arrays |= {} if labels is None else {'labels': labels}
    files.write(path, files.content(lambda file: np.savez_compressed(file, **arrays)))
  else:
    part = path.with_name(f'.{path.name}.part')
    part.rmtree(missing_ok=True)  # what a kill left there
    part.mkdir()
    for i, pixels in enumerate(decoder.to_pixels(images)):
      label = '' if labels is None else f'_class{labels[i]}'
      pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
      (part / f'{start + i:08d}{label}.png').write_bytes(encode_png(Image.fromarray(pixels)))
    part.replace(path)  # on gs:// a folder is copied, and a kill may leave a part of it


def encode_png(image: Image.Image) -> bytes:
  """Returns the content of a PNG file."""
  return files.content(lambda file: image.save(file, format='png'))


def read_shards(folder: pathlib.Path) -> Iterator[np.ndarray]:
  """Yields the images [N H W C] of each shard in turn, as they are stored."""
  for path in sorted(folder.glob('[0-9]*')):
    if path.suffix == '.npz':
      arrays = files.read_arrays(path, REMEDY)
      with files.reading(path, REMEDY):
        images = arrays['images']
      yield images
    else:
      images = np.stack([_pixels(file) for file in sorted(path.glob('*.png'))])
      yield images.reshape(*images.shape[:3], -1)


def _pixels(path: pathlib.Path) -> np.ndarray:
  with files.reading(path, REMEDY):
    return np.asarray(Image.open(io.BytesIO(path.read_bytes()), formats=['PNG']))
