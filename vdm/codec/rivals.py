"""Other codecs on the same images: PNG, WebP, JPEG XL, JPEG, zlib."""

import importlib.util
import io
import math
import zlib
from typing import Any

import numpy as np
from PIL import Image

LOSSLESS: dict[str, dict[str, Any]] = {
  'PNG': dict(format='PNG', optimize=True),
  'WebP': dict(format='WebP', lossless=True, quality=100, method=6),
  'JPEG XL': dict(format='JXL', lossless=True, effort=9),
}
LOSSY: dict[str, dict[str, Any]] = {
  'JPEG': dict(format='JPEG', optimize=True, subsampling=0),
  'WebP': dict(format='WebP', method=6),
}
QUALITIES = (1, 2, 4, 7, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)


def lossless(images: np.ndarray) -> dict[str, tuple[float, float]]:
  """Returns bits/dim by codec: a file for each image, and one for all of them.

  Other images than pictures are for zlib alone; JPEG XL needs pillow-jxl-plugin.

  Args:
    images: integers [N *spatial C], coded as they are, 8 bits each.
  """
  dims, found = images.size, dict[str, tuple[float, float]]()
  if are_pictures(images):
    has_jxl = importlib.util.find_spec('pillow_jxl') is not None
    if has_jxl:
      import pillow_jxl  # noqa: F401  (it adds a format to Pillow)
    together = mosaic(images)
    for name, how in LOSSLESS.items():
      if name != 'JPEG XL' or has_jxl:
        each = sum(len(_saved(image, how)) for image in images)
        found[name] = 8 * each / dims, 8 * len(_saved(together, how)) / dims
  each = sum(len(zlib.compress(image.tobytes(), 9)) for image in images)
  found['zlib'] = 8 * each / dims, 8 * len(zlib.compress(images.tobytes(), 9)) / dims
  return found


def lossy(images: np.ndarray, num_values: int) -> dict[str, list[tuple[float, float, float]]]:
  """Returns (quality, bits/dim, PSNR in dB) by codec, of all images in one picture.

  In one picture they share headers, which are longer than a small image. There are none of what
  is no picture.

  Args:
    images: integers 0 .. K - 1 [N *spatial C].
    num_values: K.
  """
  if not are_pictures(images):
    return {}
  scale = 255 / (num_values - 1)
  picture = mosaic(np.round(images * scale).astype(np.uint8))
  found: dict[str, list[tuple[float, float, float]]] = {}
  whole = mosaic(images)
  there = mosaic(np.ones_like(images)) > 0
  for name, how in LOSSY.items():
    found[name] = []
    for quality in QUALITIES:
      content = _saved(picture, how | {'quality': quality})
      decoded = Image.open(io.BytesIO(content)).convert('L' if images.shape[-1] == 1 else 'RGB')
      values = np.round(np.asarray(decoded).reshape(whole.shape) / scale)
      square = ((values - whole)[there] ** 2).mean()
      found[name].append((quality, 8 * len(content) / images.size, psnr(square, num_values)))
  return found


def are_pictures(images: np.ndarray) -> bool:
  """Returns whether formats of pictures can hold images: two axes, 1 or 3 channels, 8 bits."""
  return images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)


def psnr(square: float, num_values: int) -> float:
  """Returns the peak signal-to-noise ratio in dB of a mean square error in values; inf for 0."""
  return 10 * math.log10((num_values - 1) ** 2 / square) if square else math.inf


def mosaic(images: np.ndarray) -> np.ndarray:
  """Returns images [N H W C] beside and below each other, nearly square; the rest is zero."""
  count, height, width, channels = images.shape
  columns = math.ceil(math.sqrt(count * height / width))
  rows = math.ceil(count / columns)
  filled = np.zeros((rows * columns, height, width, channels), images.dtype)
  filled[:count] = images
  grid = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * height, columns * width, channels)


def _saved(image: np.ndarray, how: dict[str, Any]) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, **how)
  return file.getvalue()
