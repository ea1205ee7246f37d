"""The look of what is drawn: colours that all eyes tell apart, names that do not overlap."""

import ast
import itertools
import pathlib

import matplotlib
import numpy as np
import pytest

import vdm
from vdm import style
from vdm.evaluation.curve_plots import plot_curves

ROOT = pathlib.Path(vdm.__file__).parents[1]
# What eyes without one kind of cone see, in linear RGB (Machado, Oliveira and Fernandes 2009).
EYES = {
  'all': np.eye(3),
  'protan': [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
  'deutan': [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


def linear(colour):
  rgb = np.array(matplotlib.colors.to_rgb(colour))
  return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
  lms = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
  lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
  return np.array(lab) @ np.cbrt(np.array(lms) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize('eyes', EYES)
def test_colours_differ_for_all_eyes(eyes):
  seen = [oklab(np.array(EYES[eyes]) @ linear(c)) for c in (*style.COLOURS, style.DATA)]
  least = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
  assert least > 0.06


def test_names_in_every_colour_can_be_read_on_white():
  """A contrast of 3 is what WCAG asks of graphics; letters are as thick as lines here."""
  for colour in (*style.COLOURS, style.DATA, style.REFERENCE):
    luminance = linear(colour) @ [0.2126, 0.7152, 0.0722]
    assert 1.05 / (luminance + 0.05) > 3, colour


@pytest.mark.parametrize(
  'wanted', [[0.5], [0.5, 0.5, 0.5], [0.9, 0.1, 0.95, 1.0], [0.0, 0.02, 0.5]]
)
def test_spread_keeps_order_gaps_and_what_has_room(wanted):
  places = style.spread(wanted, 0.1)
  order = np.argsort(wanted, kind='stable')
  assert (np.diff(places[order]) > 0.1 - 1e-9).all() and places.min() >= 0 and places.max() <= 1
  alone = [i for i, y in enumerate(wanted) if sum(abs(y - z) < 0.25 for z in wanted) == 1]
  np.testing.assert_allclose(places[alone], np.array(wanted)[alone])


def test_equal_lines_and_those_that_no_eye_tells_apart_have_one_name():
  x = np.linspace(0, 1, 50)
  a, near, other = (np.stack([x, y], 1) for y in (x**2, x**2 + 0.002, x**2 + 0.01))
  assert style.alike([a, other, a[::-1], near]) == [([0, 2, 3], '≈'), ([1], '=')]
  assert style.alike([a, a[::-1]]) == [([0, 1], '=')]


@style.paper
def named(values):
  figure, axes = style.figure(1, (4, 3))
  lines = {name: axes.plot([0, 1, 2], y)[0] for name, y in values.items()}
  style.label_ends(axes, lines)
  figure.draw_without_rendering()
  return figure, axes


def test_names_at_ends_do_not_overlap_or_leave_the_page():
  values = {f'line {i}': [i, 1, 1 + i / 100] for i in range(9)}
  values |= {'a very long name of some line in this plot': [0, 0, 9], 'twin': [0, 1, 1]}
  figure, axes = named(values)
  texts = list(axes.texts)
  assert texts[0].get_text() == 'line 0 = twin' and len(texts) == len(values) - 1
  boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
  for a, b in itertools.combinations(boxes, 2):
    assert not a.overlaps(b)
  page = figure.get_window_extent()
  assert all(box.x1 < page.x1 and box.y0 > 0 and box.y1 < page.y1 for box in boxes)
  assert axes.get_window_extent().width > 300  # the names took nothing from it


@pytest.mark.parametrize(
  ('limits', 'expected'),
  [
    ((22, 44), ['20', '25', '30', '35', '40', '45']),
    ((0.9, 60), ['0.5', '1', '2', '5', '10', '20', '50', '100']),
  ],
)
def test_logarithmic_ticks_are_plain_numbers(limits, expected):
  _, axes = style.figure(1, (4, 3))
  axes.set(yscale='log', ylim=limits)
  style.plain_numbers(axes.yaxis)
  shown = {axes.yaxis.get_major_formatter()(tick) for tick in axes.yaxis.get_majorticklocs()}
  inside = {text for text in expected if limits[0] <= float(text) <= limits[1]}
  assert inside <= shown and not any('10^' in text for text in shown)


def test_curves_are_drawn_from_their_table_alone(tmp_path):
  rows = ['plot,line,x,mean,least,greatest']
  for plot, line in itertools.product(('loss', 'fd_pixels', 'fd_x', 'density'), 'abc'):
    rows += [f'{plot},{line},{x},{1 + x},{x},{2 + x}' for x in (4, 8)]
  (tmp_path / 'curves.csv').write_text('\n'.join(rows))
  plot_curves(tmp_path / 'curves.csv', tmp_path)
  found = {path.stem for path in tmp_path.glob('*.png')}
  assert found == {'loss', 'fd_pixels', 'fd_x', 'density'}


def test_all_that_draws_has_the_one_style():
  """Whoever makes a figure does so by `style`, in a function that it decorates."""
  for folder in ('vdm', 'examples', 'benchmarks'):
    for path in (ROOT / folder).rglob('*.py'):
      text = path.read_text()
      if path.name != 'style.py':
        assert 'Figure(' not in text and 'savefig' not in text and 'pyplot' not in text, path
      for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and 'style.figure(' in ast.unparse(node.body):
          assert 'style.paper' in map(ast.unparse, node.decorator_list), f'{path}: {node.name}'


def test_a_style_ends_with_what_it_draws():
  before = dict(matplotlib.rcParams)
  named({'a': [1, 2, 3]})
  assert dict(matplotlib.rcParams) == before
