"""`digits`: 8x8 images, embedded in scikit-learn, for runs without files and for tests."""

from typing import Any

import numpy as np

from vdm.errors import confirm


def found(data) -> dict[str, Any]:
  """Returns the leaves of config.data as digits has them."""
  counts = {f'{split}_images': load(data, split)[3] for split in ('train', 'eval')}
  return counts | dict(image_shape=(8, 8, 1), num_values=17, num_classes=10, embedding_size=0)


def load(data, split: str):
  """Returns what `vdm.data.load` needs of a split: fetch, labels, full name, images, threads."""
  from sklearn.datasets import load_digits  # seconds to import, for this data set only

  field, name = f'config.data.{split}_split', data[f'{split}_split']
  good = name in ('train', 'test')
  confirm(good, field, name, 'is no split of digits', "choose 'train' or 'test'")
  field, value = 'config.data.embedding_size', data.embedding_size
  confirm(not value, field, value, 'but digits has no embeddings', f'set --{field}=0')
  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
  # RandomState, since its stream is frozen by numpy: the split must outlive this environment.
  random = np.random.RandomState(0)
  test = [random.permutation(np.flatnonzero(labels == digit))[:36] for digit in range(10)]
  rows = np.sort(np.concatenate(test))
  if name == 'train':
    rows = np.delete(np.arange(len(images)), rows)
  images, labels = images[rows], labels[rows].astype(np.int32) * bool(data.num_classes)
  fetch = lambda indices: {'image': images[indices], 'label': labels[indices]}
  return fetch, lambda indices: labels[indices], 'digits/sklearn', len(rows), 0
