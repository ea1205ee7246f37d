"""Plots of continuous fields on 1, 2 or 3 axes, [N *spatial C] in data units.

Each writes a PNG and returns the picture, uint8 [H W 3].
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from vdm import style
from vdm.evaluation import fields

COLOURS = {'data': style.DATA, 'samples': style.BLUE}
CELL = 1.5  # inches, the longer side of a field


@style.paper
def plot_power(
  table: dict[str, np.ndarray], path: pathlib.Path, names: tuple[str, ...] = ()
) -> np.ndarray:
  """Plots mean power spectra with their 16-84 % bands over examples, and below them the ratio.

  The ratio has its standard error as its band. There is one column per channel.

  Args:
    table: of `fields.compare_power`.
    path: of the PNG.
    names: of the channels.
  """
  names = _names(names, table['power_data'])
  ratios = {'height_ratios': (2, 1), 'sharex': 'col', 'squeeze': False}
  figure, rows = style.figure(len(names), (3.4 * len(names) + 0.8, 4.2), 2, **ratios)
  frequency = table['frequency']
  for channel, (above, below) in enumerate(rows.T):
    for name in ('data', 'samples'):
      low, high = (table[f'power_{name}_{end}'][:, channel] for end in ('low', 'high'))
      above.fill_between(frequency, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
      mean = table[f'power_{name}'][:, channel]
      above.plot(frequency, mean, _line(name), color=COLOURS[name], label=name)
    above.set(xscale='log', yscale='log', title=names[channel])
    ratio, error = (table[f'power_ratio{end}'][:, channel] for end in ('', '_stderr'))
    below.fill_between(
      frequency, ratio - error, ratio + error, color=style.BLUE, alpha=0.3, linewidth=0
    )
    below.plot(frequency, ratio, '-', color=style.BLUE)
    below.axhline(1, color=style.DATA, linewidth=0.8)
    _frequencies(below)
  rows[0, 0].set_ylabel('power (data units²)')
  rows[0, 0].legend(title='line: mean; band: 16–84 % of fields', alignment='left')
  rows[1, 0].set_ylabel('samples / data\n(band: ± std. error)')
  figure.align_ylabels(rows[:, 0])
  return style.save(figure, path)


@style.paper
def plot_cross_correlation(
  predictions: dict[str, np.ndarray], truth: np.ndarray, path: pathlib.Path, periodic: bool = True
) -> np.ndarray:
  """Plots the cross-correlation with the truth, its mean and 16-84 % band over examples.

  Channels are averaged within an example.

  Args:
    predictions: name -> [N *spatial C], such as one sample each and the mean of many.
    truth: [N *spatial C].
    path: of the PNG.
    periodic: whether opposite borders meet.
  """
  figure, axes = style.figure(1, (4.6, 3.2))
  for name, u in predictions.items():
    frequency, r = fields.cross_correlation(u, truth, periodic)
    r = r.mean(axis=2)
    (line,) = axes.plot(frequency, r.mean(axis=0), label=name)
    low, high = np.percentile(r, fields.BAND, axis=0)
    axes.fill_between(frequency, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
  axes.axhline(0, color=style.DATA, linewidth=0.8)
  axes.set(xscale='log', ylabel='cross-correlation with the truth')
  axes.set_ylim(top=1.02)
  _frequencies(axes)
  axes.legend(title='line: mean; band: 16–84 % of fields', alignment='left')
  return style.save(figure, path)


@style.paper
def plot_histogram(
  samples: np.ndarray, data: np.ndarray, path: pathlib.Path, names: tuple[str, ...] = ()
) -> np.ndarray:
  """Plots the density of pixels on a logarithmic scale, of samples and of data.

  Args:
    samples: [N *spatial C].
    data: [M *spatial C].
    path: of the PNG.
    names: of the channels.
  """
  table, names = fields.compare_values(samples, data), _names(names, data)
  figure, panels = style.figure(len(names), (3.4 * len(names) + 0.8, 3.0), squeeze=False)
  for channel, axes in enumerate(panels[0]):
    edges, *both = (table[k][:, channel] for k in ('edges', 'density_data', 'density_samples'))
    axes.stairs(both[0], edges, fill=True, color=style.PALE, label='data')
    axes.stairs(both[1], edges, color=style.BLUE, linewidth=1.5, label='samples')
    axes.set(yscale='log', xlabel='value (data units)', title=names[channel])
  panels[0, 0].set_ylabel('density (per data unit)')
  panels[0, 0].legend(frameon=True, framealpha=0.9, edgecolor='none')  # it may lie on the data
  return style.save(figure, path)


def plot_slices(u: np.ndarray, path: pathlib.Path, names: tuple[str, ...] = ()) -> np.ndarray:
  """Plots fields: lines in 1-D, images in 2-D, middle slices along each axis in 3-D.

  A column is a channel in 1-D, a field in 2-D and an axis in 3-D. A channel has one colour map and
  bar: diverging around 0 where values have both signs, else sequential, over all but the outer
  hundredth of the values.

  Args:
    u: a few fields, [N *spatial C].
    path: of the PNG.
    names: of the channels.
  """
  names = _names(names, u)
  if u.ndim == 3:
    return _lines(u, names, path)
  scales = [_scale(u[..., channel]) for channel in range(len(names))]
  if u.ndim == 4:
    rows = [[('', field, c) for field in u[..., c]] for c in range(len(names))]
    return _pictures(rows, names, scales, 'right', path)
  middle = [size // 2 for size in u.shape[1:4]]
  rows = [
    [(f'axis {i + 1} at {at}', field.take(at, i), c) for i, at in enumerate(middle)]
    for c in range(len(names))
    for field in u[..., c]
  ]
  return _pictures(rows, [name for name in names for _ in u], scales, 'right', path)


def plot_rows(
  condition: np.ndarray,
  samples: np.ndarray,
  truth: np.ndarray,
  path: pathlib.Path,
  channel: int = 0,
) -> np.ndarray:
  """Plots one example per row: its condition, some samples, the mean of all of them, the truth.

  Of 3-D fields it shows the middle slice along the first axis. The colours' limits are those of the
  truth, and of the condition for itself.

  Args:
    condition: [N *spatial' C'], of any resolution; its first channel is shown.
    samples: [S N *spatial C]; the mean is that of all, and the first three are shown.
    truth: [N *spatial C].
    path: of the PNG.
    channel: which is shown, of samples and truth.
  """
  shown = {'condition': condition[..., 0]}
  shown |= {f'sample {i + 1}': samples[i, ..., channel] for i in range(min(3, len(samples)))}
  shown[f'mean of {len(samples)}'] = samples[..., channel].mean(axis=0)
  shown['truth'] = truth[..., channel]
  if truth.ndim == 3:
    return _line_rows(shown, path)
  if truth.ndim == 5:
    shown = {name: u[:, u.shape[1] // 2] for name, u in shown.items()}
  scales = [_scale(u) for u in (shown['condition'], truth[..., channel])]
  rows = [
    [(name, u[n], int(name != 'condition')) for name, u in shown.items()] for n in range(len(truth))
  ]
  return _pictures(rows, [''] * len(rows), scales, 'bottom', path)


@style.paper
def _lines(u: np.ndarray, names: tuple[str, ...], path: pathlib.Path) -> np.ndarray:
  """Plots 1-D fields [N X C], one per row, and one channel per column."""
  figure, axes = style.figure(
    len(names), (4 * len(names), 1.2 * len(u) + 0.6), len(u), squeeze=False
  )
  for channel, column in enumerate(axes.T):
    low, high = float(u[..., channel].min()), float(u[..., channel].max())
    margin = 0.05 * (high - low or 1)
    for place, line in zip(column, u[..., channel], strict=True):
      place.plot(line, linewidth=1, color=style.BLUE)
      place.set(xlim=(0, len(line) - 1), ylim=(low - margin, high + margin))
      place.tick_params(labelbottom=place is column[-1])
    column[0].set_title(names[channel])
    column[-1].set_xlabel('position (pixels)')
  figure.supylabel('data units', fontsize=9)
  return style.save(figure, path)


@style.paper
def _line_rows(shown: dict[str, np.ndarray], path: pathlib.Path) -> np.ndarray:
  """Plots 1-D fields [N X] by name, one example per row, on an axis from 0 to the truth's size."""
  truth, size = shown['truth'], shown['truth'].shape[1]
  figure, axes = style.figure(1, (7, 1.5 * len(truth) + 0.8), len(truth), squeeze=False)
  for n, row in enumerate(axes[:, 0]):
    for name, u in shown.items():
      x = np.arange(u.shape[1]) * size / u.shape[1]
      look = {'alpha': 0.4, 'color': style.BLUE, 'linewidth': 0.8, 'linestyle': '-'}
      if name == 'condition':
        look = {'linestyle': '', 'marker': '.', 'color': style.RED}
      elif name == 'truth':
        look = {'color': style.DATA, 'linewidth': 1, 'linestyle': '-'}
      elif name.startswith('mean'):
        look = {'color': style.BLUE, 'linewidth': 1.5, 'linestyle': '-'}
      row.plot(x, u[n], label=name, **look)
    row.set(xlim=(0, size - 1))
    row.tick_params(labelbottom=n == len(truth) - 1)
  axes[-1, 0].set_xlabel('position (pixels)')
  figure.supylabel('data units', fontsize=9)
  handles = axes[0, 0].get_legend_handles_labels()
  tight = {'handlelength': 1.2, 'columnspacing': 1.2}
  figure.legend(*handles, loc='outside upper center', ncols=len(handles[0]), **tight)
  return style.save(figure, path)


@style.paper
def _pictures(
  rows: list[list[tuple[str, np.ndarray, int]]],
  names: Sequence[str],
  scales: list[dict[str, Any]],
  location: str,
  path: pathlib.Path,
) -> np.ndarray:
  """Plots rows of images, with one colour bar per scale.

  Args:
    rows: of (title, image [H W], number of its scale); titles are those of the first row.
    names: of the rows.
    scales: as `_scale` returns; pixels of one scale have one size.
    location: of the bars, 'right' or 'bottom'.
    path: of the PNG.
  """
  longest = [
    max(max(image.shape) for row in rows for _, image, number in row if number == scale)
    for scale in range(len(scales))
  ]
  sides = [[np.array(image.shape) / longest[number] for _, image, number in row] for row in rows]
  heights = [max(high for high, _ in row) for row in sides]
  widths = [wide for _, wide in sides[0]]
  size = [CELL * sum(widths) + 0.3, CELL * sum(heights) + 0.3]
  size[location == 'bottom'] += 0.9  # inches, of the bars
  ratios = {'width_ratios': widths, 'height_ratios': heights, 'squeeze': False}
  figure, axes = style.figure(len(widths), tuple(size), len(rows), **ratios)
  members: list[list] = [[] for _ in scales]
  for places, row, name in zip(axes, rows, names, strict=True):
    for place, (title, image, number) in zip(places, row, strict=True):
      limits = {k: v for k, v in scales[number].items() if k != 'extend'}
      place.imshow(image, interpolation='nearest', **limits)
      place.set(xticks=[], yticks=[], anchor='N' if title else 'C')
      place.set_title(title if row is rows[0] else '', loc='center')
      place.spines[:].set_visible(True)
      members[number].append(place)
    places[0].set_ylabel(name)
  for scale, group in zip(scales, members, strict=True):
    spans = [place.get_subplotspec() for place in group]
    count = len(
      {span.rowspan.start if location == 'right' else span.colspan.start for span in spans}
    )
    shrink = 0.9 if count < 4 else 0.6
    bar = figure.colorbar(
      group[0].images[0],
      ax=group,
      location=location,
      label='data units',
      extend=scale['extend'],
      shrink=shrink,
      aspect=12 * count * shrink,
      panchor=False,
      ticks=MaxNLocator(2 if location == 'bottom' and count == 1 else 5),
    )
    bar.ax.tick_params(labelsize=8)
  return style.save(figure, path)


def _scale(u: np.ndarray) -> dict[str, Any]:
  """Returns colour map, limits and the bar's arrows, for all but the outer hundredth of values."""
  low, high = map(float, np.percentile(u, (0.5, 99.5)))
  name = 'viridis'
  if low < 0 < high:
    name, high = 'RdBu_r', max(-low, high)
    low = -high
  below, above = u.min() < low, u.max() > high
  extend = {(0, 0): 'neither', (1, 0): 'min', (0, 1): 'max', (1, 1): 'both'}[below, above]
  return {'cmap': name, 'vmin': low, 'vmax': high, 'extend': extend}


def _frequencies(axes):
  """Labels a logarithmic axis of frequencies with plain numbers."""
  axes.set(xlabel='spatial frequency (cycles per pixel)')
  style.plain_numbers(axes.xaxis)


def _names(names: tuple[str, ...], u: np.ndarray) -> tuple[str, ...]:
  """Returns the channels' names: numbers if there are none, and nothing for a single channel."""
  count = u.shape[-1]
  return tuple(names) or (('',) if count == 1 else tuple(f'channel {i}' for i in range(count)))


def _line(name: str) -> str:
  return '-' if name == 'data' else '--'
