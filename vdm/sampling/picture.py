"""Images as one picture."""

import math
import pathlib

import numpy as np
from PIL import Image

from vdm import style
from vdm.sampling.folder import encode_png
from vdm.system import files

GAP = 2  # pixels of grey on each side of an image


def image_grid(pixels: np.ndarray, columns: int = 0, least_width: int = 640) -> np.ndarray:
  """Returns images uint8 [N H W C] as one picture uint8 [.. .. 1 or 3], in light grey frames.

  Images of one or three channels are grey or RGB; of any others the channels stand side by side.
  Small ones are enlarged by a whole number, each pixel to a square, until all are `least_width`.
  """
  columns = columns or math.ceil(math.sqrt(len(pixels)))
  rows = math.ceil(len(pixels) / columns)
  if pixels.shape[3] not in (1, 3):
    pixels = pixels.transpose(0, 1, 3, 2).reshape(*pixels.shape[:2], -1, 1)
  scale = math.ceil(least_width / (columns * pixels.shape[2]))
  cells = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  frame = ((0, 0), (GAP, GAP), (GAP, GAP), (0, 0))
  cells = np.pad(cells, frame, constant_values=style.FRAME)
  _, h, w, c = cells.shape
  picture = np.full((rows * columns, h, w, c), style.FRAME, np.uint8)
  picture[: len(cells)] = cells
  return picture.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def class_grid(pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """Returns images uint8 [N H W C] whose classes [N] come in turn as a grid, a named column each.

  Where they do not, or are one or more than twenty, it is the grid of `image_grid`, without names.
  """
  names = list(dict.fromkeys(classes.tolist()))
  in_turn = np.resize(names, len(classes)) if names else classes
  if not 1 < len(names) <= 20 or len(pixels) < len(names) or (in_turn != classes).any():
    return image_grid(pixels)
  grid = image_grid(pixels, len(names))
  return style.image_of(style.label_grid({'': grid}, list(map(str, names)), title='class'))


def flat_pictures(pixels: np.ndarray) -> np.ndarray:
  """Returns arrays uint8 [N *spatial C] on one, two or three axes as pictures [N H W C].

  Those on one axis are drawn as curves, those on three are cut in the middle of the first. Other
  channels than one or three stand side by side, with a pixel of grey between.
  """
  if pixels.ndim == 5:
    return _side_by_side(pixels[:, pixels.shape[1] // 2])
  if pixels.ndim == 4:
    return _side_by_side(pixels)
  height = max(16, pixels.shape[1] // 4)
  level = np.round((height - 1) * (1 - pixels / 255.0)).astype(int)  # rows from the top, [N X C]
  before = np.concatenate([level[:, :1], level[:, :-1]], axis=1)
  row = np.arange(height).reshape(1, -1, 1, 1)
  low, high = np.minimum(level, before)[:, None], np.maximum(level, before)[:, None]
  return _side_by_side(np.where((low <= row) & (row <= high), 0, 255).astype(np.uint8))


def _side_by_side(pixels):
  if pixels.shape[3] in (1, 3):
    return pixels
  gap = ((0, 0), (0, 0), (0, 0), (0, 1))
  apart = np.pad(pixels.transpose(0, 1, 3, 2), gap, constant_values=style.FRAME)
  return apart.reshape(*pixels.shape[:2], -1, 1)[:, :, :-1]


def save_png(path: pathlib.Path, picture: np.ndarray):
  """Writes a picture uint8 [H W 1 or 3]."""
  image = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
  files.write(path, encode_png(image))
