"""Rows that are computed once, into a file that is mapped: it can be removed at any time."""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vdm.system import files
from vdm.system.progress import Progress

BLOCK = 64  # rows that a thread takes at a time
LeftOut = dict[int, tuple[str, str]]  # by the row's number: of what kind it is, and the cause
Row = Callable[[int], tuple[np.ndarray | None, tuple[str, str] | None]]


def rows(
  folder: pathlib.Path, settings: dict[str, Any], shape: tuple[int, ...], row: Row, doing: str
) -> tuple[np.ndarray, LeftOut]:
  """Returns rows, uint8 of the shape [N ...], and those left out, whose row is zero.

  They are made unless there is a file for the settings. Of several processes that want it at the
  same time one makes it, where the file system has locks.

  Args:
    folder: where the files are kept.
    settings: all that the rows depend on.
    shape: of all rows together.
    row: its number -> (the row, None), or (None, why it is left out).
    doing: what a line of the log calls this.

  Raises:
    NoSpace: there is no room for them.
    OSError: the folder cannot be written.
  """
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
  path = folder / f'{digest}.npy'
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix('.lock')):
      if not path.exists():
        files.require_space(folder, 1.01 * math.prod(shape) + 2**20, 'cache')
        _make(path, shape, row, doing)
  with files.reading(path, 'remove it'):
    left_out = json.loads(path.with_suffix('.json').read_text())
    array = np.load(path, mmap_mode='r').view(np.ndarray)
    if array.shape != shape:
      raise ValueError(f'it has the shape {array.shape}')
    return array, {int(number): tuple(why) for number, why in left_out.items()}


def _make(path, shape, row, doing):
  """Writes all rows into a file, which gets its name when it is whole."""
  header = {'descr': '|u1', 'fortran_order': False, 'shape': shape}
  part, left_out = path.with_name(f'.{path.stem}.{uuid.uuid4().hex[:8]}.part'), {}
  try:
    with open(part, 'wb') as file:
      np.lib.format.write_array_header_1_0(file, header)
      file.flush()
      start, size = file.tell(), math.prod(shape[1:])

      def work(block):
        found = [row(number) for number in block]
        images = [np.zeros(shape[1:], np.uint8) if cause else image for image, cause in found]
        # A full disk is an error here; to a map that is written it is a signal.
        os.pwrite(file.fileno(), np.stack(images).tobytes(), start + block.start * size)
        return {n: cause for n, (_, cause) in zip(block, found, strict=True) if cause}

      for some in in_blocks(work, shape[0], f'{doing} into {path}'):
        left_out |= some
      os.fsync(file.fileno())
    files.write(path.with_suffix('.json'), json.dumps(left_out))
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(path) -> Iterator[None]:
  """Lets one process at a time in, where the file system has locks.

  Without them two processes do the same work, each in a file of its own.
  """
  with open(path, 'w') as file:
    files.lock(file.fileno())
    yield


def in_blocks(work: Callable[[range], Any], count: int, doing: str) -> Iterator[Any]:
  """Yields what `work` returns of each block of numbers below `count`, in order; on all cores.

  A line tells how far it is, once that takes more than a few seconds.
  """
  blocks = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
  tell = Progress(doing, 'pictures')
  try:
    for block, result in zip(blocks, pool.map(work, blocks), strict=True):
      yield result
      tell(block.stop, count)
  finally:
    pool.shutdown(cancel_futures=True)
