"""Compares what a data set is with what the config says it is."""

import hashlib
import math

import numpy as np

from vdm.errors import confirm

CHECKED_IMAGES = 1024


def fingerprint(*arrays: np.ndarray) -> str:
  """Returns 16 hexadecimal digits of sha256: equal pixels have the same, wherever they are from."""
  return hashlib.sha256(b''.join(array.tobytes() for array in arrays)).hexdigest()[:16]


def require_shape(data, full_name, found, number):
  """Refuses `found`, the shape of image `number`, unless it is the config's."""
  field, flag = 'config.data.image_shape', ','.join(map(str, found))
  remedy = f'set --{field}={flag} if all its images have that shape'
  if tuple(found[2:]) == tuple(data.image_shape[2:]):
    remedy += ', or --config.data.resize=True to scale and crop those of any size'
  good = tuple(data.image_shape) == tuple(found)
  fact = f'but {full_name} has {found} in image {number}'
  confirm(good, field, tuple(data.image_shape), fact, remedy)


def checked(data, full_name, fetch):
  """Returns a `fetch` that refuses values and conditions other than the config says.

  Every example that is read is looked at.
  """

  told = (
    ('vector', 'embedding_size', data.embedding_size, 0),
    ('condition', 'condition_shape', tuple(data.condition_shape), ()),
    ('valid', 'masked', data.masked, False),
  )

  def fetch_checked(indices):
    batch = fetch(indices)
    for name, leaf, value, nothing in told:
      fact, remedy = f'but {full_name} has none', f'set --config.data.{leaf}={nothing}'
      confirm(not value or name in batch, f'config.data.{leaf}', value, fact, remedy)
    image, label = batch['image'], batch['label']
    require_shape(data, full_name, image.shape[1:], indices[0])
    if data.num_values:
      _check_integers(data, full_name, image, indices)
    for name in ('image', 'vector', 'condition'):
      if name in batch and np.issubdtype(batch[name].dtype, np.floating):
        _check_finite(full_name, name, batch[name], batch.get('valid'), indices)
    if data.masked:
      empty = indices[~batch['valid'].reshape(len(indices), -1).any(axis=1)]
      fact = f'but {full_name} has a mask of zeros in image {empty[:1]}'
      confirm(not len(empty), 'config.data.masked', True, fact, 'leave that image out')
    field, value = 'config.data.num_classes', data.num_classes
    bad = (label < 0) | (label >= max(value, 1))
    if bad.any():
      low, high = int(label.min()), int(label.max())
      fact = f'but {full_name} has labels {low} .. {high}, as in image {indices[bad.argmax()]}'
      more = f'set --{field} to at least {high + 1}, or 0 to ignore labels'
      confirm(False, field, value, fact, more if low >= 0 else f'set --{field}=0 to ignore labels')
    return batch

  return fetch_checked


def _check_integers(data, full_name, image, indices):
  field, value, high = 'config.data.num_values', data.num_values, int(image.max())
  whole = np.issubdtype(image.dtype, np.integer)
  remedy = "set --config.data.num_values=0 and --config.decoder.name='normal' for real values"
  confirm(whole, field, value, f'but {full_name} has real values, {image.dtype}', remedy)
  number = indices[image.reshape(len(image), -1).max(axis=1).argmax()] if high >= value else 0
  fact = f'but {full_name} has values up to {high} in image {number}'
  confirm(high < value, field, value, fact, f'set --{field} to at least {high + 1}')


def _check_finite(full_name, name, values, valid, indices):
  """Refuses NaN and infinity; where a mask says that a dimension does not count they may be."""
  good = np.isfinite(values)
  if name == 'image' and valid is not None:
    good = good | ~valid
  bad = indices[~good.reshape(len(good), -1).all(axis=1)]
  if len(bad):
    raise ValueError(
      f'{full_name} has values of nan or inf in the {name} of example {bad[0]}; correct them, or '
      'leave it out.'
    )


def identify(data, split, full_name, fetch, num_images):
  """Compares what was loaded with what the config says, and returns it as plain values."""
  field, value, name = (
    f'config.data.{split}_images',
    data[f'{split}_images'],
    data[f'{split}_split'],
  )
  fact = f'but {full_name} has {num_images} images in {name!r}'
  remedy = f'set --{field}={num_images} if this is the data you mean'
  confirm(value == num_images, field, value, fact, remedy)
  num_checked = num_images if data.name == 'digits' else min(CHECKED_IMAGES, num_images)
  number_of = int if data.num_values else float
  digest, told_digest, low, high = '', '', math.inf, -math.inf
  for start in range(0, num_checked, 64):
    batch = fetch(np.arange(start, min(start + 64, num_checked)))
    image = batch['image']
    if not digest:
      digest = fingerprint(image)
      told = [batch[name] for name in ('condition', 'vector', 'valid') if name in batch]
      told_digest = fingerprint(*told) if told else ''
    low, high = min(low, number_of(image.min())), max(high, number_of(image.max()))

  # Fewer than half of the values is another unit: bits/dim and the range of x would mean little.
  field, value = 'config.data.num_values', data.num_values
  fact = f'but {full_name} has values {low} .. {high} in its first {num_checked} images'
  remedy = f'set --{field}={high + 1}, or at most {2 * high + 1}'
  if data.num_values and not high:
    field, value, fact = f'config.data.{split}_split', name, f'of {full_name} is black'
    remedy = 'choose a split that has its images'
  few = 2 * high + 1 < data.num_values and not (data.as_found and high)
  confirm(not few, field, value, fact, remedy)
  conditions = {
    'masked': data.masked,
    'condition_shape': list(data.condition_shape),
    'vector_size': data.embedding_size,
    'sha256_conditions_first_64': told_digest,
  }
  return {
    **{name: value for name, value in conditions.items() if value},
    'num_images': num_images,
    'image_shape': list(data.image_shape),
    'num_values': data.num_values,
    'value_min': low,
    'value_max': high,
    'checked_images': num_checked,
    'sha256_first_64': digest,
  }
