"""Encoded pictures as pixels, and images of any size as images of one."""

import contextlib
import warnings

import numpy as np

from vdm.system import files

# Pillow would choose by the content, whatever the name: an EPS file goes to Ghostscript.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'TIFF', 'BMP', 'GIF', 'PPM')
MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # Pillow's, by the number of channels
ORIENTATION = 0x0112  # EXIF's tag


class Unsuitable(ValueError):
  """A picture shows more than 8-bit pixels without transparency can hold; `why` says what."""

  def __init__(self, name: str, kind: str, why: str):
    super().__init__(
      f'{name} has pixels of kind {kind}, must be 8-bit grey or RGB without transparency; '
      'flatten it.'
    )
    self.why = why


def decode(file, name: str, channels: int = 0, upright: bool = False) -> np.ndarray:
  """Returns the pixels of an encoded picture, uint8 [H, W, C]; training and FID read alike.

  Args:
    file: a path, or a file opened for reading.
    name: what errors call it.
    channels: C, to which grey and colour are converted as TensorFlow does; 0: 1 for a grey picture
      and 3 for any other.
    upright: turn it as its EXIF says.

  Raises:
    ValueError: 8 bits per channel, or C channels, would not hold what the picture shows.
  """
  from PIL import ImageOps

  image = None
  with _opened(file, name) as picture:
    kind, why = _kind(picture)
    if not why and channels not in (2, 4) and picture.has_transparency_data:
      opaque = picture.convert('RGBA').getchannel('A').getextrema()[0] == 255
      why = '' if opaque else 'transparent'
    if not why:
      if upright:
        ImageOps.exif_transpose(picture, in_place=True)
      mode = MODES[channels or _channels(kind)]
      image = np.asarray(picture if picture.mode == mode else picture.convert(mode))
  if image is None:
    raise Unsuitable(name, kind, why)
  return image.reshape(*image.shape[:2], -1)


def shape_of(file, name: str) -> tuple[int, int, int]:
  """Returns the (H, W, C) of what `decode` makes of a picture, upright, from its header alone.

  Raises:
    ValueError: the header is damaged, or tells that 8 bits per channel would not hold the picture.
  """
  with _opened(file, name) as picture:
    kind, why = _kind(picture)
    size = picture.size
    # Pillow would decode a whole PNG to look for EXIF behind the pixels; TIFF has turned itself.
    if picture.format != 'TIFF' and (picture.format != 'PNG' or 'exif' in picture.info):
      if picture.getexif().get(ORIENTATION) in (5, 6, 7, 8):
        size = size[::-1]
  if why:
    raise Unsuitable(name, kind, why)
  return size[1], size[0], _channels(kind)


def _channels(kind):
  return 1 if kind in ('1', 'L', 'LA') else 3


def _kind(picture):
  """Returns the kind of a picture's pixels, and why 8 bits would not hold them, if so."""
  kind, deep = picture.mode, False
  if picture.format != 'MPO' and getattr(picture, 'is_animated', False):  # MPO: with a preview
    return kind, 'of several pages'
  if picture.format == 'PPM':
    arguments = picture.tile[0][3]
    deep = not isinstance(arguments, str) and arguments[-1] > 255
  elif picture.format in ('PNG', 'TIFF'):
    arguments = picture.tile[0][3]
    deep = ';16' in (arguments if isinstance(arguments, str) else arguments[0])
  if deep or kind.startswith('I'):  # Pillow would cut them off
    return 'I;16' if kind.startswith('I') else f'{kind};16', 'more than 8 bits per channel'
  return kind, '' if kind in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA') else f'of kind {kind}'


@contextlib.contextmanager
def _opened(file, name):
  """Opens a picture; whatever damage it has is told in one line."""
  from PIL import Image

  with (
    files.reading(name, 'write it again, or remove it'),
    _no_bomb(Image),
    Image.open(file, formats=FORMATS) as picture,
  ):
    yield picture


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
