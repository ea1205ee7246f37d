"""How SIGTERM, SIGHUP and Ctrl-C end a process: at once, or when nothing would be lost.

A signal that comes while there is nothing to lose ends the process with EXIT_PREEMPTED. Training
defers it from its first step on: the loop asks `agreed` after every step, saves, and ends with the
same status. What comes after the first signal changes nothing, as schedulers send several; only a
Ctrl-C some seconds after another one acts at once.

In a job of several processes JAX tells all of them of a SIGTERM to one. Other signals become that.
A handler asks JAX nothing: the lock that it would wait for may be held by what it has interrupted.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator

EXIT_PREEMPTED = 75  # not done, and nothing lost: run the same command again
EXIT_INTERRUPTED = 130  # a second Ctrl-C
PATIENCE = 2.0  # seconds after which a second Ctrl-C is meant as one
# What Python prints, in the middle of nowhere, of TensorStore behind a save that failed, and of a
# signal that came while signals were about to be ignored.
HARMLESS = ('Event loop is closed', 'ignored due to race condition')


class Stopped(SystemExit):
  """Ends the process with EXIT_PREEMPTED wherever it is raised."""


class Stop:
  """Whether this process was asked to end. There is one per process: `stop`."""

  def __init__(self):
    self._reset()
    self._handlers = {}
    self._owns_process = False
    self._several = False  # whether JAX has joined this process to others

  def _reset(self):
    self.name = ''  # of the first signal
    self._deferred = False
    self._joining = False  # whether other processes are waited for, which know nothing of this one
    self._saves = False  # whether what is raised is caught, to save
    self._interrupted = 0.0  # the time of the first Ctrl-C
    self._calls = 0
    self._reached = False

  def listen(self):
    """Takes the signals over for good; what `nohup` has the process ignore stays ignored."""
    self._listen()
    self._owns_process = True

  def joined(self):
    """Notes whether JAX has joined this process to others, once it may have.

    JAX takes SIGTERM over where it joins a job, to tell all processes. Where there is one it is
    taken back: nobody is to be told, and nobody asks JAX.
    """
    self._several = _is_one_of_several()
    if self._handlers and not self._several:
      signal.signal(signal.SIGTERM, self._note)

  def _listen(self):
    self._several = _is_one_of_several()
    if self._handlers or threading.current_thread() is not threading.main_thread():
      return
    self._reset()
    hangup = [s for s in signal.Signals if s.name == 'SIGHUP']  # which Windows lacks
    kept = [s for s in hangup if signal.getsignal(s) != signal.SIG_IGN]
    ours = [] if self._several else [signal.SIGTERM]  # of several it is JAX's, which tells all
    numbers = (*ours, signal.SIGINT, *kept)
    self._handlers = {number: signal.signal(number, self._note) for number in numbers}
    sys.unraisablehook = self._swallowed

  @contextlib.contextmanager
  def listening(self) -> Iterator['Stop']:
    """Takes the signals over and gives them back at the end, unless the process has done so."""
    ours = not self._handlers
    self._listen()
    try:
      yield self
    finally:
      self._deferred = False
      if ours:
        for number, handler in self._handlers.items():
          signal.signal(number, handler)
        self._handlers, sys.unraisablehook = {}, sys.__unraisablehook__

  def defer(self):
    """Has signals only noted from now on, as there is something to lose."""
    self._deferred = True

  @contextlib.contextmanager
  def raising(self) -> Iterator[None]:
    """Raises `Stopped` where a signal comes inside, or has come before.

    Not in a job of several processes, of which one cannot leave alone.
    """
    if self._several:
      yield
      return
    deferred, self._deferred, self._saves = self._deferred, False, True
    try:
      if self.name:
        raise Stopped(EXIT_PREEMPTED)
      yield
    finally:
      self._deferred, self._saves = deferred, False

  @contextlib.contextmanager
  def joining(self) -> Iterator[None]:
    """Has a signal inside end the process at once: the job that it joins has not begun."""
    self._joining = True
    try:
      yield
    finally:
      self._joining = False

  def agreed(self) -> bool:
    """Returns whether to stop here; to be called as often on every process, and as often true."""
    if not self._several:
      return bool(self.name)
    from jax.experimental import multihost_utils

    self._calls += 1  # what JAX agrees on is a number of calls, from 1 on in every process
    # it is true of one call, on all processes; a grid asks on, in the run that comes after
    self._reached |= multihost_utils.reached_preemption_sync_point(self._calls)
    if self._reached:
      self.name = self.name or 'SIGTERM to one of the processes'
    return self._reached

  def close(self):
    """Has further signals ignored: all is written, and the process ends by itself."""
    self.name = self.name or 'the end'
    self._ignore()

  def _ignore(self):
    """Has the system ignore the signals: Python itself forgets handlers as it ends."""
    for number in self._handlers:
      signal.signal(number, signal.SIG_IGN)

  def _swallowed(self, what):
    """Ends the process where a callback of a library has swallowed `Stopped`.

    It does not where `Stopped` was to be caught to save: the run then stops at its next step.
    """
    if what.exc_type is not Stopped:
      if not any(text in str(what.exc_value) for text in HARMLESS):
        sys.__unraisablehook__(what)
    elif self._owns_process and not self._deferred and not self._saves:
      os._exit(EXIT_PREEMPTED)

  def _note(self, number, frame):
    name, now = signal.Signals(number).name, time.monotonic()
    if number == signal.SIGINT:
      if self._interrupted and now - self._interrupted > PATIENCE:
        _say('Ctrl-C again: ended at once, without what was not saved yet.')
        os._exit(EXIT_INTERRUPTED)
      self._interrupted = self._interrupted or now
    if self._joining:
      _say(f'{name}: stopped before the job began; the same command goes on.')
      os._exit(EXIT_PREEMPTED)
    if self._several and number != signal.SIGTERM:
      os.kill(os.getpid(), signal.SIGTERM)  # which JAX handles, and tells all processes
      return
    if self.name:
      return
    self.name = name
    importing = _is_importing(frame)  # C++ modules abort the process where their import raises
    if self._deferred or (importing and self._saves):
      _say(f'{name}: to be saved after this step.')
      return
    _say(f'{name}: stopped; the same command goes on.')
    # or where leaving would wait for the others
    if (importing and self._owns_process) or self._several:
      os._exit(EXIT_PREEMPTED)
    self._ignore()
    raise Stopped(EXIT_PREEMPTED)


def _is_importing(frame: types.FrameType | None) -> bool:
  """Returns whether the frame is part of an import."""
  while frame is not None:
    if frame.f_globals.get('__name__') == 'importlib._bootstrap':
      return True
    frame = frame.f_back
  return False


def _is_one_of_several() -> bool:
  """Returns whether JAX has joined this process to others; while it is imported, it has not."""
  distributed = getattr(sys.modules.get('jax'), 'distributed', None)
  if distributed is None or not distributed.is_initialized():
    return False
  return sys.modules['jax'].process_count() > 1


def _say(text: str):
  """Writes a line to standard error, also where a handler has interrupted another write."""
  os.write(2, f'{text}\n'.encode())


stop = Stop()
