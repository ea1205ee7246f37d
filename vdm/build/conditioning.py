"""What a network is told of each example, in its own units, by the config."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from vdm.diffusion.gaussian import per_channel
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
