"""One line, now and then, that says how far a long job is and when it ends."""

import time

from absl import logging


class Progress:
  """Logs how many of equal parts are done, how fast, and how long the rest takes.

  The first call begins the measurement, for before it a program was compiled or files were opened.
  """

  def __init__(self, name: str, unit: str, every: float = 10.0):
    """Takes note of a job that begins now.

    Args:
      name: of the job; '' for the command's only one.
      unit: what the parts are, such as 'images'.
      every: seconds between lines.
    """
    self._name, self._unit = f'{name}: ' if name else '', unit
    self._every, self._begun = every, time.monotonic()
    self._due = self._begun + every
    self._said = False
    self._first: tuple[float, int] | None = None

  @property
  def seconds(self) -> float:
    """Returns how long the job has taken, in seconds."""
    return time.monotonic() - self._begun

  def __call__(self, done: int, total: int, note: str = ''):
    """Says that so many parts are done, if a line is due, or the last of a job with lines.

    Args:
      done: how many, those of earlier runs too.
      total: how many there are.
      note: of what is known so far, for the middle of the line.
    """
    now = time.monotonic()
    began, before = self._first = self._first or (now, done)
    if now < self._due and not (self._said and done == total):
      return
    self._due, self._said = now + self._every, True
    line = f'{self._name}{done:,} of {total:,} {self._unit}{note and f", {note}"}'
    if done > before and now > began:
      rate = (done - before) / (now - began)
      line += f', {rate:.3g} {self._unit}/s'
      line += f', {duration((total - done) / rate)} left' if done < total else ''
    logging.info('%s', line)


def duration(seconds: float) -> str:
  """Returns '0:42', '3:05' or '2:07:00', of hours, minutes and seconds."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'
