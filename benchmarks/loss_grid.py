"""Makes the tables, the plots and the samples of docs/loss_grid.md.

  python -m benchmarks.loss_grid --runs=DIR        # prints the table, writes docs/loss_grid.csv
  python -m benchmarks.loss_grid --plot=OUT.png    # draws docs/loss_grid.csv

DIR is that of `python -m vdm.ablate --config=configs/ablations/loss_grid.py --workdir=DIR`. Once no
cell is missing, samples of all are drawn too, DIR/loss_grid_samples.png. The table of Fashion-MNIST
is read and written with --table=docs/loss_grid_fashion_mnist.csv.
"""

import argparse
import csv
import pathlib
import sys

import numpy as np
from PIL import Image

from vdm import style
from vdm.evaluation import grids
from vdm.sampling.picture import save_png
from vdm.system import files

TABLE = pathlib.Path('docs/loss_grid.csv')
NAMES = 'x', 'v', 'eps'
METRICS = {'bits_per_dim': 'bits/dim', 'fd_classifier': 'FD-classifier'}
PREVIEWS = 6  # images in a row of a run's samples
GAP = 5  # pixels of white on each side of these
Cells = dict[tuple[str, str, str], list[dict]]  # (patch, predicted, loss of) -> runs


def cells_of(rows: list[dict]) -> Cells:
  """Returns the rows of an ablation's results.csv by cell, seeds together."""
  cells: Cells = {}
  for row in rows:
    cell = row['patch'].removeprefix('p'), row['prediction'], row['space'].removesuffix('-loss')
    cells.setdefault(cell, []).append(row)
  return cells


def table(cells: Cells) -> list[str]:
  """Returns the lines of a Markdown table, by patch, by what is predicted, by the loss."""
  lines = ['| patch | predicted | loss of | seeds | bits/dim | FD-classifier |', '|' + '---|' * 6]
  order = lambda cell: (int(cell[0]), NAMES.index(cell[1]), NAMES.index(cell[2]))
  for cell in sorted(cells, key=order):
    shown = [f'{cell[0]} x {cell[0]}', *cell[1:], str(len(cells[cell]))]
    for metric, digits in (('bits_per_dim', 2), ('fd_classifier', 0)):
      values = [float(row[metric]) for row in cells[cell]]
      shown.append(grids.over_seeds(values, f'.{digits}f', f'.{digits}f'))
    lines.append(f'| {" | ".join(shown)} |')
  return lines


@style.paper
def plot(cells: Cells, path: pathlib.Path) -> np.ndarray:
  """Plots each metric against the space of the loss, a panel per patch, a line per prediction.

  Returns the picture.
  """
  patches = sorted({cell[0] for cell in cells}, key=int)
  size = (7.0, 4.4)
  drawn, panels = style.figure(
    len(patches), size, len(METRICS), sharex=True, sharey='row', squeeze=False
  )
  for row, (metric, label) in zip(panels, METRICS.items(), strict=True):
    row[0].set(ylabel=label, yscale='log')
    for axes, patch in zip(row, patches, strict=True):
      lines = {}
      for predicted, color in zip(NAMES, (style.BLUE, style.RED, style.GREEN), strict=True):
        found = [(i, cells.get((patch, predicted, of), [])) for i, of in enumerate(NAMES)]
        points = [(i, float(run[metric])) for i, runs in found for run in runs]
        means = [(i, np.mean([float(r[metric]) for r in runs])) for i, runs in found if runs]
        if means:
          (lines[f'predicts {predicted}'],) = axes.plot(*zip(*means, strict=True), color=color)
          axes.plot(*zip(*points, strict=True), '.', color=color)
      if patch == patches[-1]:
        style.label_ends(axes, lines)
    style.plain_numbers(row[0].yaxis)
  for axes, patch in zip(panels[0], patches, strict=True):
    axes.set_title(f'patches of {patch} x {patch}')
  panels[0, 0].set_xticks(range(len(NAMES)), NAMES)
  drawn.supxlabel('the error of which is the loss', fontsize=9)
  return style.save(drawn, path)


def samples(cells: Cells, runs: pathlib.Path) -> np.ndarray:
  """Returns a sheet with the first samples of a run of every cell, of the lowest seed."""
  blocks: dict[str, np.ndarray] = {}
  for patch in sorted({cell[0] for cell in cells}, key=int):
    rows = []
    for predicted in NAMES:
      strips = []
      for of in NAMES:
        row = min(cells[patch, predicted, of], key=lambda row: int(row['seed']))
        labels = (row[axis] for axis in ('patch', 'prediction', 'space', 'seed'))
        (path,) = (runs / '+'.join(labels) / 'samples').glob('step_*.png')
        grid = np.asarray(Image.open(path))[::2, ::2]
        strip = grid[: grid.shape[0] // PREVIEWS]
        strips.append(np.pad(strip, ((0, 0), (GAP, GAP)), constant_values=255))
      rows.append(np.concatenate(strips, axis=1))
    blocks[f'{patch} x {patch}'] = np.concatenate(rows)[..., None]
  drawn = style.label_grid(blocks, NAMES, NAMES, title='loss of (across), predicted (down)')
  return style.image_of(drawn)


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--runs', type=pathlib.Path, help='folder of the ablation')
  parser.add_argument('--plot', type=pathlib.Path, help='picture to draw of the table')
  parser.add_argument('--table', type=pathlib.Path, default=TABLE, help='of every run')
  args = parser.parse_args(argv)
  source = args.runs / 'results.csv' if args.runs else args.table
  with source.open() as file:
    rows = list(csv.DictReader(file))
  cells = cells_of(rows)
  if args.runs:
    files.write_table(args.table, list(rows[0]), [list(row.values()) for row in rows])
    print('\n'.join(table(cells)))
    if len(cells) == len({cell[0] for cell in cells}) * len(NAMES) ** 2:
      save_png(args.runs / 'loss_grid_samples.png', samples(cells, args.runs))
  if args.plot:
    plot(cells, args.plot)
  return 0


if __name__ == '__main__':
  sys.exit(main())
