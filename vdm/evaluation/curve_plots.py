"""Plots of many runs side by side, drawn from a table of their curves alone.

  python -m vdm.evaluation.curve_plots DIR/curves.csv FOLDER

draws an ablation's plots (`vdm.ablate`) once more.
"""

import math
import pathlib
import sys

import numpy as np
from matplotlib.ticker import MaxNLocator

from vdm import style
from vdm.system import files

# the plots by log-SNR have a small panel per line, the others one panel with names at the ends
BY_LOG_SNR = {
  'weight': 'weight / its greatest',
  'density': 'density of training\ntimes, first seed',
}
LABELS = {  # of a plot: x, y, and the scales of both; any other is a distance against steps
  'bits_per_dim': ('training steps', 'bits/dim', 'linear', 'linear'),
  'nats_per_dim': ('training steps', 'nats/dim', 'linear', 'linear'),
  'fd_pixels': ('evaluations of the network per sample', 'FD-pixels (of raw pixels)', 'log', 'log'),
  'loss': ('training steps', 'training loss / its first value', 'linear', 'log'),
  'diffusion_cv': ('training steps', 'std / mean of the training loss', 'linear', 'linear'),
}
Curves = dict[str, np.ndarray]  # name of a line -> x, mean, least and greatest, [4 N]


def plot_curves(table: pathlib.Path, folder: pathlib.Path):
  """Draws folder/<plot>.png of every plot in a table, the curves.csv of `vdm.ablate`."""
  plots: dict[str, dict[str, list]] = {}
  with files.reading(table, 'give the curves.csv of a grid'):
    for plot, line, *point in files.read_table(table)[1:]:
      plots.setdefault(plot, {}).setdefault(line, []).append([float(number) for number in point])
  for plot, lines in plots.items():
    curves = {line: np.array(points).T for line, points in lines.items()}
    draw = plot_panels if plot in BY_LOG_SNR else plot_lines
    draw(plot, curves, folder / f'{plot}.png')


@style.paper
def plot_lines(plot: str, curves: Curves, path: pathlib.Path) -> np.ndarray:
  """Plots lines with bands from the least to the greatest, each named at its end.

  Returns the picture.
  """
  distance = ('training steps', f'Fréchet distance, {plot}', 'linear', 'log')
  xlabel, ylabel, *scales = LABELS.get(plot, distance)
  figure, axes = style.figure(1, (5, 4))
  lines = {}
  for name, (x, mean, least, greatest) in curves.items():
    (lines[name],) = axes.plot(x, mean, marker='.')
    axes.fill_between(x, least, greatest, alpha=0.12, color=lines[name].get_color(), linewidth=0)
  axes.set(xlabel=xlabel, ylabel=ylabel)
  if scales[0] == 'linear':
    whole = MaxNLocator('auto', integer=True, steps=[1, 2, 2.5, 5, 10])
    axes.xaxis.set_major_locator(whole)
  if scales[0] == 'log':
    axes.set_xscale('log', base=2)
    axes.set_xticks(x, [f'{tick:g}' for tick in x])
  if scales[1] == 'log':
    axes.set_yscale('log')
    style.plain_numbers(axes.yaxis)
  if any((greatest > least).any() for _, _, least, greatest in curves.values()):
    axes.set_title('line: mean over seeds; band: least to greatest')
  style.label_ends(axes, lines)
  return style.save(figure, path)


@style.paper
def plot_panels(plot: str, curves: Curves, path: pathlib.Path) -> np.ndarray:
  """Plots each line over log-SNR in a panel of its own, with all others in grey behind it.

  Lines that lie on each other share one (`style.alike`).

  Returns the picture.
  """
  names, top = list(curves), max(y.max() for _, y, *_ in curves.values())
  groups = style.alike([np.stack([x, y / top], 1) for x, y, *_ in curves.values()])
  columns = min(4, len(groups))
  rows = math.ceil(len(groups) / columns)
  size = (7.2 if columns > 2 else 2.6 * columns, 1.45 * rows + 0.5)
  figure, panels = style.figure(columns, size, rows, sharex=True, sharey=True, squeeze=False)
  for axes in panels.flat[len(groups) :]:
    axes.remove()
  for axes, (members, sign) in zip(panels.flat, groups, strict=False):
    for other in curves.values():
      axes.plot(*other[:2], '-', color=style.PALE, linewidth=0.7)
    axes.plot(*curves[names[members[0]]][:2], '-', color=style.BLUE, linewidth=2)
    axes.set(title=f'\n{sign} '.join(names[i] for i in members), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
  figure.supxlabel('log-SNR (noise on the left); grey: the other lines', fontsize=9)
  figure.supylabel(BY_LOG_SNR[plot], fontsize=9)
  return style.save(figure, path)


if __name__ == '__main__':
  if len(sys.argv) != 3:
    sys.exit('give DIR/curves.csv and the folder of the plots')
  try:
    plot_curves(*map(pathlib.Path, sys.argv[1:]))
  except ValueError as error:
    sys.exit(str(error))
