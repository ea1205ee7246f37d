"""Pictures in docs/ are made by commands, and none is older than the code that draws it."""

import pathlib
import re
import shutil

import pytest

import vdm

ROOT = pathlib.Path(vdm.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / 'benchmarks').exists(), reason='not in a checkout')


@pytest.fixture
def pictures():
  from benchmarks import pictures

  return pictures


def test_every_picture_has_a_command_and_every_command_a_picture(pictures):
  assert {path.stem for path in ROOT.glob('docs/*.png')} == set(pictures.PICTURES)
  for picture in pictures.PICTURES.values():
    for path in re.findall(r'(?:configs|examples|docs|pretrained)/[\w./]+', str(picture)):
      assert (ROOT / path).exists(), path


def test_no_picture_is_older_than_the_code_that_draws_it(pictures):
  old = ' '.join(pictures.old())
  assert not old, f'redraw what changed: python -m benchmarks.pictures --runs=DIR {old}'


@pytest.fixture
def copy(tmp_path, pictures):
  """The files that draw, to be edited: (file, *edits) -> the pictures that are others then."""
  drawing = [f'benchmarks/{name}.py' for name in ('campaign/soak', 'loss_grid', 'cascade')]
  places = [*pictures.DRAWING.values(), *drawing, 'examples', 'docs']
  for place in places:
    target = tmp_path / place
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if (ROOT / place).is_dir() else shutil.copy)(ROOT / place, target)

  def changed(file, *edits):
    text = (ROOT / file).read_text()
    for old, new in edits:
      assert old in text
      text = text.replace(old, new)
    (tmp_path / file).write_text(text)
    every = pictures.PICTURES.items()
    return {n for n, p in every if pictures.hash_of(p, tmp_path) != pictures.hash_of(p)}

  return changed


def test_a_change_of_what_draws_is_seen_and_of_nothing_else(copy, pictures):
  plots = 'vdm/evaluation/plots.py'
  assert copy(plots) == set()
  comment = ('  frequency: np.ndarray', '  # said anew\n\n  frequency: np.ndarray')
  assert copy(plots, ('"""Plots', '"""Draws'), comment) == set()
  assert copy(plots, ('spatial frequency', 'frequency')) == {'digits_spectrum'}
  assert copy(plots, ('np.interp(number', 'np.interp(0 * number')) == {'digits_bits_by_log_snr'}
  copy(plots)
  fields = 'vdm/evaluation/field_plots.py'
  both = {'gaussian_fields', 'digits_superres'}
  assert copy(fields, ('aspect=12', 'aspect=11')) == both  # by way of what draws rows
  assert copy(fields, ('CELL = 1.5', 'CELL = 1.6')) == both
  copy(fields)
  plain = {'digits_samples', 'cascade_samples', 'cascade_pixels'}  # of no line or word
  grids = {*plain, 'fashion_mnist_full_samples', 'fashion_mnist_guidance'}
  assert copy('vdm/sampling/picture.py', ('GAP = 2', 'GAP = 3')) == grids
  copy('vdm/sampling/picture.py')
  of_style = copy('vdm/style.py', ("'lines.linewidth': 1.5", "'lines.linewidth': 2"))
  assert of_style == set(pictures.PICTURES) - plain
  names = {'weightings_loss', 'digits_schedule', 'digits_training'}
  assert names <= copy('vdm/style.py', ('(1.04, place)', '(1.1, place)'))
  copy('vdm/style.py')
  assert copy('docs/soak.csv', ('seconds', 's')) == {'soak'}


def test_a_picture_from_a_table_is_drawn_and_recorded(pictures, tmp_path, monkeypatch, capsys):
  (tmp_path / 'docs').mkdir()
  (tmp_path / 'docs' / 'pictures.json').write_text('{"gone": "1", "toy2d": "2"}')
  drawn = pictures.PICTURES['soak']._replace(commands=('python -c "print(1)"',), made='*.png')
  monkeypatch.setattr(pictures, 'PICTURES', {'soak': drawn, 'toy2d': pictures.PICTURES['toy2d']})
  monkeypatch.setattr(pictures, 'ROOT', tmp_path)
  monkeypatch.setattr(pictures, 'hash_of', lambda picture: picture.made)
  assert pictures.main([]) == 1 and capsys.readouterr().out.split() == ['soak', 'toy2d']
  (tmp_path / 'made.png').write_text('the picture')
  assert pictures.main([f'--runs={tmp_path}', 'soak']) == 0
  assert (tmp_path / 'docs' / 'soak.png').read_text() == 'the picture'
  assert pictures.recorded() == {'soak': '*.png', 'toy2d': '2'} and pictures.old() == ['toy2d']


@pytest.mark.parametrize(
  ('typed', 'said'), [(['nope'], 'nope is no picture'), (['toy2d'], '--runs')]
)
def test_what_cannot_be_drawn_is_refused(pictures, typed, said, capsys):
  with pytest.raises(SystemExit):
    pictures.main(typed)
  assert said in capsys.readouterr().err
