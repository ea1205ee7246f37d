"""One job per workdir: a file that says who writes there, with a sign of life."""

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vdm.system import files

FILE = 'lock.json'
BEAT_SECONDS = 10.0  # between two signs of life
SETTLE_SECONDS = 3.0  # after which who else has claimed a lock on gs:// has written it
SILENT_BEATS = 3  # after which the job of another host is taken to be gone


@contextlib.contextmanager
def hold(workdir: os.PathLike | str) -> Iterator[Callable[[], None]]:
  """Keeps other jobs out of a workdir, for as long as this one writes there.

  To be called on every process; the first one holds the lock. A job of the same host and container
  that has ended is passed over at once, however it ended; any other one once it has shown no sign
  of life for SILENT_BEATS.

  Yields:
    A check to be made before every write: it raises ValueError once another job holds the lock,
    which then has seen no sign of life of this one.

  Raises:
    ValueError: another job writes there.
  """
  path = files.absolute(workdir) / FILE
  own, refusal = _own(), None
  if jax.process_index() == 0:
    try:
      _claim(path, own, workdir)
    except ValueError as error:
      refusal = error
  if jax.process_count() > 1:
    refused = multihost_utils.broadcast_one_to_all(np.int32(refusal is not None))
    if refused and refusal is None:
      refusal = ValueError(f'--workdir={workdir} is refused by the first process, which says why.')
  if refusal:
    raise refusal
  ended, lost = threading.Event(), list[str]()
  if jax.process_index() == 0:
    args = (path, own, ended, lost)
    threading.Thread(target=_beat, args=args, daemon=True).start()

  def check():
    if lost:
      raise ValueError(lost[0])

  try:
    yield check
  finally:
    ended.set()
    if jax.process_index() == 0 and _read(path) == own:
      with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _own() -> dict[str, Any]:
  """Returns what the file says of this job."""
  return {
    'host': socket.gethostname(),
    'space': _space(),
    'pid': os.getpid(),
    'started': _start_of(os.getpid()),
    'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'token': uuid.uuid4().hex,
  }


def _claim(path: epath.Path, own: dict[str, Any], workdir: os.PathLike | str):
  """Writes the lock, once the job that holds it, if any, is known to be gone."""
  ours = False
  while not ours:  # unless another job was faster
    found = _read(path)
    if found and not _is_gone(path, found):
      raise ValueError(
        f'--workdir={workdir} is being written by process {found["pid"]} of {found["host"]} since '
        f'{found["since"]}; choose another --workdir, or stop that job.'
      )
    if found:
      logging.info('%s: process %d of %s has ended', path, found['pid'], found['host'])
    still_so = functools.partial(_has, path, found)
    ours = files.write_if(still_so, path, json.dumps(own))
    if ours and _is_remote(path):  # where two may write at once, and the last one stays
      time.sleep(SETTLE_SECONDS)
      ours = _read(path) == own


def _read(path: epath.Path) -> dict[str, Any]:
  """Returns the lock's content; {} if there is none, or none that can be read."""
  try:
    found = files.read_json(path)
  except ValueError:
    return {}
  return found if _own().keys() - {'space'} <= found.keys() else {}  # which older ones lack


def _has(path: epath.Path, content: dict[str, Any]) -> bool:
  return _read(path) == content


def _is_gone(path: epath.Path, found: dict[str, Any]) -> bool:
  """Returns whether the job that holds the lock has ended."""
  if (found['host'], found.get('space')) == (socket.gethostname(), _space()):
    started = _start_of(found['pid'])
    return not started or (found['started'] and started != found['started'])
  patience = SILENT_BEATS * BEAT_SECONDS
  logging.info('%s is of %s: waiting %g s for a sign of life', path, found['host'], patience)
  before = _life_of(path)
  for _ in range(SILENT_BEATS):
    time.sleep(BEAT_SECONDS)
    if _life_of(path) != before:
      return False
  return True


def _space() -> str:
  """Returns what tells apart machines and containers of one name, whose process ids differ."""
  try:
    with open('/proc/sys/kernel/random/boot_id') as file:
      return f'{file.read().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:  # where there is no /proc
    return ''


def _start_of(pid: int) -> str:
  """Returns when a process of this host started, in the system's ticks; '' for none that runs.

  A number of a process is given to another one later; its start tells them apart.
  """
  try:
    with open(f'/proc/{pid}/stat') as file:
      fields = file.read().rpartition(')')[2].split()
      return '' if fields[0] == 'Z' else fields[19]
  except FileNotFoundError:
    if os.path.exists('/proc/self/stat'):
      return ''
  try:  # where there is no /proc
    os.kill(pid, 0)
  except ProcessLookupError:
    return ''
  except PermissionError:
    pass
  return 'unknown'


def _life_of(path: epath.Path) -> Any:
  """Returns what every sign of life changes."""
  return (_read(path).get('token'), path.stat().mtime) if path.exists() else None


def _is_remote(path: epath.Path) -> bool:
  return '://' in str(path)


def _beat(path: epath.Path, own: dict[str, Any], ended: threading.Event, lost: list[str]):
  """Shows a sign of life until the job has ended; says in `lost` that another one has the lock."""
  while not ended.wait(BEAT_SECONDS):
    try:
      if (found := _read(path)) and found != own:
        lost.append(
          f'{path} is now of process {found["pid"]} of {found["host"]}, which had no sign of life '
          'of this one; it ends without another save: see that one job writes there.'
        )
        logging.error(lost[0])
        return
      if _is_remote(path):
        files.write(path, json.dumps(own))
      else:
        os.utime(path)
    except Exception as error:  # TensorFlow's are no OSError; the job meets it at its next save
      logging.warning('%s cannot be written (%s)', path, error)
