"""Tells a network of each example, in its own units, what the config says it is given."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from vdm.diffusion.gaussian import per_channel
from vdm.errors import native, require
from vdm.nn import layers


class Takes(NamedTuple):
  """Holds which conditions a network takes, and the statistics that they are normalised with.

  Absent conditions are -1 for a class, and NaN for vectors and fields (`guidance.without`).
  """

  num_classes: int = 0  # 0: no label
  vector_size: int = 0  # 0: no vector
  condition_shape: tuple[int, ...] = ()  # of the field, spatial axes and channels; (): no field
  masked: bool = False  # whether each example has a mask of the dimensions that count
  lack_learned: bool = False  # whether training left conditions out (config.train.label_dropout)
  vector_statistics: tuple[tuple, tuple] = ((), ())  # shift and scale of each component
  condition_statistics: tuple[tuple, tuple] = ((), ())  # and of each channel

  @property
  def names(self) -> list[str]:
    """Returns which of classes, vectors and fields examples have; a mask is no condition."""
    sizes = dict(label=self.num_classes, vector=self.vector_size, condition=self.condition_shape)
    return [name for name, size in sizes.items() if size]

  @property
  def conditional(self) -> bool:
    """Returns whether examples have conditions."""
    return bool(self.names)

  def sizes(self) -> dict[str, int]:
    """Returns how large the arguments of a network are that `inputs` makes."""
    field = self.condition_shape[-1] + 1 + self.masked if self.condition_shape else self.masked
    return dict(
      num_classes=self.num_classes, vector_size=self.vector_size, field_channels=int(field)
    )

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

  def differences(self, other: 'Takes') -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, what this network takes, what the other takes) where both take, and differ."""
    for name in ('num_classes', 'vector_size', 'condition_shape'):
      mine, its = getattr(self, name), getattr(other, name)
      if mine and its and mine != its:
        yield name, mine, its

  def require_shapes(self, image_shape: tuple[int, ...], count: int, told: Mapping[str, Any]):
    """Refuses conditions of `count` examples that the network does not take, or of other shapes.

    Args:
      image_shape: of the model.
      count: how many examples.
      told: any of 'label', 'vector', 'condition' and 'mask'; None where it is not given.

    Raises:
      ValueError: one is not taken, or has another shape.
    """
    shapes = {
      'label': () if self.num_classes else None,
      'vector': (self.vector_size,) if self.vector_size else None,
      'condition': self.condition_shape or None,
      'mask': (*image_shape[:-1], 1) if self.masked else None,
    }
    for name, value in told.items():
      shape, remedy = shapes[name], 'it takes none'
      if value is None:
        continue
      if shape is not None:
        shape, remedy = (count, *shape), f'the model takes {name}s of shape {[count, *shape]}'
      rule = 'left out' if shape is None else f'an array {list(shape)}'
      require(np.shape(value) == shape, name, np.shape(value), rule, remedy)

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

    A row of NaN alone stands for none, as does the class -1.

    Raises:
      ValueError: the network does not take one of them, it has another shape, or values that are
        not finite; or a mask leaves nothing of an example.
    """
    typed = label
    if label is not None and np.ndim(label) == 0:  # one class for all
      label = np.full(count, label)
    told: dict[str, Any] = dict(label=label, vector=vector, condition=condition, mask=mask)
    self.require_shapes(image_shape, count, told)
    found = {name: np.array(value) for name, value in self.nothing(count, image_shape).items()}
    if label is not None:
      rows = native('label', label)
      self.require_classes(rows, typed)
      found['label'] = rows.astype(np.int32)
    for name in ('vector', 'condition'):
      if told[name] is None:
        continue
      rows = native(name, told[name])
      each = rows.reshape(count, -1)
      bad = np.flatnonzero(~(np.isfinite(each).all(axis=1) | np.isnan(each).all(axis=1)))
      rule, remedy = 'finite, or NaN alone for none', 'correct it'
      require(not bad.size, f'{name}[{bad[:1]}]', rows[bad[:1]].ravel()[:3], rule, remedy)
      found[name] = rows
    if (valid := self.valid(image_shape, count, mask)) is not None:
      found['valid'] = valid
    return found

  def valid(
    self, image_shape: tuple[int, ...], count: int, mask: np.ndarray | None
  ) -> np.ndarray | None:
    """Returns which dimensions of `count` examples count, by the mask that a user gives; None: all.

    Raises:
      ValueError: the network takes no mask, it has another shape, or leaves nothing of an example.
    """
    self.require_shapes(image_shape, count, dict(mask=mask))
    if mask is None:
      return None
    valid = native('mask', mask) != 0
    empty = np.flatnonzero(~valid.reshape(count, -1).any(axis=1))
    rule, remedy = 'nonzero somewhere', 'leave out examples of which nothing counts'
    require(not empty.size, f'mask[{empty[:1]}]', 0, rule, remedy)
    return valid

  def require_known(self, told: Mapping[str, Any]):
    """Refuses the lack of conditions that training never left out; traced ones are not looked at.

    Args:
      told: conditions by name; None where one is not given.

    Raises:
      ValueError: one that the network takes is not given, or none for some example.
    """
    rule = 'given for each image: in training it never was absent'
    remedy = 'give it, or train with config.train.label_dropout=0.1'
    for name in () if self.lack_learned else self.names:
      value: Any = told.get(name)
      require(value is not None, name, None, rule, remedy)
      if not isinstance(value, jax.core.Tracer):
        rows = np.atleast_1d(value)
        absent = rows == -1 if name == 'label' else np.isnan(rows)
        absent = absent.reshape(len(rows), -1).all(axis=1)
        require(not absent.any(), name, f'none for image {absent.argmax()}', rule, remedy)

  def require_classes(self, rows: np.ndarray, typed: Any = None):
    """Refuses labels that are no classes of the model.

    Args:
      rows: labels of any shape.
      typed: what the user gave, which the error shows; None: the rows.

    Raises:
      ValueError: some are not integers, or not from -1 to num_classes - 1.
    """
    good = rows.dtype.kind in 'iu' and rows.min(initial=0) >= -1
    rule = f'classes, 0 .. {self.num_classes - 1}, or -1 for none'
    good = good and rows.max(initial=0) < self.num_classes
    shown = rows if typed is None else typed
    require(bool(good), 'label', shown, rule, 'config.data.num_classes says how many there are')


def of_config(data: ConfigDict, class_conditional: bool, label_dropout: float) -> Takes:
  """Returns what the network of a config takes."""
  return Takes(
    num_classes=data.num_classes if class_conditional else 0,
    vector_size=data.embedding_size,
    condition_shape=tuple(data.condition_shape),
    masked=data.masked,
    lack_learned=label_dropout > 0,
    vector_statistics=(tuple(data.vector_shift), tuple(data.vector_scale)),
    condition_statistics=(tuple(data.condition_shift), tuple(data.condition_scale)),
  )


def _normalised(value: Array, shift: tuple, scale: tuple) -> Array:
  """Returns (value - shift) / scale per channel in float32; the value itself without statistics."""
  value = jnp.asarray(value, jnp.float32)
  if not scale:
    return value
  return (value - per_channel(shift, value)) / per_channel(scale, value)
