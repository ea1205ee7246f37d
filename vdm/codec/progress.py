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
    self._next = self._start + self._every

  @property
  def seconds(self) -> float:
    """Returns how long it has taken."""
    return time.monotonic() - self._start

  def __call__(self, done: int, total: int, what: str = ''):
    """Says that `done` of `total` equal parts are done, and `what` else."""
    now = time.monotonic()
    if now < self._next and done < total:
      return
    self._next = now + self._every
    left = (now - self._start) * (total - done) / max(done, 1)
    line = f'{self._name}: {100 * done // total} %{what}, {spoken(now - self._start)}'
    line += f', {spoken(left)} left' if done < total else ''
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
