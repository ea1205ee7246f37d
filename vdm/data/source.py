"""A split of a data set, with random access."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Required, TypedDict

import numpy as np

from vdm.errors import require


class Batch(TypedDict, total=False):
  """Holds some examples of a split; each array has one row per example."""

  image: Required[np.ndarray]  # uint8 [b H W C]
  label: Required[np.ndarray]  # classes int32 [b], or embeddings float32 [b E]
  index: np.ndarray  # int32 [b], in the global batch or in the split
  mask: np.ndarray  # float32 [b], 1 for an example that counts and 0 for filling


@dataclasses.dataclass(frozen=True)
class Source:
  """Holds a split with random access: `len(source)`, `source[i]`, `source.fetch(indices)`.

  Attributes:
    fetch: indices [b] -> {'image': uint8 [b, H, W, C], 'label': int32 [b]}; labels are 0 where
      config.data.num_classes is 0. With config.data.embedding_size E, 'label' is the embedding
      stored with each image, float32 [b, E].
    identity: what was loaded, in plain values, for number cards.
    num_threads: threads that read ahead; 0 where the images are in memory already.
    labels: indices [b] -> int32 [b], the labels alone, for which no image is decoded.
  """

  fetch: Callable[[np.ndarray], Batch]
  identity: dict
  num_threads: int = 0
  labels: Callable[[np.ndarray], np.ndarray] | None = None

  def __len__(self) -> int:
    return self.identity['num_images']

  def __getitem__(self, index) -> Batch:
    if not 0 <= index < len(self):  # also what ends `for image in source`
      raise IndexError(index)
    batch = self.fetch(np.array([index]))
    return Batch(image=batch['image'][0], label=batch['label'][0])


def of_arrays(images: np.ndarray, labels: np.ndarray | None = None, name: str = 'arrays') -> Source:
  """Returns a source of images [N H W C], in memory, and their labels [N] or embeddings [N E].

  Args:
    images: in the data's units.
    labels: 0 for all images by default.
    name: for number cards.
  """
  images = np.asarray(images)
  labels = np.zeros(len(images), np.int32) if labels is None else np.asarray(labels)
  require(images.ndim == 4, 'images', images.shape, '[N, H, W, C]', 'add the axes that it lacks')
  require(len(labels) == len(images), 'labels', len(labels), f'{len(images)} labels', 'one each')
  digest = hashlib.sha256(images.tobytes()).hexdigest()[:16]
  identity = {'name': name, 'num_images': len(images), 'sha256': digest}
  fetch = lambda indices: Batch(image=images[indices], label=labels[indices])
  return Source(fetch, identity, labels=lambda indices: labels[indices])
