"""Sets of images through an extractor, on any hosts: statistics of all, features of some."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from vdm import data
from vdm.errors import require
from vdm.fid import statistics
from vdm.fid.extractor import Extractor
from vdm.fid.network import Features
from vdm.fid.statistics import Statistics

KINDS = ('features', 'spatial')  # what a Gaussian is fitted to


class Collected(NamedTuple):
  """Holds what is known of a set of images.

  Attributes:
    statistics: {'features': Statistics, 'spatial': ...} of all of them.
    rows: {'features': float32 [n, D], ...} of the first n, in order.
  """

  statistics: dict[str, Statistics]
  rows: Features


def collect(extractor: Extractor, batches: Iterable[data.Batch], keep: int) -> Collected:
  """Streams images through an extractor; the result is the same on every host.

  Args:
    extractor: what `make` returned.
    batches: this host's rows of each batch, {'image', 'mask', 'index'}, as `data.eval_batches`
      makes them; every host has as many, of the same size.
    keep: how many images' features to keep, for the metrics that need them one by one.
  """
  moments, kept, seen = {}, [], 0
  for batch in batches:
    features, real = extractor(batch['image']), batch['mask'] > 0
    for kind in set(KINDS) & set(features):
      if kind not in moments:
        moments[kind] = statistics.init(features[kind].shape[1])
      moments[kind] = statistics.update(moments[kind], features[kind][real])
    if seen < keep:  # filling as well: hosts gather arrays of one shape
      kept.append(features | {'index': np.where(real, batch['index'], -1).astype(np.int64)})
    seen += len(real) * jax.process_count()
  merged = {kind: statistics.merge_hosts(moments[kind]) for kind in sorted(moments)}
  return Collected(merged, _gathered(kept, keep))


def _gathered(kept: list[dict], keep: int) -> Features:
  """Returns all hosts' features in the order of images."""
  if not kept:
    return {}
  local = {name: np.concatenate([part[name] for part in kept]) for name in sorted(kept[0])}
  rows = {name: np.concatenate(statistics.gather(value)) for name, value in local.items()}
  index = rows.pop('index')
  order = np.flatnonzero((index >= 0) & (index < keep))
  order = order[np.argsort(index[order], kind='stable')]
  return {name: value[order] for name, value in rows.items()}


def batches_of(
  images: Iterable[np.ndarray], extractor: Extractor, batch_size: int
) -> Iterator[data.Batch]:
  """Yields this host's rows of images in arrays [n, H, W, C] of any n, the same on every host."""
  size = extractor.batch_size(batch_size)
  local, start, rest = size // jax.process_count(), 0, None
  for array in images:
    rest = array if rest is None else np.concatenate([rest, array])
    while len(rest) >= size:
      yield _host_rows(rest[:size], start, local)
      rest, start = rest[size:], start + size
  if rest is not None and len(rest):
    yield _host_rows(rest, start, local)


def _host_rows(images: np.ndarray, start: int, local: int) -> data.Batch:
  number = jax.process_index() * local + np.arange(local)
  real = number < len(images)
  return {
    'image': images[np.where(real, number, 0)],
    'mask': real.astype(np.float32),
    'index': (start + number).astype(np.int64),
  }


def check_count(settings, num_images: int, extractor: Extractor):
  """Refuses fewer images than a covariance of the extractor's features needs."""
  least = extractor.num_features + 1
  fewest = 4 if settings.halves >= 2 else 2  # each half of them has a covariance as well
  require(
    num_images >= fewest,
    'config.fid.num_images',
    num_images,
    f'{fewest} or more with config.fid.halves={settings.halves}',
    'give more images: one alone has no covariance',
  )
  require(
    num_images >= least or settings.allow_few,
    'config.fid.num_images',
    num_images,
    f'{least} or more, or the covariance of {extractor.num_features} features is singular',
    'give 50000, as published numbers do, or --config.fid.allow_few=True to have it all the same',
  )


def check_reference(settings, name: str, num_images: int, extractor: Extractor):
  """Refuses a reference of as few images as `check_count` refuses; 0: it does not say how many."""
  least = 2 if settings.allow_few else extractor.num_features + 1
  if 0 < num_images < least:
    raise ValueError(
      f'reference {name} has {num_images} images, must have {least} or more, or the covariance of '
      f'{extractor.num_features} features is singular; '
      'make one of more images, or give --config.fid.allow_few=True to have it all the same.'
    )
