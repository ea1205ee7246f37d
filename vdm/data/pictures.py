"""Encoded pictures as pixels, and images of any size as images of one."""

import contextlib
import warnings

import numpy as np

from vdm.system import files

# Pillow would choose by the content, whatever the name: an EPS file goes to Ghostscript.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'TIFF', 'BMP', 'GIF', 'PPM')
MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # Pillow's, by the number of channels


def decode(file, name: str, channels: int = 0) -> np.ndarray:
  """Returns the pixels of an encoded picture, uint8 [H, W, C]; training and FID read alike.

  Args:
    file: a path, or a file opened for reading.
    name: what errors call it.
    channels: C, to which grey and colour are converted as TensorFlow does; 0: 1 for a grey picture
      and 3 for any other.

  Raises:
    ValueError: 8 bits per channel, or C channels, would not hold what the picture shows.
  """
  from PIL import Image

  image = None
  with (
    files.reading(name, 'write it again, or remove it'),
    _no_bomb(Image),
    Image.open(file, formats=FORMATS) as picture,
  ):
    kind = picture.mode
    if picture.format == 'PNG' and '16' in str(picture.tile[0][3]):  # Pillow would cut them off
      kind = 'I;16' if kind.startswith('I') else f'{kind};16'
    good = kind in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA')
    if good and channels not in (2, 4) and picture.has_transparency_data:
      good = picture.convert('RGBA').getchannel('A').getextrema()[0] == 255
    if good:
      mode = MODES[channels or (1 if kind in ('1', 'L', 'LA') else 3)]
      image = np.asarray(picture if picture.mode == mode else picture.convert(mode))
  if image is None:
    raise ValueError(
      f'{name} has pixels of kind {kind}, must be 8-bit grey or RGB without transparency; '
      'flatten it.'
    )
  return image.reshape(*image.shape[:2], -1)


@contextlib.contextmanager
def _no_bomb(image_library):
  """Refuses a picture that declares more pixels than Pillow takes for a sane number."""
  with warnings.catch_warnings():
    warnings.simplefilter('error', image_library.DecompressionBombWarning)
    try:
      yield
    except (
      image_library.DecompressionBombWarning,
      image_library.DecompressionBombError,
      MemoryError,
    ) as error:
      raise ValueError(error) from error


def centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Returns the middle of an image uint8 [H, W, C], scaled to cover height x width (as ADM does).

  It is halved by averaging while it is at least twice as large as needed, then scaled by bicubic
  interpolation: no aliasing.
  """
  from PIL import Image

  picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
  while picture.width >= 2 * width and picture.height >= 2 * height:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  scale = max(width / picture.width, height / picture.height)
  size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
  scaled = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
  top, left = (size[1] - height) // 2, (size[0] - width) // 2
  return scaled[top : top + height, left : left + width].reshape(height, width, -1)
