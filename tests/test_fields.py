"""Measures of fields: on 1, 2 and 3 axes, against closed forms and the exact posterior."""

import numpy as np
import pytest

from vdm.data.gaussian_field import GaussianField
from vdm.evaluation import fields

SHAPES = [(31,), (12, 9), (6, 4, 8)]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
  return request.param


def noise(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def test_white_noise_has_its_variance_at_every_frequency(shape):
  frequency, power = fields.power_spectrum(np.array([1.0, 3.0]) * noise(2000, *shape, 2))
  assert power.shape == (2000, len(frequency), 2)
  assert frequency[0] == pytest.approx(1 / max(shape), rel=0.3) and (np.diff(frequency) > 0).all()
  error = power.std(axis=0) / np.sqrt(2000)
  assert (np.abs(power.mean(axis=0) - [1, 9]) < 4.5 * error).all()


def test_powers_are_mean_squares_as_parseval_says(shape):
  """Each shell weighted by its number of modes, for a field without its mean."""
  u = noise(3, *shape, 2)
  u -= u.mean(axis=tuple(range(1, u.ndim - 1)), keepdims=True)
  axes = np.meshgrid(*map(np.fft.fftfreq, shape), indexing='ij')
  shell = np.round(np.sqrt(sum(a**2 for a in axes)) * max(shape)).astype(int)
  count = np.unique(shell, return_counts=True)[1][1:]
  _, power = fields.power_spectrum(u)
  total = (power * count[:, None]).sum(axis=1) / np.prod(shape)
  np.testing.assert_allclose(total, (u**2).reshape(3, -1, 2).mean(axis=1))
  modes = fields.real_modes(u)
  assert modes.shape == (3, np.prod(shape), 2)
  np.testing.assert_allclose((modes**2).mean(axis=1), total)


def test_a_wave_has_its_power_at_its_frequency():
  x = np.arange(32)
  wave = np.sqrt(2) * np.cos(2 * np.pi * (5 * x[:, None] + 0 * x) / 32)[None, ..., None]
  frequency, power = fields.power_spectrum(wave)
  at = np.argmax(power[0, :, 0])
  assert frequency[at] == pytest.approx(5 / 32, abs=0.25 / 32)
  np.testing.assert_allclose(np.delete(power[0, :, 0], at), 0, atol=1e-20)


def test_a_wave_has_all_its_power_at_its_frequency():
  x = np.cos(2 * np.pi * 3 / 16 * np.arange(16))[None, None, :, None] * np.ones((1, 16, 1, 1))
  frequency, power = fields.power_spectrum(x)
  power = power[0, :, 0]
  peak = np.argmax(power)
  assert abs(frequency[peak] - 3 / 16) < 0.5 / 16
  assert power[peak] > 100 * np.delete(power, peak).max()


def test_a_field_has_its_own_spectrum():
  field = GaussianField((24, 16), -3.0, 2.0, 5.0)
  u, _ = field.draw(np.random.default_rng(0), 2000)
  _, power = fields.power_spectrum(u)
  # the same shells of P_k: a field whose modes are sqrt(P_k)
  root = np.fft.ifftn(np.sqrt(field.power), norm='ortho').real[None, ..., None]
  exact = fields.power_spectrum(root)[1][0]
  error = power.std(axis=0) / np.sqrt(2000)
  assert (np.abs(power.mean(axis=0) - exact) < 4.5 * error).all()


def test_a_window_keeps_white_noise_and_stops_the_leak_of_a_slope(shape):
  frequency, power = fields.power_spectrum(noise(2000, *shape, 1), periodic=False)
  inside = frequency > 3 / min(shape)  # whose neighbours the removed mean is none of
  error = power.std(axis=0) / np.sqrt(2000)
  assert (np.abs(power.mean(axis=0) - 1) < 4.5 * error)[inside].all()
  slope = np.linspace(0.0, 1.0, 64)[None, :, None]
  leaks = [
    fields.power_spectrum(slope, periodic=periodic)[1][0, -1, 0] for periodic in (True, False)
  ]
  assert leaks[1] < 1e-3 * leaks[0]


def test_a_field_correlates_with_itself_and_not_with_another(shape):
  a, b = noise(2, 500, *shape, 2)
  frequency, r = fields.cross_correlation(a, a)
  assert r.shape == (500, len(frequency), 2)
  np.testing.assert_allclose(r, 1)
  np.testing.assert_allclose(fields.cross_correlation(a, -2 * a)[1], -1)
  np.testing.assert_allclose(fields.cross_correlation(a, 3 + 2 * a, periodic=False)[1], 1)
  _, r = fields.cross_correlation(a, b)
  assert (np.abs(r.mean(axis=0)) < 4.5 * r.std(axis=0) / np.sqrt(500)).all()
  assert not fields.cross_correlation(a, np.zeros_like(a))[1].any()
  with pytest.raises(ValueError, match=r'^b='):
    fields.cross_correlation(a, b[:1])


def test_correlation_with_the_truth_is_that_of_the_posterior_mean():
  """<u m*> = <|m|^2> for the posterior mean m, so that r^2 = 1 - var(u_k | y) / P_k over examples.

  In 1-D a shell is k and -k, so that r of one example is that of one mode.
  """
  field = GaussianField((16,), -2.0, 1.0, blur=1.0, noise_std=0.3)
  u, y = field.draw(np.random.default_rng(0), 20000)
  mean, mode_std, _ = field.posterior(y)
  a, b = (np.fft.fft(v[..., 0], norm='ortho')[:, 1:8] for v in (u, mean))
  exact = np.sqrt(1 - (mode_std**2 / field.power)[1:8])
  r = fields.cross_correlation(u, mean)[1][:, :7, 0]
  pooled = (a * b.conj()).real.mean(0) / np.sqrt((abs(a) ** 2).mean(0) * (abs(b) ** 2).mean(0))
  np.testing.assert_allclose(pooled, exact, atol=0.02)
  np.testing.assert_allclose(r, (a * b.conj()).real / abs(a) / abs(b), atol=1e-6)


def test_histograms_are_those_of_numpy(shape):
  u = noise(4, *shape, 2).round(1)
  edges = np.array([-1.0, -0.5, 0.0, 1.5])
  density = fields.histogram(u, edges)
  assert density.shape == (4, 3, 2)
  for n in range(4):
    for c in range(2):
      count, _ = np.histogram(u[n, ..., c], edges)
      np.testing.assert_allclose(density[n, :, c] * np.diff(edges) * np.prod(shape), count)
  with pytest.raises(ValueError, match=r'^edges='):
    fields.histogram(u, edges[::-1])


POSTERIOR = GaussianField((8, 8), -3.0, 1.0, blur=0.8, noise_std=0.3, subsample=2)


@pytest.mark.parametrize('num_samples', [2, 5, 50])
def test_samples_of_the_posterior_cover_the_truth_as_often_as_they_say(num_samples):
  u, y = POSTERIOR.draw(np.random.default_rng(0), 400)
  samples = POSTERIOR.posterior_samples(np.random.default_rng(1), y, num_samples)
  found = fields.coverage(samples, u, (0.3, 0.68, 0.95))
  for share in (found.pixels, found.modes):
    assert (np.abs(share.value - [0.3, 0.68, 0.95]) < 4 * share.stderr).all()
    assert (share.stderr < 0.02).all()


@pytest.mark.parametrize('factor', [0.7, 1.4])
def test_samples_that_spread_too_little_or_too_much_are_seen(factor):
  u, y = POSTERIOR.draw(np.random.default_rng(0), 400)
  samples = POSTERIOR.posterior_samples(np.random.default_rng(1), y, 50)
  mean = POSTERIOR.posterior(y).mean
  found = fields.coverage(mean + factor * (samples - mean), u)
  for share in (found.pixels, found.modes):
    assert (np.sign(factor - 1) * (share.value - [0.68, 0.95]) > 6 * share.stderr).all()


def test_a_wrong_scale_shows_in_modes_where_pixels_are_right():
  """Pixels that are drawn one by one from their marginals have no scales."""
  u, y = POSTERIOR.draw(np.random.default_rng(0), 400)
  mean, _, pixel_std = POSTERIOR.posterior(y)
  found = fields.coverage(mean + pixel_std[..., None] * noise(50, *u.shape), u)
  assert (np.abs(found.pixels.value - [0.68, 0.95]) < 4 * found.pixels.stderr).all()
  assert (np.abs(found.modes.value - [0.68, 0.95]) > 10 * found.modes.stderr).any()


@pytest.mark.parametrize(
  'measured', [lambda u: np.maximum(u, 0), lambda u: np.clip(np.round(u), -1, 1), np.sign]
)
def test_values_that_tie_are_covered_as_often_as_others(measured):
  """Rain that does not fall, or pixels of few values, are no merit of the samples."""
  mean = np.random.default_rng(1).normal(0, 1, (300, 6, 6, 1))
  samples, truth = (
    measured(mean + noise(16, *mean.shape)),
    measured(mean + noise(*mean.shape, seed=2)),
  )
  assert (samples == truth).mean() > 0.1
  found = fields.coverage(samples, truth)
  assert (np.abs(found.pixels.value - [0.68, 0.95]) < 4 * found.pixels.stderr).all()


def test_one_example_has_a_coverage_without_an_error_and_ties_tell_nothing():
  found = fields.coverage(np.zeros((9, 1, 4, 1)), np.zeros((1, 4, 1)))
  np.testing.assert_allclose(found.pixels.value, [0.68, 0.95])
  assert np.isnan(found.pixels.stderr).all()
  with pytest.raises(ValueError, match=r'^samples='):
    fields.coverage(np.zeros((9, 2, 4, 1)), np.zeros((1, 4, 1)))
  with pytest.raises(ValueError, match=r'^levels='):
    fields.coverage(np.zeros((9, 1, 4, 1)), np.zeros((1, 4, 1)), (68,))


@pytest.mark.parametrize('shared', [True, False])
def test_the_error_of_the_power_ratio_is_its_scatter(shared):
  """Samples of an example are alike; those of the data's own conditions vary with the data."""
  found, rng, each = [], np.random.default_rng(0), 8
  for _ in range(200):
    scale = rng.gamma(4, size=(40, 1, 1)) if shared else 1
    of = lambda *shape, scale=scale: scale * rng.normal(size=(*shape, 40, 12, 1))
    data, samples = of(), 1.1 * of(each)
    table = fields.compare_power(samples.reshape(-1, 12, 1), data, each=each * shared)
    found.append((table['power_ratio'][2, 0], table['power_ratio_stderr'][2, 0]))
  ratio, error = np.array(found).T
  assert ratio.mean() == pytest.approx(1.21, abs=4 * ratio.std() / np.sqrt(200))
  assert np.sqrt((error**2).mean()) == pytest.approx(ratio.std(), rel=0.15)


def test_the_table_compares_samples_with_data():
  field = GaussianField((16, 16), -3.0, 2.0, 1.0)
  data, _ = field.draw(np.random.default_rng(0), 500)
  samples, _ = field.draw(np.random.default_rng(1), 300)
  table = fields.compare_power(1.5 * samples, data) | fields.compare_values(1.5 * samples, data)
  pull = (table['power_ratio'] - 2.25) / table['power_ratio_stderr']
  assert (np.abs(pull) < 4).all() and 0.5 < pull.std() < 1.6
  for name in ('samples', 'data'):
    mean, low, high = (table[f'power_{name}{end}'] for end in ('', '_low', '_high'))
    assert (low < mean).all() and (mean < high).all()
    share = (table[f'density_{name}'] * np.diff(table['edges'], axis=0)).sum()
    np.testing.assert_allclose(share, 1)
  np.testing.assert_allclose(table['std_samples'], 1.5 * samples.std(), rtol=1e-4)
  assert all(v.ndim <= 2 for v in table.values())
