"""What a network is told of each example, in its own units, by the config."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vdm.diffusion.gaussian import per_channel
from vdm.errors import require
from vdm.nn import layers


class Takes(NamedTuple):
  """Holds which conditions a network takes, and the statistics that they are normalised with.

  Absent conditions are -1 for a class, and NaN for vectors and fields (`guidance.without`).
  """

  num_classes: int = 0  # 0: no label
  vector_size: int = 0  # 0: no vector
  condition_shape: tuple[int, ...] = ()  # of the field, spatial axes and channels; (): no field
  masked: bool = False  # whether each example has a mask of the dimensions that count
  vector_statistics: tuple[tuple, tuple] = ((), ())  # shift and scale of each component
  condition_statistics: tuple[tuple, tuple] = ((), ())  # and of each channel

  def nothing(self, size: int, image_shape: tuple[int, ...]) -> dict[str, Array]:
    """Returns what stands for no conditions of `size` examples; all dimensions count."""
    found = {}
    if self.num_classes:
      found['label'] = jnp.full(size, -1, jnp.int32)
    if self.vector_size:
      found['vector'] = jnp.full((size, self.vector_size), jnp.nan)
    if self.condition_shape:
      found['condition'] = jnp.full((size, *self.condition_shape), jnp.nan)
    if self.masked:
      found['valid'] = jnp.ones((size, *image_shape[:-1], 1), bool)
    return found

  def inputs(self, conditions: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the arguments of a network beside z and t: label, vector and field.

    The field has the mask, if any, the normalised channels of the condition, if any, and one that
    says that there is a condition.
    """
    found = {}
    if self.num_classes:
      found['label'] = conditions['label']
    if self.vector_size:
      found['vector'] = _normalised(conditions['vector'], *self.vector_statistics)
    field = None
    if self.condition_shape:
      field = _normalised(conditions['condition'], *self.condition_statistics)
      there = ~jnp.isnan(field[..., :1])
      field = jnp.concatenate([jnp.where(there, field, 0), there.astype(field.dtype)], axis=-1)
    if self.masked:
      field = layers.append_field(conditions['valid'].astype(jnp.float32), field)
    return found if field is None else found | {'field': field}

  def given(
    self,
    image_shape: tuple[int, ...],
    count: int,
    label: int | np.ndarray | None = None,
    vector: np.ndarray | None = None,
    condition: np.ndarray | None = None,
    mask: np.ndarray | None = None,
  ) -> dict[str, np.ndarray]:
    """Returns the conditions of `count` examples that a user gives, and what stands for the others.

    Raises:
      ValueError: the network does not take one of them, or it has another shape.
    """
    found = {}
    if label is not None:
      found['label'] = self._labels(label, count)
    elif self.num_classes:
      found['label'] = np.full(count, -1, np.int32)
    shapes = {
      'vector': (vector, (self.vector_size,) if self.vector_size else ()),
      'condition': (condition, self.condition_shape),
      'mask': (mask, (*image_shape[:-1], 1) if self.masked else ()),
    }
    for name, (value, shape) in shapes.items():
      remedy = f'the model takes {name}s of shape {[count, *shape]}' if shape else 'it takes none'
      rule = f'an array {[count, *shape]}' if shape else 'left out'
      if value is None and shape:
        found[name] = np.full((count, *shape), 1 if name == 'mask' else np.nan, np.float32)
      elif value is not None:
        array = np.asarray(value)
        require(bool(shape) and array.shape == (count, *shape), name, array.shape, rule, remedy)
        found[name] = array
    if 'mask' in found:
      found['valid'] = found.pop('mask') != 0
    return found

  def _labels(self, label: int | np.ndarray, count: int) -> np.ndarray:
    """Returns a class for all examples, or one each, int32 [count]."""
    rows, classes = np.asarray(label), self.num_classes
    good = np.issubdtype(rows.dtype, np.integer) and classes > 0
    good = good and rows.size > 0 and rows.min() >= -1 and rows.max() < classes
    rule = f'classes, 0 .. {classes - 1}, or -1 for none' if classes else 'left out'
    require(bool(good), 'label', label, rule, 'config.model.class_conditional says what it takes')
    require(
      rows.ndim == 0 or len(rows) == count, 'label', rows.shape, f'{count} labels', 'one each'
    )
    return np.broadcast_to(rows, (count,)).astype(np.int32)


def of_config(data: ConfigDict, class_conditional: bool) -> Takes:
  """Returns what the network of a config takes."""
  return Takes(
    num_classes=data.num_classes if class_conditional else 0,
    vector_size=data.embedding_size,
    condition_shape=tuple(data.condition_shape),
    masked=data.masked,
    vector_statistics=(tuple(data.vector_shift), tuple(data.vector_scale)),
    condition_statistics=(tuple(data.condition_shift), tuple(data.condition_scale)),
  )


def _normalised(value: Array, shift: tuple, scale: tuple) -> Array:
  """Returns (value - shift) / scale per channel in float32; the value itself without statistics."""
  value = jnp.asarray(value, jnp.float32)
  if not scale:
    return value
  return (value - per_channel(shift, value)) / per_channel(scale, value)
