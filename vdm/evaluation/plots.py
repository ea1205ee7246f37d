"""Plots of an evaluation and of a run's history."""

import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from vdm import cards
from vdm.diffusion.noisy_elbo import Augmented
from vdm.system import files


def plot_bins(
  curves: dict[str, np.ndarray], ends: tuple[float, float], path: pathlib.Path, unit: str
):
  """Plots what is spent per unit of log-SNR, and in all from noise up to a log-SNR, in `unit`.

  There is one curve per set of parameters. Returns the picture.
  """
  figure, (left, right) = subplots(2, (10, 3.5))
  for name, bins in curves.items():
    edges = np.linspace(ends[1], ends[0], len(bins) + 1)
    left.stairs(bins, edges, label=name)
    spent = np.cumsum(filled(bins) * np.diff(edges))
    right.plot(edges, [0, *spent], label=f'{name}, {spent[-1]:.3f} in all')
  left.set(xlabel='log-SNR', ylabel=f'{unit} per unit of log-SNR', ylim=(0, None))
  right.set(xlabel='log-SNR', ylabel=f'{unit} spent, from noise', ylim=(0, None))
  right.legend()
  return save_figure(figure, path)


def filled(bins: np.ndarray) -> np.ndarray:
  """Returns the bins, with those that nothing fell into interpolated."""
  number, seen = np.arange(len(bins)), np.isfinite(bins)
  if not seen.any():
    return bins
  return np.interp(number, number[seen], bins[seen])


def plot_spectrum(frequency: np.ndarray, power: np.ndarray, levels: np.ndarray, path: pathlib.Path):
  """Plots the data's radial power spectrum, and the noise of z / alpha at some log-SNR levels.

  What lies above a level's line is visible in z there. Returns the picture.
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
  """Plots the grid of `pictures.picture_of`, with the log-SNR of each column and what each row is.

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


def plot_augmented(edges: np.ndarray, table: Augmented, title: str, path: pathlib.Path, unit: str):
  """Plots what a weighted loss bounds (`noisy_elbo`): the noise levels' weights, and their bounds.

  All are in `unit`. Returns the picture.
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
  right.set(xlabel='log-SNR of the noise added', ylabel=f'bound of the noisy data ({unit})')
  return save_figure(figure, path)


def plot_history(found: dict[str, list[dict]], path: pathlib.Path):
  """Plots likelihoods and Fréchet distances against steps, from series of cards (`cards.series`).

  Each series has a curve, with its errors and a star at its best; what all of them share is said
  above, the rest in the legend. Returns the picture.
  """
  bounds = {k: s for k, s in found.items() if cards.is_likelihood(s[0])}
  unit = ' and '.join(sorted({cards.UNITS[s[0]['metric']] for s in bounds.values()}))
  distances = {k: s for k, s in found.items() if cards.is_distance(s[0])}
  kinds = [(bounds, unit, 'linear'), (distances, 'Fréchet distance', 'log')]
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
  """Returns what the series are alike in, and what each is called among them, no two the same."""
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
  """Plots the schedule at equally spaced times, its density, and its effect on the loss's variance.

  The history is that of the averaged parameters, the longest among series of number cards
  (`cards.series`): the spread of the bound under the schedule of evaluation, which for an adaptive
  one is linear. Returns the picture.
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


def subplots(
  columns: int, size: tuple[float, float], rows: int = 1, **kwargs: Any
) -> tuple[Figure, Any]:
  """Returns a figure of `size` inches, and its axes: one, or an array [columns] or [rows columns].

  It does without pyplot, so importing this package does not change a notebook's backend.
  """
  figure = Figure(size, layout='constrained')
  FigureCanvasAgg(figure)
  return figure, figure.subplots(rows, columns, **kwargs)


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
