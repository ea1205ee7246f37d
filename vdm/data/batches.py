"""Batches of a split: a function of (seed, step) alone, whatever the number of hosts."""

import functools
import sys
from collections.abc import Iterator

import grain
import numpy as np

from vdm.data.source import Batch, Source
from vdm.errors import require


def train_batches(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  process_index: int,
  process_count: int,
) -> Iterator[Batch]:
  """Returns this host's rows of endless batches, of which batch k depends on (seed, k) alone.

  Every epoch is a fresh permutation that visits each image once; a batch may straddle two epochs.
  Host h gets rows [h b, (h + 1) b) of the global batch, b = batch_size / process_count, so that
  any number of hosts sees the same images. Starting at any step costs the same.

  Args:
    source: what `load` returned.
    batch_size: images over all hosts.
    seed: any integer; seeds are equal modulo 2**32.
    start_step: k of the first batch.
    process_index: this host.
    process_count: number of hosts.

  Returns:
    An iterator over batches, b examples each (`source.Batch`).
  """
  local = _local_batch_size('train', batch_size, process_count)
  count = len(source)

  # Grain's shuffle takes 35 us per index on sets as small as digits and may change with its
  # version. RandomState is frozen, hashes its two seeds, and takes 25 ms for 1.3 million.
  @functools.lru_cache(maxsize=2)
  def permutation(epoch):
    return np.random.RandomState([seed % 2**32, epoch % 2**32]).permutation(count)

  def batch(step):
    rows = step * batch_size + process_index * local + np.arange(local)
    epochs, positions = np.divmod(rows, count)
    visit = count if source.by_visit else 0
    parts = [permutation(int(e))[positions[epochs == e]] + e * visit for e in np.unique(epochs)]
    return source.fetch(np.concatenate(parts))

  return _iterate(range(start_step, sys.maxsize), batch, source)


def num_eval_images(source: Source, max_images: int) -> int:
  """Returns how many images an evaluation counts: at most `max_images`; 0: the whole split."""
  return min(max_images or len(source), len(source))


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  max_images: int = 0,
  process_index: int,
  process_count: int,
) -> Iterator[Batch]:
  """Returns the split once, in order, in as many batches on every host; image 0 fills up the last.

  Args:
    source: what `load` returned.
    batch_size: images over all hosts.
    max_images: stop after this many; 0: the whole split.
    process_index: this host.
    process_count: number of hosts.

  Returns:
    An iterator over {'image', 'label', 'mask': float32 [b], 1 for an image that counts and 0 for
    filling, 'index': int32 [b], position of the image in the split}.
  """
  local = _local_batch_size('eval', batch_size, process_count)
  total = num_eval_images(source, max_images)

  def batch(step):
    rows = step * batch_size + process_index * local + np.arange(local)
    index = np.where(rows < total, rows, 0)
    return source.fetch(index) | {
      'mask': (rows < total).astype(np.float32),
      'index': index.astype(np.int32),
    }

  return _iterate(range(-(-total // batch_size)), batch, source)


def _iterate(steps, batch, source):
  # The queue is short, since each element is a whole batch.
  options = grain.ReadOptions(
    num_threads=source.num_threads, prefetch_buffer_size=2 * source.num_threads
  )
  dataset = grain.MapDataset.range(steps.start, steps.stop).map(batch)
  return iter(dataset.to_iter_dataset(options))


def _local_batch_size(block, batch_size, process_count):
  low = max(1, batch_size // process_count) * process_count
  good = batch_size > 0 and batch_size % process_count == 0
  fact = f'positive and divisible by the {process_count} hosts'
  remedy = f'try {low} or {low + process_count}'
  require(good, f'config.{block}.batch_size', batch_size, fact, remedy)
  return batch_size // process_count
