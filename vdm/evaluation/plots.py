"""Plots of an evaluation and of a run's history."""

import itertools
import pathlib
import textwrap

import matplotlib
import numpy as np

from vdm import cards, style
from vdm.diffusion.noisy_elbo import Augmented

# what is spent in bins of equal width, and the log_snr_max and log_snr_min that they lie between
Curve = tuple[np.ndarray, tuple[float, float]]

LOG_SNR = 'log-SNR (noise on the left)'


@style.paper
def plot_bins(curves: dict[str, Curve], path: pathlib.Path, unit: str) -> np.ndarray:
  """Plots what is spent per unit of log-SNR, and in all from noise up to a log-SNR, in `unit`.

  There is one curve per set of parameters, each thinner than the one below it, so that those that
  lie on each other are seen. Returns the picture.
  """
  figure, (left, right) = style.figure(2, (7.2, 2.8))
  for number, (name, (bins, ends)) in enumerate(curves.items()):
    edges = np.linspace(ends[1], ends[0], len(bins) + 1)
    look = {'color': style.COLOURS[number % 6], 'linewidth': 1 + 1.6 * (len(curves) - 1 - number)}
    left.stairs(bins, edges, baseline=None, **look)
    spent = np.cumsum(filled(bins) * np.diff(edges))
    right.plot(edges, [0, *spent], '-', label=f'{name}: {spent[-1]:.3f} {unit}', **look)
  left.set(xlabel=LOG_SNR, ylabel=f'{unit} per unit of log-SNR', ylim=(0, None))
  right.set(xlabel=LOG_SNR, ylabel=f'{unit} spent, from noise up', ylim=(0, None))
  right.legend(title='diffusion loss in all', alignment='left', labelcolor='linecolor')
  return style.save(figure, path)


@style.paper
def plot_maps(
  images: np.ndarray, maps: np.ndarray, edges: np.ndarray, unit: str, path: pathlib.Path
) -> np.ndarray:
  """Plots images above what each of their pixels costs, a row for each interval of log-SNR.

  Each row has a scale of its own.

  Args:
    images: uint8 [N H W C].
    maps: in `unit` per pixel, [N intervals H W]; negative only by rounding.
    edges: of the intervals of log-SNR, falling, [intervals + 1].
    unit: 'bits' or 'nats'.
    path: of the picture, which is returned.
  """
  count, rows = maps.shape[0], 1 + maps.shape[1]
  size = (max(4.0, 0.75 * count + 1.6), 0.8 * rows + 0.2)
  figure, panels = style.figure(count, size, rows=rows, squeeze=False)
  for axes in panels.flat:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
  for axes, image in zip(panels[0], images, strict=True):
    grey = {'cmap': 'gray', 'vmin': 0, 'vmax': 255} if image.shape[-1] == 1 else {}
    axes.imshow(image.squeeze(), **grey)
  place = {'rotation': 0, 'ha': 'right', 'va': 'center', 'fontsize': 8}
  for row, (high, low) in enumerate(itertools.pairwise(edges), start=1):
    top = float(np.quantile(maps[:, row - 1], 0.998))
    for axes, part in zip(panels[row], maps[:, row - 1], strict=True):
      drawn = axes.imshow(part, 'inferno', vmin=0, vmax=top)
    name = f'log-SNR\n{style.signed(high)} to {style.signed(low)}' if rows > 2 else 'cost'
    panels[row][0].set_ylabel(name, **place)
    bar = figure.colorbar(drawn, ax=panels[row], fraction=0.02, pad=0.01)
    bar.set_label(f'{unit}/pixel', fontsize=8)
  return style.save(figure, path)


def filled(bins: np.ndarray) -> np.ndarray:
  """Returns the bins, with those that nothing fell into interpolated."""
  number, seen = np.arange(len(bins)), np.isfinite(bins)
  if not seen.any():
    return bins
  return np.interp(number, number[seen], bins[seen])


@style.paper
def plot_spectrum(
  frequency: np.ndarray,
  power: np.ndarray,
  levels: np.ndarray,
  path: pathlib.Path,
  standardized: bool = False,
) -> np.ndarray:
  """Plots the data's radial power spectrum, and the noise of z / alpha at some log-SNR levels.

  What lies above a level's line is visible in z there. Levels far from all of the data's power are
  left out. The data are in the network's units: between -1 and 1, or `standardized`. Returns the
  picture.
  """
  figure, axes = style.figure(1, (4.6, 3.2))
  low, high = power.min() / 8, power.max() * 8
  shown = [level for level in levels if low < np.exp(-level) < high]
  colours = matplotlib.colormaps['cividis'](np.linspace(0, 0.75, max(1, len(shown))))
  for level, colour in zip(shown, colours, strict=False):
    axes.axhline(np.exp(-level), color=colour, linestyle=':')
    right = axes.get_yaxis_transform()
    place = {'color': colour, 'va': 'center', 'fontsize': 8, 'transform': right}
    axes.text(1.01, np.exp(-level), style.signed(level), **place)
  place = {'rotation': 270, 'va': 'center', 'transform': axes.transAxes}
  axes.text(1.13, 0.5, 'noise at this log-SNR', **place)
  axes.loglog(frequency, power, color=style.DATA, linewidth=2)
  axes.annotate('data', (frequency[0], power[0]), (4, 4), textcoords='offset points')
  units = '(data − mean) / std' if standardized else 'data scaled to −1 … 1'
  axes.set(xlabel='spatial frequency (cycles per pixel)', ylabel=f'power ({units})')
  axes.set_ylim(low, high)
  style.plain_numbers(axes.xaxis)
  style.plain_numbers(axes.yaxis)
  return style.save(figure, path)


def plot_progressive(
  blocks: dict[str, np.ndarray], levels: np.ndarray, path: pathlib.Path
) -> np.ndarray:
  """Writes z above x_hat of some images, a column per log-SNR, with the names of both.

  Args:
    blocks: name of an image -> the picture of its two rows.
    levels: log-SNR of the columns.
    path: of the PNG.

  Returns:
    The picture.
  """
  columns = [style.signed(level) for level in levels]
  title = "log-SNR of z, from data to noise; below z the model's estimate of the data"
  rows = ('$z$', r'$\hat{x}$')
  return style.save(style.label_grid(blocks, columns, rows, title), path)


@style.paper
def plot_augmented(
  edges: np.ndarray, table: Augmented, title: str, path: pathlib.Path, unit: str
) -> np.ndarray:
  """Plots what a weighted loss bounds (`noisy_elbo`): the noise levels' weights, and their bounds.

  All are in `unit`. A loss that has all of its weight on the data as they are, which is the bound
  itself, has no plot of weights. Returns the picture.
  """
  density, atom = table.mass / table.total / np.diff(edges), table.atom / table.total
  is_bound = np.abs(density).max() < 1e-6  # what is left is rounding
  figure, panels = style.figure(
    1 if is_bound else 2, (4.2 if is_bound else 7.2, 2.8), squeeze=False
  )
  right = panels[0, -1]
  if not is_bound:
    left = panels[0, 0]
    left.stairs(density, edges, fill=density.min() >= 0, color=style.BLUE, alpha=0.6)
    left.axhline(0, color=style.REFERENCE, linewidth=0.7)
    left.set(xlabel='log-SNR of the noise added', ylabel='share of the weight per log-SNR')
    left.set_title(f'{title};\nshare on the data as they are: {atom:.3g}')
  right.plot(edges, table.losses, color=style.BLUE)
  right.set(xlabel='log-SNR of the noise added', ylabel=f'prior + diffusion terms ({unit})')
  if is_bound:
    right.set_title(f'{title};\nall of the weight is on the data as they are')
  return style.save(figure, path)


@style.paper
def plot_history(found: dict[str, list[dict]], path: pathlib.Path) -> np.ndarray:
  """Plots likelihoods and Fréchet distances against steps, from series of cards (`cards.series`).

  Each series has a curve, with one standard error on either side and a star at its best; what all
  of them share is said above, the rest at their ends, or below where it is long.

  Returns the picture.
  """
  bounds = {k: s for k, s in found.items() if cards.is_likelihood(s[0])}
  unit = ' and '.join(sorted({cards.UNITS[s[0]['metric']] for s in bounds.values()}))
  distances = {k: s for k, s in found.items() if cards.is_distance(s[0])}
  kinds = [(bounds, unit, 'linear'), (distances, 'Fréchet distance', 'log')]
  kinds = [kind for kind in kinds if kind[0]] or kinds[:1]
  named = [_labels(chosen) for chosen, _, _ in kinds]
  longest = max(len(name) for _, labels in named for name in labels.values())
  below = longest > 16  # inches, of a legend: 0.06 a letter, 0.17 a line
  width = max(3.8, 0.06 * longest + 0.8) if below else 3.8
  height = 3.0 + 0.17 * max(len(labels) for _, labels in named) * below
  figure, panels = style.figure(len(kinds), (width * len(kinds), height), squeeze=False)
  for axes, (chosen, label, scale), (shared, labels) in zip(panels[0], kinds, named, strict=True):
    lines = {}
    for name, series in chosen.items():
      steps, values = ([card[k] for card in series] for k in ('step', 'value'))
      errors = [0.0 if 'stderr' not in c or c['stderr'] is None else c['stderr'] for c in series]
      bars = axes.errorbar(steps, values, errors, marker='.', label=labels[name])
      best = cards.best(series)
      axes.plot(best['step'], best['value'], '*', color=bars[0].get_color(), markersize=10)
      lines[labels[name]] = bars[0]
    axes.set(xlabel='training steps', ylabel=label, yscale=scale)
    if scale == 'log':
      style.plain_numbers(axes.yaxis)
    axes.set_title('\n'.join(textwrap.wrap(shared, 48)), fontsize=8)
    if below and any(lines):  # a single series is named above
      place = {'loc': 'upper left', 'bbox_to_anchor': (0, -0.2), 'borderaxespad': 0}
      axes.legend(labelcolor='linecolor', **place)
    elif any(lines):  # several
      style.label_ends(axes, lines)
  note = 'bars: one standard error either way; star: the best'
  figure.supxlabel(note, x=0.01, ha='left', fontsize=8, color=style.REFERENCE)
  return style.save(figure, path)


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


@style.paper
def plot_path(log_snr: np.ndarray, path: pathlib.Path) -> np.ndarray:
  """Plots how far the dimensions of a multivariate schedule are from their mean, over time.

  Shown are the range and the middle half of all dimensions and, of pictures, where they are when
  the range is widest. Returns the picture.

  Args:
    log_snr: [times *spatial C], at equally spaced times.
    path: of the picture.
  """
  each = log_snr - log_snr.mean(axis=tuple(range(1, log_snr.ndim)), keepdims=True)
  flat, t = each.reshape(len(each), -1), np.linspace(0, 1, len(each))
  widest = int(np.ptp(flat, axis=1).argmax())
  is_map = each.ndim == 4 and min(each.shape[1:3]) > 1
  columns = 1 + is_map
  figure, ((left, *rest),) = style.figure(columns, (2.8 * columns, 2.6), squeeze=False)
  shown = {'all': flat.T, 'the middle half': np.quantile(flat, [0.25, 0.75], axis=1)}
  for (name, lines), opacity in zip(shown.items(), (0.2, 0.4), strict=True):
    ends = lines.min(axis=0), lines.max(axis=0)
    left.fill_between(t, *ends, color=style.BLUE, alpha=opacity, linewidth=0, label=name)
  left.set(xlabel='time $t$', ylabel='log-SNR − mean of dimensions')
  left.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2)
  for axes in rest:
    most = np.abs(flat[widest]).max() or 1.0
    picture = axes.imshow(each[widest].mean(axis=-1), cmap='RdBu', vmin=-most, vmax=most)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f'at $t$ = {t[widest]:.2f}', loc='left')
    figure.colorbar(picture, ax=axes)
  return style.save(figure, path)


@style.paper
def plot_schedule(
  found: dict[str, list[dict]], log_snr: np.ndarray, path: pathlib.Path
) -> np.ndarray:
  """Plots the schedule at equally spaced times, its density, and its effect on the loss's variance.

  The history is that of the averaged parameters, the longest among series of number cards
  (`cards.series`), if there are any: the spread of the bound under the schedule of evaluation,
  which for an adaptive one is linear. Returns the picture.
  """
  bounds = [s for s in found.values() if cards.is_bound(s[0]) and s[0]['params'] == 'ema']
  measures = 'diffusion_cv_linear', 'diffusion_cv'  # of few draws they may not have been estimated
  series = [c for c in max(bounds, key=len, default=[]) if None not in (c[k] for k in measures)]
  count = 3 if series else 2
  figure, (left, middle, *rest) = style.figure(count, (2.8 * count, 2.6))
  linear = {'color': style.REFERENCE, 'linestyle': '--', 'linewidth': 1.2}
  own, t = {'color': style.BLUE, 'linestyle': '-'}, np.linspace(0, 1, len(log_snr))
  left.plot(t[[0, -1]], log_snr[[0, -1]], **linear, label='linear')
  left.plot(t, log_snr, **own, label='of training')
  left.set(xlabel='time $t$', ylabel='log-SNR')
  left.legend(labelcolor='linecolor', loc='lower left')
  middle.axhline(1 / (log_snr[0] - log_snr[-1]), **linear)
  density = (-np.diff(t) / np.diff(log_snr))[::-1]  # edges must rise
  middle.stairs(density, log_snr[::-1], baseline=None, color=style.BLUE)
  middle.set(xlabel=LOG_SNR, ylabel='density of training times')
  middle.set_ylim(0, 1.1 * np.max(density))
  for axes in rest:
    steps = [card['step'] for card in series]
    lines = {
      name: axes.plot(steps, [card[key] for card in series], marker='.', **line)
      for name, key, line in zip(('linear', 'as evaluated'), measures, (linear, own), strict=True)
    }
    axes.set(xlabel='training steps', ylabel='std / mean of the diffusion loss')
    axes.set_ylim(0, 1.15 * max(line.get_ydata().max() for (line,) in lines.values()))
    style.label_ends(axes, {name: line for name, (line,) in lines.items()})
  return style.save(figure, path)
