"""Plots of fields: pictures that show the numbers they were given, with units."""

import numpy as np
import pytest
from PIL import Image

from vdm import style
from vdm.evaluation import field_plots, fields


@pytest.fixture(params=[(31,), (12, 9), (6, 4, 8)], ids=str)
def shape(request):
  return request.param


def noise(*shape):
  return np.random.default_rng(0).standard_normal(shape)


@pytest.fixture
def figures(monkeypatch):
  """The figures that are saved."""
  seen = []
  save = style.save
  monkeypatch.setattr(style, 'save', lambda f, path: seen.append(f) or save(f, path))
  return seen


def is_picture(picture, path):
  with Image.open(path) as image:
    np.testing.assert_array_equal(np.asarray(image)[..., :3], picture)
  return picture.dtype == np.uint8 and picture.std() > 5


def test_plots_of_statistics_are_pictures_with_units(shape, figures, tmp_path):
  data, samples = noise(2, 20, *shape, 2)
  path = tmp_path / 'plots' / 'plot.png'
  table = fields.compare_power(samples, data)
  assert is_picture(field_plots.plot_power(table, path, ('one', 'two')), path)
  assert is_picture(field_plots.plot_histogram(samples, data, path), path)
  assert is_picture(field_plots.plot_cross_correlation({'sample': samples}, data, path), path)
  power, pixels, correlation = figures
  labels = [(axes.get_xlabel(), axes.get_ylabel()) for f in figures for axes in f.axes]
  assert labels[0] == ('', 'power (data units²)') and labels[2][1].startswith('samples / data')
  assert labels[2][0] == labels[-1][0] == 'spatial frequency (cycles per pixel)'
  assert [axes.get_title('left') for axes in power.axes] == ['one', 'two', '', '']
  assert [axes.get_title('left') for axes in pixels.axes] == ['channel 0', 'channel 1']
  assert correlation.axes[0].get_ylim()[1] == 1.02


@pytest.mark.parametrize('channels', [1, 2])
def test_slices_are_pictures_of_every_field_and_channel(shape, channels, figures, tmp_path):
  u = noise(3, *shape, channels) + 9 * (np.arange(channels) == 1)  # the second has one sign
  assert is_picture(field_plots.plot_slices(u, tmp_path / 'u.png'), tmp_path / 'u.png')
  axes = figures[0].axes
  if len(shape) == 1:
    assert len(axes) == 3 * channels
    np.testing.assert_array_equal(axes[channels].lines[0].get_ydata(), u[1, :, 0])
    return
  images = [a.images[0] for a in axes if a.images]
  if len(shape) == 2:
    shown = [field for c in range(channels) for field in u[..., c]]
  else:
    rows = [field for c in range(channels) for field in u[..., c]]
    shown = [cut for field in rows for cut in (field[3], field[:, 2], field[:, :, 4])]
    assert [a.get_title('center') for a in axes[:3]] == [
      'axis 1 at 3',
      'axis 2 at 2',
      'axis 3 at 4',
    ]
  assert len(axes) == len(images) + channels  # a bar each
  for image, field in zip(images, shown, strict=True):
    np.testing.assert_array_equal(image.get_array(), field)
  most = np.abs(np.percentile(u[..., 0], (0.5, 99.5))).max()
  assert (images[0].get_cmap().name, images[0].get_clim()) == ('RdBu_r', (-most, most))
  if channels == 2:
    assert images[-1].get_cmap().name == 'viridis' and images[-1].get_clim()[0] > 0


def test_rows_show_condition_samples_their_mean_and_the_truth(shape, figures, tmp_path):
  truth, samples = noise(2, *shape, 2), noise(7, 2, *shape, 2)
  condition = truth[:, ::3, ..., :1]
  assert is_picture(
    field_plots.plot_rows(condition, samples, truth, tmp_path / 'r.png', 1), tmp_path / 'r.png'
  )
  names = ['condition', 'sample 1', 'sample 2', 'sample 3', 'mean of 7', 'truth']
  draws = samples[:, 1, ..., 1]
  shown = [condition[1, ..., 0], *draws[:3], draws.mean(axis=0), truth[1, ..., 1]]
  if len(shape) == 1:
    lines = figures[0].axes[1].lines
    assert [line.get_label() for line in lines] == names
    got = [line.get_ydata() for line in lines]
  else:
    axes = [axes for axes in figures[0].axes if axes.images]
    assert [a.get_title('center') for a in axes] == names + [''] * 6
    got = [a.images[0].get_array() for a in axes[6:]]
  if len(shape) == 3:
    shown = [u[len(u) // 2] for u in shown]
  for a, b in zip(got, shown, strict=True):
    np.testing.assert_array_equal(a, b)
