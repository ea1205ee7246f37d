import numpy as np
import pytest
from PIL import Image

from benchmarks import loss_grid


@pytest.fixture
def rows():
  """Two seeds of every cell at patches of 1 and 10; more bits for eps, and at the larger patch."""
  return [
    {
      'patch': f'p{patch}',
      'prediction': head,
      'space': f'{of}-loss',
      'seed': str(seed),
      'bits_per_dim': str(patch + loss_grid.NAMES.index(head) + seed),
      'fd_classifier': str(10 * patch + seed),
    }
    for patch in (10, 1)
    for head in loss_grid.NAMES
    for of in loss_grid.NAMES
    for seed in (1, 0)
  ]


def test_the_table_goes_by_patch_prediction_and_loss_over_seeds(rows):
  _, _, *lines = loss_grid.table(loss_grid.cells_of(rows))
  assert len(lines) == 18
  assert lines[0] == '| 1 x 1 | x | x | 2 | 1.50 ± 0.71 | 10 ± 1 |'
  assert lines[-1] == '| 10 x 10 | eps | eps | 2 | 12.50 ± 0.71 | 100 ± 1 |'
  (line,) = loss_grid.table(loss_grid.cells_of(rows[:1]))[2:]
  assert line == '| 10 x 10 | x | x | 1 | 11.00 | 101 |'  # no spread of one


def test_the_sheet_has_the_first_samples_of_every_cell_at_its_place(rows, tmp_path):
  cells = loss_grid.cells_of(rows)
  for row in rows:
    labels = [row[axis] for axis in ('patch', 'prediction', 'space', 'seed')]
    folder = tmp_path / '+'.join(labels) / 'samples'
    folder.mkdir(parents=True)
    level = 10 * loss_grid.NAMES.index(row['prediction']) + len(labels[2]) + len(labels[0])
    grid = np.full((120, 120), 200 + int(row['seed']), np.uint8)
    grid[:20] = level if row['seed'] == '0' else 250  # the first row, of six, of the lowest seed
    Image.fromarray(grid).save(folder / 'step_00000010.png')
  sheet = loss_grid.samples(cells, tmp_path)
  count = lambda level: (sheet == level).all(axis=-1).sum()
  strip = 10 * 60  # pixels: half as high and as wide as a row of six
  for head in (0, 10, 20):
    for level, strips in ((6 + 2, 2), (8 + 2, 1), (6 + 3, 2), (8 + 3, 1)):  # x and v; eps
      assert strips * strip <= count(head + level) < (strips + 1) * strip
  assert count(250) < strip


def test_the_plot_of_a_part_of_the_grid(rows, tmp_path):
  picture = loss_grid.plot(loss_grid.cells_of(rows[:20]), tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 10_000 and picture.ndim == 3
