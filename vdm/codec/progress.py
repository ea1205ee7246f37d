"""One line that says how far a long job is."""

import sys
import time


class Progress:
  """Writes a line to stderr: over itself on a terminal, else every ten seconds and at the end."""

  def __init__(self, name: str, seconds: float = 10.0):
    """Begins at zero.

    Args:
      name: of the job.
      seconds: between lines that are not written over themselves.
    """
    self._name, self._start = name, time.monotonic()
    self._over = sys.stderr.isatty()
    self._every = 0.2 if self._over else seconds
    self._next, self._first = self._start + self._every, (self._start, 0)

  @property
  def seconds(self) -> float:
    """Returns how long it has taken."""
    return time.monotonic() - self._start

  def __call__(self, done: int, total: int):
    """Says that `done` of `total` equal parts are done."""
    now = time.monotonic()
    if not self._first[1]:
      self._first = now, done  # before it the program was compiled
    if now < self._next and done < total:
      return
    self._next = now + self._every
    line = f'{self._name}: {100 * done // total} %, {spoken(now - self._start)}'
    if self._first[1] < done < total:
      left = (now - self._first[0]) * (total - done) / (done - self._first[1])
      line += f', {spoken(left)} left'
    end = '' if self._over and done < total else '\n'
    print(f'\r\x1b[K{line}' if self._over else line, end=end, file=sys.stderr, flush=True)


def spoken(seconds: float) -> str:
  """Returns '42 s', '3 min 5 s' or '2 h 7 min'."""
  whole = round(seconds)
  if whole < 60:
    return f'{whole} s'
  if whole < 3600:
    return f'{whole // 60} min {whole % 60} s'
  return f'{whole // 3600} h {whole % 3600 // 60} min'
