"""Takes what a user of Python gives by hand: pictures, and sources of them, of the model's kind."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vdm.build.model import Model
from vdm.errors import native, require


def images_of(
  model: Model, num_values: int, images: np.ndarray, valid: np.ndarray | None = None
) -> np.ndarray:
  """Returns images that the decoder knows, with zeros where a mask leaves them out.

  Args:
    model: whose images they are to be.
    num_values: that a discrete decoder knows, from 0.
    images: [N *spatial C], in the data's units.
    valid: [N *spatial 1], the dimensions that count; None: all.

  Raises:
    ValueError: they have another shape, or values that are not finite or not the data's.
  """
  images = native('images', images)
  _require_shape(model, images)
  if valid is not None:
    images = np.where(valid, images, images.dtype.type(0))
  finite, remedy = np.isfinite(images).all(), 'correct them, or mask them'
  require(bool(finite), 'images', 'nan or inf', 'finite', remedy)
  if not model.decoder.is_density:
    most = num_values - 1
    good = (images == np.round(images)).all() and images.min() >= 0 and images.max() <= most
    ends = f'{images.min():g} .. {images.max():g}'
    require(bool(good), 'images', ends, f'integers 0 .. {most}', "give the data's own values")
  return images


def require_rows(model: Model, row: dict[str, Any]):
  """Refuses a source whose examples are not what the model takes.

  Args:
    model: that reads them.
    row: a batch of one example.
  """
  takes = model.takes
  _require_shape(model, row['image'])
  names = {'vector': takes.vector_size, 'condition': takes.condition_shape, 'mask': takes.masked}
  own = {name: row.get('valid' if name == 'mask' else name) for name in names}
  for name, taken in names.items():
    remedy = f'the model takes a {name} for each image'
    require(own[name] is not None or not taken, 'source', name, 'with it', remedy)
  takes.require_shapes(model.image_shape, 1, own)


def checked(model: Model, num_values: int, fetch: Callable) -> Callable:
  """Returns `fetch` of a source, which refuses images and conditions that the model cannot take.

  Args:
    model: that reads it.
    num_values: as in `images_of`.
    fetch: numbers of examples -> a batch of the right shapes (`require_rows`).
  """

  def fetch_checked(indices):
    batch = fetch(indices)
    images_of(model, num_values, batch['image'], batch.get('valid'))
    told = {name: batch.get(name) for name in ('vector', 'condition')}
    told['label'] = batch['label'] if model.takes.num_classes else None
    model.takes.given(model.image_shape, len(indices), mask=batch.get('valid'), **told)
    model.takes.require_known(told)
    return batch

  return fetch_checked


def _require_shape(model: Model, images: np.ndarray):
  own, remedy = [*model.image_shape], 'that is the shape of the model'
  good = images.shape[1:] == model.image_shape and len(images) > 0
  require(good, 'images', images.shape, f'an array [N, {str(own)[1:]} of one at least', remedy)
