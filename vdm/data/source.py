"""A split of a data set, with random access."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Required, TypedDict, cast

import numpy as np

from vdm.errors import native, require


class Batch(TypedDict, total=False):
  """Holds some examples of a split; each array has one row per example."""

  image: Required[np.ndarray]  # [b *spatial C], in the data's units
  label: Required[np.ndarray]  # classes int32 [b]; 0 without any
  vector: np.ndarray  # float32 [b E], a condition
  condition: np.ndarray  # [b *spatial' Cc], a condition that is a field, at most as fine as image
  valid: np.ndarray  # bool [b *spatial 1]: the dimensions that count
  index: np.ndarray  # int32 [b], in the global batch or in the split
  mask: np.ndarray  # float32 [b], 1 for an example that counts and 0 for filling


CONDITIONS = ('label', 'vector', 'condition', 'valid')  # what a network may be told of an example


def conditions_of(batch: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a network may be told of the examples of a batch."""
  return {name: batch[name] for name in CONDITIONS if name in batch}


@dataclasses.dataclass(frozen=True)
class Source:
  """Holds a split with random access: `len(source)`, `source[i]`, `source.fetch(indices)`.

  Attributes:
    fetch: indices [b] -> a batch; labels are 0 where config.data.num_classes is 0.
    identity: what was loaded, in plain values, for number cards.
    num_threads: threads that read ahead; 0 where the images are in memory already.
    labels: indices [b] -> int32 [b], the labels alone, for which no image is decoded.
    by_visit: index i + v len(self) is example i too, with the noise of its v-th visit.
  """

  fetch: Callable[[np.ndarray], Batch]
  identity: dict
  num_threads: int = 0
  labels: Callable[[np.ndarray], np.ndarray] | None = None
  by_visit: bool = False

  def __len__(self) -> int:
    return self.identity['num_images']

  def __getitem__(self, index) -> Batch:
    if not 0 <= index < len(self):  # also what ends `for image in source`
      raise IndexError(index)
    batch = self.fetch(np.array([index]))
    return cast(Batch, {name: array[0] for name, array in cast(dict, batch).items()})


def of_arrays(
  images: np.ndarray,
  name: str = 'arrays',
  label: np.ndarray | None = None,
  vector: np.ndarray | None = None,
  condition: np.ndarray | None = None,
  valid: np.ndarray | None = None,
) -> Source:
  """Returns a source of images [N *spatial C], in memory, and what each is conditioned on.

  Args:
    images: in the data's units.
    name: for number cards.
    label: classes [N]; -1, none, for all images by default.
    vector: [N E].
    condition: fields [N *spatial' Cc].
    valid: [N *spatial 1], the dimensions that count.
  """
  images = native('images', images)
  shape, remedy = images.shape, 'add the axes that it lacks'
  good = images.ndim >= 2 and len(images) > 0
  require(good, 'images', shape, '[N, *spatial, C] of one at least', remedy)
  given = dict(label=label, vector=vector, condition=condition, valid=valid)
  arrays = {k: native(k, v) for k, v in given.items() if v is not None}
  arrays.setdefault('label', np.full(len(images), -1, np.int32))
  for key, array in arrays.items():
    rows = array.shape[:1] == (len(images),)
    require(rows, key, array.shape, f'{len(images)} rows', 'give one for each image')
  shape = arrays['label'].shape
  require(len(shape) == 1, 'label', shape, f'of shape ({len(images)},)', 'give one class for each')
  kind, rule = arrays['label'].dtype, 'integers'
  require(kind.kind in 'iu', 'label', kind, rule, 'number the classes from 0')
  if 'valid' in arrays:
    shape = (*images.shape[:-1], 1)
    rule, remedy = f'of shape {shape}', 'give it one channel'
    require(arrays['valid'].shape == shape, 'valid', arrays['valid'].shape, rule, remedy)
    arrays['valid'] = arrays['valid'] != 0
  digest = hashlib.sha256(images.tobytes()).hexdigest()[:16]
  identity = {'name': name, 'num_images': len(images), 'sha256': digest}
  arrays = {'image': images, **arrays}
  fetch = lambda indices: cast(Batch, {k: array[indices] for k, array in arrays.items()})
  return Source(fetch, identity, labels=lambda indices: arrays['label'][indices])
