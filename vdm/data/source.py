"""A split of a data set, with random access."""

import dataclasses
from collections.abc import Callable

import numpy as np

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
  """A split with random access: `len(source)`, `source[i]`, `source.fetch(indices)`.

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
    return {name: value[0] for name, value in self.fetch(np.array([index])).items()}
