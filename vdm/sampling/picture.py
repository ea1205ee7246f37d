"""Images as one picture."""

import math
import pathlib

import numpy as np
from PIL import Image

from vdm.sampling.folder import encode_png
from vdm.system import files


def image_grid(pixels: np.ndarray, columns: int = 0) -> np.ndarray:
  """Returns images uint8 [N H W C] as one picture uint8 [.. .. 1 or 3], in grey frames.

  Images of one or three channels are grey or RGB; of any others the channels stand side by side.
  """
  columns = columns or math.ceil(math.sqrt(len(pixels)))
  rows = math.ceil(len(pixels) / columns)
  if pixels.shape[3] not in (1, 3):
    pixels = pixels.transpose(0, 1, 3, 2).reshape(*pixels.shape[:2], -1, 1)
  cells = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
  _, h, w, c = cells.shape
  picture = np.full((rows * columns, h, w, c), 128, np.uint8)
  picture[: len(cells)] = cells
  return picture.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def flat_pictures(pixels: np.ndarray) -> np.ndarray:
  """Returns arrays uint8 [N *spatial C] on one, two or three axes as pictures [N H W C].

  Those on one axis are drawn as curves, those on three are cut in the middle of the first.
  """
  if pixels.ndim == 5:
    return pixels[:, pixels.shape[1] // 2]
  if pixels.ndim == 4:
    return pixels
  height = max(16, pixels.shape[1] // 4)
  level = np.round((height - 1) * (1 - pixels / 255.0)).astype(int)  # rows from the top, [N X C]
  before = np.concatenate([level[:, :1], level[:, :-1]], axis=1)
  row = np.arange(height).reshape(1, -1, 1, 1)
  low, high = np.minimum(level, before)[:, None], np.maximum(level, before)[:, None]
  return np.where((low <= row) & (row <= high), 0, 255).astype(np.uint8)


def save_png(path: pathlib.Path, picture: np.ndarray, least_side: int = 256):
  """Writes a picture uint8 [H W 1 or 3], enlarged by whole pixels where it is small."""
  image = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
  scale = max(1, math.ceil(least_side / min(image.size)))
  image = image.resize([side * scale for side in image.size], Image.NEAREST)
  files.write(path, encode_png(image))
