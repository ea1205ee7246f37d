"""Pictures and measures of samples that are no images."""

import types

import jax
import numpy as np
import pytest

from vdm import style
from vdm.data.gaussian_field import GaussianField
from vdm.data.source import of_arrays
from vdm.evaluation import field_report
from vdm.sampling.picture import flat_pictures, image_grid


def study_of(tmp_path, field, count=200, conditional=True):
  u, y = field.draw(np.random.RandomState(0), count)
  source = of_arrays(u, condition=y) if conditional else of_arrays(u)
  config = {'model': {'padding': 'periodic'}}
  return types.SimpleNamespace(folder=tmp_path, source=source, config=config), y


def test_draws_from_the_exact_posterior_cover_and_have_the_power(tmp_path):
  field = GaussianField((8, 8), -2.0, 1.0, noise_std=0.5)
  of, y = study_of(tmp_path, field)
  samples = field.posterior_samples(np.random.RandomState(1), y, 15)
  draw = lambda params, count: iter(samples.reshape(-1, 8, 8, 1).reshape(3, -1, 8, 8, 1))
  scalars, pictures, text = field_report.make_report(of, draw, 200, 15)(None, 3)
  for kind in ('pixels', 'modes'):
    assert scalars[f'coverage_{kind}_68'] == pytest.approx(0.68, abs=0.01)
    assert scalars[f'coverage_{kind}_95'] == pytest.approx(0.95, abs=0.01)
  assert scalars['power_ratio_worst'] == pytest.approx(1, abs=0.15)
  share = scalars['coverage_modes_95']
  assert 'central intervals hold the truth: pixels 68%: ' in text
  assert f'modes 95%: {share:.1%} ± ' in text
  assert set(pictures) == {'samples', 'power', 'histogram', 'correlation', 'conditional'}
  assert all(p.dtype == np.uint8 and p.shape[2] == 3 for p in pictures.values())
  rows = (tmp_path / 'tables/power_00000003.csv').read_text().splitlines()
  assert rows[0].startswith('cycles_per_pixel,channel') and len(rows) > 4


def test_too_narrow_draws_do_not_cover(tmp_path):
  field = GaussianField((8, 8), -2.0, 1.0, noise_std=0.5)
  of, y = study_of(tmp_path, field)
  mean = field.posterior(y).mean
  samples = field.posterior_samples(np.random.RandomState(1), y, 15)
  narrow = mean + 0.5 * (samples - mean)
  draw = lambda params, count: iter([narrow.reshape(-1, 8, 8, 1).astype(np.float32)])
  scalars, _, _ = field_report.make_report(of, draw, 200, 15)(None, 3)
  assert scalars['coverage_pixels_95'] < 0.9 and scalars['coverage_modes_68'] < 0.6


@pytest.mark.parametrize('shape', [(16,), (4, 4, 4)])
def test_other_numbers_of_axes_without_conditions(shape, tmp_path, monkeypatch):
  field = GaussianField(shape, -2.0, 1.0)
  of, _ = study_of(tmp_path, field, 20, conditional=False)
  own, _ = field.draw(np.random.RandomState(1), 20)
  report = field_report.make_report(of, lambda params, count: iter([own]), 20, 1)
  scalars, pictures, _ = report(None, 3)
  assert set(scalars) == {'power_ratio_worst'}
  assert set(pictures) == {'samples', 'power', 'histogram'}
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  assert report(None, 4) == ({}, {}, '')


def test_any_number_of_axes_as_pictures():
  pixels = np.arange(2 * 5 * 4 * 3).reshape(2, 5, 4, 3, 1).astype(np.uint8)
  np.testing.assert_array_equal(flat_pictures(pixels), pixels[:, 2])
  np.testing.assert_array_equal(flat_pictures(pixels[0]), pixels[0])
  line = np.array([[[0], [255], [128], [128]]], np.uint8)
  drawn = flat_pictures(line)
  assert drawn.shape == (1, 16, 4, 1)
  assert drawn[0, -1, 0, 0] == 0 and drawn[0, 0, 1, 0] == 0  # low at the bottom, high at the top
  assert (drawn[0, :, 1, 0] == 0).all()  # joined to the one before
  assert (drawn[0, :, 3, 0] == 0).sum() == 1
  assert image_grid(flat_pictures(np.repeat(line, 3, axis=2))).ndim == 3
  two = np.arange(24, dtype=np.uint8).reshape(1, 4, 3, 2)
  drawn = flat_pictures(two)
  assert drawn.shape == (1, 4, 3 + 1 + 3, 1) and (drawn[:, :, 3] == style.FRAME).all()
  np.testing.assert_array_equal(drawn[..., :3, 0], two[..., 0])
  np.testing.assert_array_equal(drawn[..., 4:, 0], two[..., 1])


def test_what_a_mask_leaves_out_counts_nowhere(tmp_path):
  """Perfect draws cover, and have the power, whatever truth and samples are under the mask."""
  field = GaussianField((8, 8), -2.0, 1.0, mean=5.0, noise_std=0.5)
  u, y = field.draw(np.random.RandomState(0), 200)
  valid = np.random.RandomState(2).rand(200, 8, 8, 1) < 0.6
  source = of_arrays(np.where(valid, u, 0), condition=y, valid=valid)
  config = {'model': {'padding': 'periodic'}}
  of = types.SimpleNamespace(folder=tmp_path, source=source, config=config)
  samples = field.posterior_samples(np.random.RandomState(1), y, 15)
  samples = np.where(valid, samples, 5.5).reshape(-1, 8, 8, 1)
  draw = lambda params, count: iter([samples])
  scalars, _, _ = field_report.make_report(of, draw, 200, 15)(None, 3)
  for kind in ('pixels', 'modes'):
    assert scalars[f'coverage_{kind}_68'] == pytest.approx(0.68, abs=0.015)
    assert scalars[f'coverage_{kind}_95'] == pytest.approx(0.95, abs=0.015)
  assert scalars['power_ratio_worst'] == pytest.approx(1, abs=0.15)


def test_a_single_pixel_has_no_spectrum(tmp_path):
  u, vector = np.random.RandomState(0).normal(size=(2, 20, 1, 3))
  source = of_arrays(u, vector=vector[:, 0])
  of = types.SimpleNamespace(folder=tmp_path, source=source, config={'model': {}})
  own = np.random.RandomState(1).normal(size=(40, 1, 3))
  scalars, pictures, _ = field_report.make_report(of, lambda *_: iter([own]), 20, 2)(None, 3)
  assert set(pictures) == {'histogram'} and 'power_ratio_worst' not in scalars
