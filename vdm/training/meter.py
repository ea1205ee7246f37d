"""Averages of the steps' metrics, their lines in the log, and the progress line."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from rich.progress import (
  BarColumn,
  Progress,
  TaskProgressColumn,
  TextColumn,
  TimeElapsedColumn,
)

from vdm.diffusion.elbo import coefficients_of_variation
from vdm.system.logs import console
from vdm.system.progress import duration
from vdm.system.writers import MetricWriter
from vdm.training.step import StepMetrics

TERMS = ('recon', 'prior', 'diffusion')  # of the bound
MUCH_WAIT = 0.2  # the share of time in want of data from which on the log says it


class Meter:
  """Averages the steps' metrics, writes them every `every` steps, and shows the progress line.

  A step's metrics are fetched when the next one has been dispatched, so no device waits for them.
  `data_wait` is the share of this host's time in which it was blocked in next(batches): devices
  compute meanwhile, and stand still for want of data only where it nears 1.
  """

  def __init__(
    self,
    writer: MetricWriter,
    every: int,
    batch_size: int,
    start: int,
    total: int,
    most_skipped: int = 0,
    unit: str = 'bits/dim',
    suffix: str = 'bpd',
  ):
    """Starts the progress line.

    Args:
      writer: of the averages.
      every: steps between two of them.
      batch_size: images per step.
      start: the step that the run goes on from.
      total: steps of the run.
      most_skipped: steps without an update that may follow each other.
      unit: of the likelihood per dimension.
      suffix: of the names of its terms (`Decoder.suffix`).
    """
    self._suffix = suffix
    self._unit, self._metric = unit, unit.replace('/', '_per_')
    self._writer, self._every, self._batch_size = writer, every, batch_size
    self._most_skipped, self._skipped = most_skipped, 0
    self._start, self._total = start, total
    self._pending, self._window, self._bins = None, [], []
    self._begin = self._clock = None  # set after the first step, which compiles
    self._opened = time.monotonic()  # set before it
    self._waited = 0.0  # seconds since self._clock
    self._pauses: list[float] = []  # seconds of each, since self._begin
    columns = (
      TextColumn('{task.description}'),
      BarColumn(),
      TaskProgressColumn(),
      TextColumn('{task.fields[status]}'),
      TimeElapsedColumn(),  # it goes on while something compiles
    )
    self._line = Progress(*columns, console=console, disable=not _shown(), transient=True)
    self._task = self._line.add_task('compiling', total=total, completed=start, status='')
    self._line.start()

  def waits_for(self, batches: Iterator[Any]) -> Iterator[Any]:
    """Yields the same batches; the time that each next() takes counts as waiting for data."""
    start = self._opened = time.monotonic()
    logging.info('compiling the train step')
    for batch in batches:
      self._waited += time.monotonic() - start
      yield batch
      start = time.monotonic()

  def push(self, step: int, metrics: StepMetrics, fetch: Callable[[StepMetrics], StepMetrics]):
    """Takes the metrics of `step`, still being computed, and reads those of the step before."""
    self.drain()
    self._pending = (step, metrics, fetch)

  def drain(self):
    """Reads the last step's metrics; raises FloatingPointError if one of them is not finite."""
    if self._pending is None:
      return
    step, metrics, fetch = self._pending
    self._pending = None
    metrics = fetch(metrics)
    if self._is_skipped(step, metrics.scalars):
      return
    now = time.monotonic()
    if self._begin is None:
      self._begin, self._clock, self._waited = now, now, 0.0
      self._start = self._clock_step = step
      logging.info('compiled: step %d is done after %.0f s', step, now - self._opened)
    self._bins.append(metrics.bins)
    self._window.append(metrics)
    begin = self._begin
    if self._pauses:  # the first evaluation compiled: the next ones will be like the last
      begin += max(0.0, self._pauses[0] - self._pauses[-1])
    left = (now - begin) / max(1, step - self._start) * (self._total - step)
    value = f'{metrics.scalars[self._metric]:.3f} {self._unit}'
    status = f'{value}, {self._rate(step, now):.0f} images/s, {duration(left)} left'
    self._line.update(self._task, description=f'step {step}', completed=step, status=status)
    if step % self._every == 0:
      self._write(step, now, left)

  def _is_skipped(self, step: int, scalars: dict[str, Any]) -> bool:
    """Returns whether the step made no update because a term was not finite.

    Raises:
      FloatingPointError: a term is not finite, and too many steps before were skipped.
    """
    names = [f'{term}_{self._suffix}' for term in TERMS] + ['loss', 'grad_norm']
    wrong = [name for name in names if not np.isfinite(scalars[name])]
    self._skipped = self._skipped + 1 if wrong else 0
    if not wrong:
      return False
    says = f'step {step}: {wrong[0]} is {scalars[wrong[0]]}'
    if self._skipped > self._most_skipped:
      raise FloatingPointError(says + (f', {self._skipped} in a row' if self._most_skipped else ''))
    logging.warning('%s; the step is skipped, %d in a row', says, self._skipped)
    self._writer.write_scalars(step, {'train/skipped_in_a_row': float(self._skipped)})
    return True

  @contextlib.contextmanager
  def pause(self):
    """Reads what is pending; what happens inside does not count as time of the steps."""
    self.drain()
    start = time.monotonic()
    self._line.update(self._task, status='evaluating or saving')
    yield
    if self._clock is not None:  # a step has counted
      self._pauses.append(time.monotonic() - start)
      self._clock += self._pauses[-1]

  def close(self):
    """Takes the progress line away."""
    self._line.stop()

  def _rate(self, step: int, now: float) -> float:
    """Returns images per second since the last write."""
    return (step - self._clock_step) * self._batch_size / max(now - self._clock, 1e-9)

  def _write(self, step: int, now: float, left: float):
    means = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *self._window)
    _, square, square_linear = means.moments
    cv, cv_linear = coefficients_of_variation(means.moments)
    values = means.scalars | {'diffusion_cv': cv, 'diffusion_cv_linear': cv_linear}
    values['square_reduction'] = square / square_linear
    scalars = {f'train/{k}': float(v) for k, v in values.items()}
    if step > self._start:  # the first was not timed: it was compiled
      scalars |= {
        'train/images_per_second': self._rate(step, now),
        'train/data_wait': self._waited / max(now - self._clock, 1e-9),
        'train/minutes_left': left / 60,
      }
    self._writer.write_scalars(step, scalars)
    speed = ''
    if step > self._start:
      rate, wait = scalars['train/images_per_second'], scalars['train/data_wait']
      waits = f', {wait:.0%} of the time waiting for data' if wait > MUCH_WAIT else ''
      speed = f', {rate:.3g} images/s{waits}, {duration(left)} left'
    value = scalars[f'train/{self._metric}']
    logging.info('step %d: %.3f %s in training%s', step, value, self._unit, speed)
    self._window, self._clock, self._clock_step, self._waited = [], now, step, 0.0

  def take_bins(self) -> np.ndarray | None:
    """Returns what is spent per unit of log-SNR by bin since the last call; nan where none fell.

    None if there was no step.
    """
    if not self._bins:
      return None
    spent, width = (sum(bins[k] for bins in self._bins) for k in ('spent', 'width'))
    self._bins = []
    with np.errstate(invalid='ignore'):
      return np.divide(spent, width)


def _shown() -> bool:
  return console.is_terminal and jax.process_index() == 0
