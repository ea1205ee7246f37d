"""What a data set is, compared with what the config says it is."""

import hashlib

import numpy as np

from vdm.errors import confirm

CHECKED_IMAGES = 1024


def fingerprint(images: np.ndarray) -> str:
  """Returns 16 hexadecimal digits of sha256: equal pixels have the same, wherever they are from."""
  return hashlib.sha256(images.tobytes()).hexdigest()[:16]


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
  """Returns a `fetch` that refuses pixels, labels and embeddings other than the config says."""

  def fetch_checked(indices):
    batch = fetch(indices)
    image, label = batch['image'], batch['label']
    require_shape(data, full_name, image.shape[1:], indices[0])
    field, value, high = 'config.data.num_values', data.num_values, int(image.max())
    number = indices[image.reshape(len(image), -1).max(axis=1).argmax()] if high >= value else 0
    fact = f'but {full_name} has values up to {high} in image {number}'
    confirm(high < value, field, value, fact, f'set --{field} to at least {high + 1}')
    if data.embedding_size:
      field, value = 'config.data.embedding_size', data.embedding_size
      bad = indices[~np.isfinite(label).all(axis=1)]
      fact = f'but {full_name} has embeddings of nan or inf'
      confirm(not len(bad), field, value, fact, f'correct that of image {bad[:1]}')
      return batch
    field, value = 'config.data.num_classes', data.num_classes
    bad = (label < 0) | (label >= max(value, 1))
    if bad.any():
      low, high = int(label.min()), int(label.max())
      fact = f'but {full_name} has labels {low} .. {high}, as in image {indices[bad.argmax()]}'
      more = f'set --{field} to at least {high + 1}, or 0 to ignore labels'
      confirm(False, field, value, fact, more if low >= 0 else f'set --{field}=0 to ignore labels')
    return batch

  return fetch_checked


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
  digest, low, high = '', 255, 0
  for start in range(0, num_checked, 64):
    image = fetch(np.arange(start, min(start + 64, num_checked)))['image']
    digest = digest or fingerprint(image)
    low, high = min(low, int(image.min())), max(high, int(image.max()))

  # Fewer than half of the values is another unit: bits/dim and the range of x would mean little.
  field, value = 'config.data.num_values', data.num_values
  fact = f'but {full_name} has values {low} .. {high} in its first {num_checked} images'
  remedy = f'set --{field}={high + 1}, or at most {2 * high + 1}'
  if not high:
    field, value, fact = f'config.data.{split}_split', name, f'of {full_name} is black'
    remedy = 'choose a split that has its images'
  confirm(2 * high + 1 >= data.num_values, field, value, fact, remedy)
  return {
    'num_images': num_images,
    'image_shape': list(data.image_shape),
    'num_values': data.num_values,
    'value_min': low,
    'value_max': high,
    'checked_images': num_checked,
    'sha256_first_64': digest,
  }
