"""The orthonormal Haar transform: an image as a coarser one and what it lacks, without a Jacobian.

The log-density of an image is that of its coarse half plus that of its details given it, and so on
down: `config.data.derive` makes data sets of both, which are the stages of a cascade. Integers get
uniform noise in [0, 1) first: the density of the sum bounds their probability, log P(x) >=
E[log p(x + noise)].
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np

from vdm.data.source import Batch
from vdm.errors import require

KINDS = ('haar_coarse', 'haar_details')


def haar(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the coarse half and the details, from which `unhaar` makes the pixels again.

  Each block of 2 pixels along each of k spatial axes becomes 2^k numbers: sums and differences over
  the square root of 2^k.

  Args:
    pixels: [N *spatial C], of even sizes.

  Returns:
    [N *spatial/2 C], and [N *spatial/2 (2^k - 1) C].
  """
  parts = [pixels]
  for axis in range(1, pixels.ndim - 1):
    halves = [(_every_second(part, axis, 0), _every_second(part, axis, 1)) for part in parts]
    sums = [(even + odd) / np.sqrt(2, dtype=pixels.dtype) for even, odd in halves]
    differences = [(even - odd) / np.sqrt(2, dtype=pixels.dtype) for even, odd in halves]
    parts = sums + differences
  return parts[0], np.concatenate(parts[1:], axis=-1)


def unhaar(coarse: np.ndarray, details: np.ndarray) -> np.ndarray:
  """Returns the pixels [N *spatial C] from their coarse half and details, which `haar` returns."""
  axes = range(1, coarse.ndim - 1)
  parts = [coarse, *np.split(details, 2 ** len(axes) - 1, axis=-1)]
  for axis in reversed(axes):
    half = len(parts) // 2
    pairs = zip(parts[:half], parts[half:], strict=True)
    root = np.sqrt(2, dtype=coarse.dtype)
    parts = [_interleave((s + d) / root, (s - d) / root, axis) for s, d in pairs]
  return parts[0]


def _every_second(array: np.ndarray, axis: int, first: int) -> np.ndarray:
  return array[(slice(None),) * axis + (slice(first, None, 2),)]


def _interleave(even: np.ndarray, odd: np.ndarray, axis: int) -> np.ndarray:
  shape = (*even.shape[:axis], 2 * even.shape[axis], *even.shape[axis + 1 :])
  return np.stack([even, odd], axis + 1).reshape(shape)


def stored(data):
  """Returns config.data of the images that config.data.derive transforms.

  Raises:
    ValueError: config.data.image_shape or condition_shape are not those of the derived data, or a
      leaf is of another kind of data.
  """
  level, shape, field = data.level, tuple(data.image_shape), 'config.data'
  require(level >= 1, f'{field}.level', level, 'at least 1', '1 is the finest')
  rule, remedy = '0, for coefficients are real', f'say it of the pixels, {field}.dequantize'
  require(data.num_values == 0, f'{field}.num_values', data.num_values, rule, remedy)
  rule, remedy = 'False: a mask has no transform', 'leave it out'
  require(not data.masked, f'{field}.masked', True, rule, remedy)
  channels, kinds = shape[-1], 2 ** (len(shape) - 1)
  condition: tuple[int, ...] = ()
  if data.derive == 'haar_details':
    rule = f'{kinds - 1} for each of the image, at level {level}'
    good, flag = channels % (kinds - 1) == 0, f'{field}.image_shape'
    require(good, flag, shape, f'of channels that are {rule}', 'give a multiple')
    channels //= kinds - 1
    condition = (*shape[:-1], channels)
  rule, remedy = f'{condition} with image_shape={shape}', 'give it that'
  told = tuple(data.condition_shape)
  require(told == condition, f'{field}.condition_shape', told, rule, remedy)
  changed = data.copy_and_resolve_references().unlock()
  changed.update(
    image_shape=(*(n * 2**level for n in shape[:-1]), channels),
    condition_shape=(),
    num_values=data.dequantize,
    derive='',
  )
  return changed.lock()


@contextlib.contextmanager
def of_pixels(data) -> Iterator[None]:
  """Says of an error that it is of the stored images, not of the coefficients."""
  try:
    yield
  except ValueError as error:
    kind = f'with config.data.derive={data.derive!r} and level={data.level}'
    raise ValueError(f'{kind}, of the pixels: {error}') from error


def transformed(data, fetch: Callable, count: int, split: int) -> Callable:
  """Returns a `fetch` of coefficients, of the image and, as its condition, of what is coarser.

  Index i + v `count` is example i on its v-th visit, whose noise is another. It depends on the
  split, i and v alone: all stages of a cascade have the same.

  Args:
    data: config.data, with the leaves of the derived data.
    fetch: of the stored images.
    count: how many there are.
    split: its number.
  """

  def fetch_transformed(indices) -> Batch:
    with of_pixels(data):
      batch = dict(fetch(indices % count))
    whole, field = np.issubdtype(batch['image'].dtype, np.integer), 'config.data.dequantize'
    rule, remedy = 'their number of values, for integers have no density', 'give 256 for 8 bits'
    require(data.dequantize or not whole, field, data.dequantize, rule, remedy)
    pixels = np.asarray(batch['image'], np.float32)
    if data.dequantize:
      pixels = pixels + np.stack([_noise(split, int(i), pixels.shape[1:]) for i in indices])
    for _ in range(data.level):
      coarse, details = haar(pixels)
      pixels = coarse
    batch['image'] = coarse
    if data.derive == 'haar_details':
      batch |= {'image': details, 'condition': coarse}
    return cast(Batch, batch)

  return fetch_transformed


def _noise(split: int, index: int, shape: tuple[int, ...]) -> np.ndarray:
  """Returns uniform numbers in [0, 1), of RandomState, whose stream NumPy has frozen."""
  seed = [split, index % 2**32, index // 2**32]
  return np.random.RandomState(seed).random_sample(shape).astype(np.float32)
