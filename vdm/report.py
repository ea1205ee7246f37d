"""What a person sees of a run: log, the progress line, plots."""

import contextlib
import csv
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import logging
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from vdm import cards, files
from vdm.augmented import Augmented
from vdm.losses import coefficients_of_variation
from vdm.writers import MetricWriter

console = Console(stderr=True)


def _ours_or_serious(record) -> bool:
  """Of other packages' messages only warnings: Orbax alone has some thirty lines a save."""
  ours = any(f'{os.sep}{name}{os.sep}' in record.pathname for name in ('vdm', 'clu'))
  return ours or record.levelno >= logging.converter.STANDARD_WARNING


class _PlainFormatter(logging.PythonFormatter):
  def format(self, record):
    level = '' if record.levelname == 'INFO' else f'{record.levelname} '
    return f'{time.strftime("%H:%M:%S")} {level}{record.getMessage()}'


def set_up_logging():
  """Time and message, a line each; on a terminal they scroll above the progress line."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  logger, handler = logging.get_absl_logger(), logging.get_absl_handler()
  if console.is_terminal:
    handler = RichHandler(
      console=console,
      show_path=False,
      show_level=False,
      log_time_format='%H:%M:%S',
      highlighter=NullHighlighter(),
    )
    logger.handlers, logger.propagate = [handler], False
  else:
    handler.setFormatter(_PlainFormatter())
  handler.addFilter(_ours_or_serious)


def plot_bins(curves: dict[str, np.ndarray], ends: tuple[float, float], path: pathlib.Path):
  """Bits/dim per unit of log-SNR, and all of them spent from noise up to a log-SNR.

  One curve a set of parameters; returns the picture.
  """
  figure, (left, right) = subplots(2, (10, 3.5))
  for name, bins in curves.items():
    edges = np.linspace(ends[1], ends[0], len(bins) + 1)
    left.stairs(bins, edges, label=name)
    spent = np.cumsum(filled(bins) * np.diff(edges))
    right.plot(edges, [0, *spent], label=f'{name}, {spent[-1]:.3f} in all')
  left.set(xlabel='log-SNR', ylabel='bits/dim per unit of log-SNR', ylim=(0, None))
  right.set(xlabel='log-SNR', ylabel='bits/dim spent, from noise', ylim=(0, None))
  right.legend()
  return save_figure(figure, path)


def filled(bins: np.ndarray) -> np.ndarray:
  """Bins with those that nothing fell into interpolated."""
  number, seen = np.arange(len(bins)), np.isfinite(bins)
  return np.interp(number, number[seen], bins[seen])


def plot_spectrum(frequency: np.ndarray, power: np.ndarray, levels: np.ndarray, path: pathlib.Path):
  """The data's radial power spectrum, and the noise of z / alpha at some log-SNR levels.

  What lies above a level's line is visible in z there.
  """
  figure, axes = subplots(1, (6, 4.5))
  colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(levels)))
  for level, colour in zip(levels, colours, strict=True):
    axes.axhline(np.exp(-level), color=colour, linestyle=':')
    right = axes.get_yaxis_transform()
    axes.text(1, np.exp(-level), f' {level:.1f}', color=colour, va='center', transform=right)
  axes.loglog(frequency, power, 'k', label='data')
  axes.set(xlabel='cycles per pixel', ylabel='power (of noise: at the right, by log-SNR)')
  axes.legend()
  return save_figure(figure, path)


def plot_progressive(picture: np.ndarray, levels: np.ndarray, num_images: int, path: pathlib.Path):
  """The grid of `progressive.picture_of`, with the log-SNR of each column and what each row is.

  Returns the picture.
  """
  height, width = picture.shape[:2]
  figure, axes = subplots(1, (8, 8 * height / width + 0.6))
  axes.imshow(picture if picture.shape[2] == 3 else picture[..., 0], 'gray', vmin=0, vmax=255)
  centres = lambda count, size: (np.arange(count) + 0.5) * size / count - 0.5
  axes.set_xticks(centres(len(levels), width), [f'{level:.1f}' for level in levels])
  axes.set_yticks(centres(2 * num_images, height), ['z', 'x_hat'] * num_images)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_xlabel('log-SNR of z, from data to noise')
  return save_figure(figure, path)


def plot_augmented(edges: np.ndarray, table: Augmented, title: str, path: pathlib.Path):
  """What a weighted loss bounds (`vdm.augmented`): the noise levels' weights, and their bounds.

  All in bits/dim; returns the picture.
  """
  figure, (left, right) = subplots(2, (10, 3.5))
  density = table.mass / table.total / np.diff(edges)
  if np.abs(density).max() < 1e-6:  # the bound itself: what is left is rounding
    left.set_ylim(-0.1, 1)
    density = 0 * density
  left.stairs(density, edges, label='noise added, density')
  left.axhline(0, color='k', linewidth=0.5)
  left.plot(edges[-1], 0, 'o', label=f'data as it is: {table.atom / table.total:.3g}')
  left.set(xlabel='log-SNR', ylabel='share of the weight', title=title)
  left.legend()
  right.plot(edges, table.losses)
  right.set(xlabel='log-SNR of the noise added', ylabel='bound of the noisy data (bits/dim)')
  return save_figure(figure, path)


def write_table(path: pathlib.Path, header: tuple[str, ...], rows: Iterable[tuple]):
  """Writes a CSV file."""
  text = io.StringIO(newline='')
  csv.writer(text).writerows([header, *rows])
  files.write(path, text.getvalue())


def plot_history(found: dict[str, list[dict]], path: pathlib.Path):
  """Bits/dim and Fréchet distances against steps, from series of number cards (`cards.series`).

  A curve for each series, with its errors and a star at its best; what all of them share is said
  above, the rest in the legend. Returns the picture.
  """
  bits = {k: s for k, s in found.items() if s[0]['metric'] == 'bits_per_dim'}
  distances = {k: s for k, s in found.items() if cards.is_distance(s[0])}
  kinds = [(bits, 'bits/dim', 'linear'), (distances, 'Fréchet distance', 'log')]
  kinds = kinds if distances else kinds[:1]
  figure, panels = subplots(len(kinds), (6 * len(kinds), 3.5))
  for axes, (chosen, label, scale) in zip(np.atleast_1d(panels), kinds, strict=True):
    shared, labels = _labels(chosen)
    for name, series in chosen.items():
      steps, values = ([card[k] for card in series] for k in ('step', 'value'))
      errors = [0.0 if 'stderr' not in c or c['stderr'] is None else c['stderr'] for c in series]
      bars = axes.errorbar(steps, values, errors, marker='.', label=labels[name])
      best = cards.best(series)
      axes.plot(best['step'], best['value'], '*', color=bars[0].get_color(), markersize=10)
    axes.set(xlabel='steps (star: the best)', ylabel=label, yscale=scale)
    if scale == 'log':
      plain_numbers(axes.yaxis)
    axes.set_title(shared, fontsize='small')
    if any(labels.values()):  # of several
      axes.legend(fontsize='small')
  return save_figure(figure, path)


def _labels(found: dict[str, list[dict]]) -> tuple[str, dict[str, str]]:
  """What the series are alike in, and what each is called among them: no two the same."""
  parts = {name: cards.description(series[0]) for name, series in found.items()}
  columns = list(zip(*parts.values(), strict=True))
  varies = [len(set(column)) > 1 for column in columns]
  labels = {
    name: ', '.join(part for part, own in zip(row, varies, strict=True) if own)
    for name, row in parts.items()
  }
  names = list(labels.values())
  hashes = {name: name.rpartition('_')[2] for name in labels}
  labels = {
    name: f'{label} {hashes[name]}'.strip() if names.count(label) > 1 else label
    for name, label in labels.items()
  }
  shared = ', '.join(column[0] for column, own in zip(columns, varies, strict=True) if not own)
  return shared, labels


def plot_schedule(found: dict[str, list[dict]], log_snr: np.ndarray, path: pathlib.Path):
  """The schedule at equally spaced times, its density, and what it does to the loss's variance.

  The history is that of the averaged parameters, the longest among series of number cards
  (`cards.series`): the spread of the bound under the schedule of evaluation, which for an adaptive
  one is linear.
  """
  figure, (left, middle, right) = subplots(3, (12, 3.5))
  t = np.linspace(0, 1, len(log_snr))
  left.plot(t, log_snr, label='now')
  left.plot(t[[0, -1]], log_snr[[0, -1]], 'k:', label='linear')
  left.set(xlabel='t', ylabel='log-SNR')
  left.legend()
  middle.stairs((-np.diff(t) / np.diff(log_snr))[::-1], log_snr[::-1])  # edges must rise
  middle.axhline(1 / (log_snr[0] - log_snr[-1]), color='k', linestyle=':')
  middle.set(xlabel='log-SNR', ylabel='density of training times', ylim=(0, None))
  bounds = [s for s in found.values() if cards.is_bound(s[0]) and s[0]['params'] == 'ema']
  series = max(bounds, key=len, default=[])
  steps = [card['step'] for card in series]
  right.plot(steps, [card['diffusion_cv'] for card in series], '.-', label='as evaluated')
  right.plot(steps, [card['diffusion_cv_linear'] for card in series], 'k.:', label='linear')
  right.set(xlabel='steps', ylabel='std / mean of the diffusion loss')
  right.margins(y=0.2)
  right.set_ylim(0)
  right.legend()
  return save_figure(figure, path)


def read_scalars(directory: pathlib.Path, tag: str) -> dict[int, float]:
  """{step: value} of a scalar in TensorBoard files."""
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  events = EventAccumulator(str(directory), size_guidance={'tensors': 0})
  events.Reload()
  return {e.step: float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}


def load_json(path: pathlib.Path) -> Any:
  """The content of a JSON file."""
  return json.loads(path.read_text())


def subplots(columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
  """Returns a figure of `size` inches, and its axes: one, or an array [columns].

  Without pyplot: importing this package does not change the backend that a notebook draws with.
  """
  figure = Figure(size, layout='constrained')
  FigureCanvasAgg(figure)
  return figure, figure.subplots(1, columns)


def plain_numbers(axis: Axis):
  """Labels a logarithmic axis with plain numbers, within a decade its minor ticks too."""
  low, high = axis.get_view_interval()
  plain = StrMethodFormatter('{x:g}')
  axis.set_major_formatter(plain)
  axis.set_minor_formatter(plain if high < 10 * low else NullFormatter())


def save_figure(figure: Figure, path: pathlib.Path) -> np.ndarray:
  """Writes the figure as PNG and returns it as an image uint8 [H W 3]."""
  files.write(path, files.content(lambda file: figure.savefig(file, format='png', dpi=120)))
  return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


class Meter:
  """Averages of the steps' metrics, written every `every` steps, and the progress line.

  A step's metrics are fetched when the next one has been dispatched, so no device waits for them.
  `data_wait` is the share of this host's time in which it was blocked in next(batches): devices
  compute meanwhile, and stand still for want of data only where it nears 1.
  """

  def __init__(self, writer: MetricWriter, every: int, batch_size: int, start: int, total: int):
    self._writer, self._every, self._batch_size = writer, every, batch_size
    self._start, self._total = start, total
    self._pending, self._window, self._bins = None, [], []
    self._begin = self._clock = None  # set after the first step, which compiles
    self._waited = 0.0  # seconds since self._clock
    columns = (
      TextColumn('{task.description}'),
      BarColumn(),
      TaskProgressColumn(),
      TextColumn('{task.fields[status]}'),
    )
    self._line = Progress(*columns, console=console, disable=not _shown(), transient=True)
    self._task = self._line.add_task('compiling', total=total, completed=start, status='')
    self._line.start()

  def waits_for(self, batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; the time that each next() takes counts as waiting for data."""
    start = time.monotonic()
    for batch in batches:
      self._waited += time.monotonic() - start
      yield batch
      start = time.monotonic()

  def push(self, step: int, metrics: Any, fetch: Callable[[Any], dict]):
    """Takes the metrics of `step`, still being computed, and reads those of the step before."""
    self.drain()
    self._pending = (step, metrics, fetch)

  def drain(self):
    """Reads the metrics of the last step pushed; FloatingPointError where one is not finite."""
    if self._pending is None:
      return
    step, metrics, fetch = self._pending
    self._pending = None
    metrics = fetch(metrics)
    for name in ('recon_bpd', 'prior_bpd', 'diffusion_bpd', 'loss', 'grad_norm'):
      if not np.isfinite(metrics[name]):
        raise FloatingPointError(f'step {step}: {name} is {metrics[name]}')
    now = time.monotonic()
    if self._begin is None:
      self._begin, self._clock, self._waited = now, now, 0.0
      self._start = self._clock_step = step
    self._bins.append(metrics.pop('bins'))
    self._window.append(metrics)
    left = (now - self._begin) / max(1, step - self._start) * (self._total - step)
    bits = metrics['bits_per_dim']
    status = f'{bits:.3f} bits/dim, {self._rate(step, now):.0f} images/s, {_duration(left)} left'
    self._line.update(self._task, description=f'step {step}', completed=step, status=status)
    if step % self._every == 0:
      self._write(step, now, left)

  @contextlib.contextmanager
  def pause(self):
    """Reads what is pending; what happens inside does not count as time of the steps."""
    self.drain()
    start = time.monotonic()
    self._line.update(self._task, status='evaluating or saving')
    yield
    self._clock += time.monotonic() - start

  def close(self):
    """Takes the progress line away."""
    self._line.stop()

  def _rate(self, step: int, now: float) -> float:
    """Images per second since the last write."""
    return (step - self._clock_step) * self._batch_size / max(now - self._clock, 1e-9)

  def _write(self, step: int, now: float, left: float):
    means = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *self._window)
    _, square, square_linear = moments = means.pop('moments')
    cv = coefficients_of_variation(moments)
    means |= dict(zip(('diffusion_cv', 'diffusion_cv_linear'), cv, strict=True))
    means['square_reduction'] = square / square_linear
    scalars = {f'train/{k}': float(v) for k, v in means.items()}
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
      speed = f', {rate:.4g} images/s ({wait:.0%} of the time without data), {_duration(left)} left'
    logging.info(
      'step %d: %.4f bits/dim, loss %.4g%s',
      step,
      scalars['train/bits_per_dim'],
      scalars['train/loss'],
      speed,
    )
    self._window, self._clock, self._clock_step, self._waited = [], now, step, 0.0

  def take_bins(self) -> np.ndarray:
    """Bits/dim per unit of log-SNR in each bin since the last call; nan where no example fell."""
    sums, counts = (sum(bins[k] for bins in self._bins) for k in ('sum', 'count'))
    self._bins = []
    with np.errstate(invalid='ignore'):
      return np.divide(sums, counts)


def _shown() -> bool:
  return console.is_terminal and jax.process_index() == 0


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'
