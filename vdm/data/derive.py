"""Conditions that are made of the image itself: super-resolution and inpainting as data."""

import numpy as np

from vdm.data import wavelet
from vdm.data.source import Batch
from vdm.errors import require

KINDS = ('low_resolution', 'inpainting')


def derived(data, fetch):
  """Returns a `fetch` whose batches also have the conditions that config.data.derive asks for.

  'low_resolution': the condition is the mean of the image over equal blocks, as many as
  config.data.condition_shape has along each axis. 'inpainting': the middle half of the image along
  each axis is what counts (`valid`), and the condition is the rest, with the middle set to zero,
  or to the mean, config.data.condition_shift, of real values.

  Raises:
    ValueError: there is no such kind, or config.data.condition_shape and masked do not fit it.
  """
  kind, field = data.derive, 'config.data.derive'
  require(
    kind in KINDS, field, kind, f"'' or one of {', '.join((*KINDS, *wavelet.KINDS))}", 'choose one'
  )
  image, condition = tuple(data.image_shape), tuple(data.condition_shape)
  if kind == 'low_resolution':
    fits = len(image) == len(condition) and image[-1] == condition[-1] and not data.masked
    fits = fits and all(n % m == 0 for n, m in zip(image, condition, strict=True))
    rule = f'so many blocks of images {image}, of equal size, and config.data.masked=False'
    remedy = f'for blocks of two give {tuple(n // 2 for n in image[:-1])} and {image[-1]} channels'
    require(fits, 'config.data.condition_shape', condition, rule, remedy)
    of = lambda pixels: {'condition': block_means(pixels, condition[:-1])}
  else:
    rule = f'the shape of the images {image}, with config.data.masked=True'
    fits = condition == image and data.masked
    require(fits, 'config.data.condition_shape', condition, rule, 'set both')
    middle = tuple(slice(n // 4, n // 4 + max(1, n // 2)) for n in image[:-1])
    valid = np.zeros((1, *image[:-1], 1), bool)
    valid[(slice(None), *middle)] = True
    mean = () if data.num_values else tuple(data.condition_shift)
    of = lambda pixels: {
      'condition': np.where(valid, np.array(mean or 0, pixels.dtype), pixels),
      'valid': np.broadcast_to(valid, (len(pixels), *valid.shape[1:])),
    }

  def fetch_derived(indices) -> Batch:
    batch = fetch(indices)
    return batch | of(batch['image'])

  return fetch_derived


def block_means(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
  """Returns the mean over equal blocks: [N *spatial C] -> float32 [N *size C]."""
  pixels = np.asarray(pixels, np.float32)
  for axis, count in enumerate(size, 1):
    shape = (*pixels.shape[:axis], count, -1, *pixels.shape[axis + 1 :])
    pixels = pixels.reshape(shape).mean(axis=axis + 1)
  return pixels
