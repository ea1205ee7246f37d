"""Gaussian random fields against dense linear algebra on small grids."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.stats import multivariate_normal

from vdm.data import gaussian_field
from vdm.data.gaussian_field import GaussianField

FIELDS = {
  '1d': GaussianField((12,), -2.0, 1.5, 0.3, blur=0.7, noise_std=0.4, subsample=3),
  '2d': GaussianField((6, 4), -3.0, 0.5, -1.0, blur=0.4, noise_std=0.1, subsample=2),
  '3d': GaussianField((4, 2, 6), -1.0, 2.0, blur=0.5, noise_std=0.7, subsample=2),
  'odd': GaussianField((5, 3), -4.0, 1.0, 2.0, cutoff=0.2, blur=0.8, noise_std=0.3),
  'no_blur': GaussianField((9,), 1.0, 1.0, noise_std=0.3, subsample=9),
}


@pytest.fixture(params=FIELDS)
def field(request):
  return FIELDS[request.param]


class Unit:
  """Draws the unit vectors in place of noise, so that what is linear in it is seen as a matrix."""

  def standard_normal(self, shape):
    return np.eye(*shape)


def dense(field):
  """The covariance of u [D D] and the observation's matrix H [D' D], from their definitions."""
  grid = np.stack(np.meshgrid(*map(np.arange, field.shape), indexing='ij'), -1)
  pixels = grid.reshape(-1, len(field.shape))
  k = (pixels + np.array(field.shape) // 2) % field.shape - np.array(field.shape) // 2
  k = k / field.shape
  square = (k**2).sum(axis=1)
  power = ((field.cutoff or 1 / max(field.shape)) ** 2 + square) ** (field.exponent / 2)
  power *= field.std**2 / power.mean()
  blur = np.exp(-2 * np.pi**2 * field.blur**2 * square)
  difference = pixels[:, None] - pixels[None]
  waves = np.cos(2 * np.pi * difference @ k.T) / len(pixels)
  kept = ~(pixels % field.subsample).any(axis=1)
  return waves @ power, (waves @ blur)[kept]


def dense_posterior(field):
  """The matrix that takes y - mean to E[u | y] - mean, and Cov(u | y)."""
  cov, h = dense(field)
  matrix = cov @ h.T @ np.linalg.inv(h @ cov @ h.T + field.noise_std**2 * np.eye(len(h)))
  return matrix, cov - matrix @ h @ cov


def flat(a):
  return np.asarray(a, np.float64).reshape(len(a), -1)


def test_fields_and_observations_have_their_covariance(field):
  cov, h = dense(field)
  u, y = map(flat, field.of_white(np.eye(field.num_white)))
  u, y = u - field.mean, y - field.mean
  np.testing.assert_allclose(u.T @ u, cov, atol=1e-12)
  np.testing.assert_allclose(u.T @ y, cov @ h.T, atol=1e-12)
  noise = field.noise_std**2 * np.eye(len(h))
  np.testing.assert_allclose(y.T @ y, h @ cov @ h.T + noise, atol=1e-12)
  np.testing.assert_allclose(np.diag(cov), field.std**2)
  u, y = field.draw(np.random.default_rng(0), 2)
  assert u.shape == (2, *field.shape, 1) and y.shape == (2, *field.observed_shape, 1)
  assert u.dtype == y.dtype == np.float32


def test_densities_are_those_of_dense_normals(field):
  u, y = field.draw(np.random.default_rng(0), 5)
  cov, _ = dense(field)
  matrix, cov_given = dense_posterior(field)
  exact = multivariate_normal(np.full(len(cov), field.mean), cov).logpdf(flat(u))
  np.testing.assert_allclose(field.log_prob(u), exact, rtol=1e-9)
  means = field.mean + (flat(y) - field.mean) @ matrix.T
  exact = [
    multivariate_normal(mean, cov_given).logpdf(row)
    for mean, row in zip(means, flat(u), strict=True)
  ]
  np.testing.assert_allclose(field.log_prob_given(u, y), exact, rtol=1e-8)


def test_the_posterior_is_that_of_dense_matrices(field):
  _, y = field.draw(np.random.default_rng(0), 3)
  matrix, cov = dense_posterior(field)
  posterior = field.posterior(y)
  mean = field.mean + (flat(y) - field.mean) @ matrix.T
  np.testing.assert_allclose(flat(posterior.mean), mean, atol=1e-9)
  np.testing.assert_allclose(posterior.pixel_std.ravel() ** 2, np.diag(cov), atol=1e-12)
  axes = range(1, len(field.shape) + 1)
  unit = np.eye(len(cov)).reshape(-1, *field.shape)
  modes = np.fft.fftn(unit, axes=axes, norm='ortho').reshape(len(cov), -1)
  variance = np.diag(modes.T @ cov @ modes.conj()).real
  np.testing.assert_allclose(posterior.mode_std.ravel() ** 2, variance, atol=1e-12)


def test_samples_have_the_posterior_as_their_distribution(field):
  """They are linear in the noise, so that their covariance is seen without drawing any."""
  _, y = field.draw(np.random.default_rng(0), 1)
  samples = field.posterior_samples(Unit(), y, field.num_white)
  assert samples.shape == (field.num_white, 1, *field.shape, 1)
  spread = flat(samples) - flat(field.posterior(y).mean)
  np.testing.assert_allclose(spread.T @ spread, dense_posterior(field)[1], atol=1e-5)
  two = field.draw(np.random.default_rng(1), 2)[1]
  samples = field.posterior_samples(np.random.default_rng(2), two, 3)
  swapped = field.posterior_samples(np.random.default_rng(2), two[::-1], 3)
  mean = field.posterior(two).mean
  assert samples.shape == (3, 2, *field.shape, 1)
  expected = np.broadcast_to(mean - mean[::-1], samples.shape)
  np.testing.assert_allclose(samples - swapped, expected, atol=1e-5)


def test_entropies_are_those_of_dense_normals_and_of_draws(field):
  cov, _ = dense(field)
  for got, c in (field.entropy(), cov), (field.conditional_entropy(), dense_posterior(field)[1]):
    exact = 0.5 * (np.log(2 * np.pi * np.e) + np.linalg.slogdet(c)[1] / len(c))
    np.testing.assert_allclose(got, exact, atol=1e-9)
  u, y = field.draw(np.random.default_rng(0), 4000)
  for entropy, log_prob in (
    (field.entropy(), field.log_prob(u)),
    (field.conditional_entropy(), field.log_prob_given(u, y)),
  ):
    error = log_prob.std() / math.sqrt(len(u))
    assert abs(-log_prob.mean() - entropy * len(cov)) < 4 * error


SHIFT, SCALE = 0.7, 1.6  # of the model's units


@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('log_snr', [-8.0, 0.0, 9.0])
def test_the_denoiser_is_the_dense_posterior_mean(field, given, log_snr):
  """x given z = alpha x + sigma eps, and y: both are linear observations of x with white noise."""
  u, y = field.draw(np.random.default_rng(0), 3)
  z = np.random.default_rng(1).standard_normal(u.shape).astype(np.float32)
  cov, h = dense(field)
  mean, cov = (field.mean - SHIFT) / SCALE, cov / SCALE**2
  a, s = (1 + math.exp(-log_snr)) ** -0.5, (1 + math.exp(log_snr)) ** -0.5
  unit = np.eye(len(cov))
  precision = np.linalg.inv(cov) + (a / s) ** 2 * unit
  pull = (flat(z) - a * mean) * a / s**2
  if given:
    noise = field.noise_std / SCALE
    precision += h.T @ h / noise**2
    pull = pull + (flat(y) - field.mean) / SCALE @ h / noise**2
  x = mean + pull @ np.linalg.inv(precision)
  denoise = jax.jit(field.denoiser(SHIFT, SCALE, y if given else None))
  got = denoise(jnp.asarray(z), jnp.full(3, log_snr))
  assert got.x.shape == got.eps.shape == z.shape and got.x.dtype == jnp.float32
  tolerance = 2e-5 * (1 + np.abs(x).max())
  np.testing.assert_allclose(flat(got.x), x, atol=tolerance)
  np.testing.assert_allclose(flat(got.eps), (flat(z) - a * x) / s, atol=tolerance / s)


def squared_errors(field, given, log_snr):
  """E|eps_hat - eps|^2 at each log_snr, a sum of traces, since eps_hat is linear in z and y."""
  cov, h = dense(field)
  cov, size, noise = cov / SCALE**2, len(cov), field.noise_std / SCALE
  field = dataclasses.replace(field, mean=0.0)
  unit = np.eye(size + len(h), dtype=np.float32)
  z = unit[:, :size].reshape(-1, *field.shape, 1)
  y = SCALE * unit[:, size:].reshape(-1, *field.observed_shape, 1)
  denoise = jax.jit(field.denoiser(0.0, SCALE, y if given else None))
  for value in log_snr:
    matrix = flat(denoise(jnp.asarray(z), jnp.full(len(unit), value, jnp.float32)).eps).T
    by_z, by_y = matrix[:, :size], matrix[:, size:]
    a, s = (1 + math.exp(-value)) ** -0.5, (1 + math.exp(value)) ** -0.5
    by_x = a * by_z + by_y @ h
    error = ((np.eye(size) - s * by_z) ** 2).sum() + np.trace(by_x @ cov @ by_x.T)
    yield error + noise**2 * (by_y**2).sum()


@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('name', ['1d', '2d'])
def test_the_bound_of_the_denoiser_is_the_entropy(name, given):
  """I-MMSE: decoder + 1/2 int E|eps_hat - eps|^2 dlog_snr + prior, log-SNR from -16 to 20."""
  field = FIELDS[name]
  low, high = -16.0, 20.0
  nodes, weights = np.polynomial.legendre.leggauss(80)
  log_snr = (low + high) / 2 + (high - low) / 2 * nodes
  size = math.prod(field.shape)
  errors = np.fromiter(squared_errors(field, given, log_snr), float)
  diffusion = 0.5 * (high - low) / 2 * (weights * errors).sum() / size
  recon = 0.5 * (
    math.log(2 * math.pi) + 1 - high
  )  # a normal of std exp(-high / 2) around z_0 / alpha
  a2 = 1 / (1 + math.exp(-low))
  prior = 0.5 * (a2 * ((field.std / SCALE) ** 2) - a2 - math.log1p(-a2))
  exact = field.conditional_entropy() if given else field.entropy()
  np.testing.assert_allclose(diffusion + recon + prior + math.log(SCALE), exact, atol=1e-3)


@pytest.fixture
def data():
  block = dict(exponent=-3.0, std=1.0, mean=0.0, blur=1.0, noise_std=0.5, subsample=2)
  splits = dict(train_split='train', eval_split='test', train_images=12, eval_images=5)
  shapes = dict(image_shape=(8, 4, 1), condition_shape=(1, 1, 1))
  return ConfigDict(dict(name='gaussian_field', gaussian_field=block, **splits, **shapes))


def test_an_example_is_a_function_of_its_split_and_its_number(data, monkeypatch):
  fetch, labels, _, count, _ = gaussian_field.load(data, 'train')
  assert count == 12
  rows = np.array([7, 0, 7])
  batch = fetch(rows)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    'image': ((3, 8, 4, 1), np.float32),
    'label': ((3,), np.int32),
    'condition': ((3, 4, 2, 1), np.float32),
  }
  assert not batch['label'].any() and not labels(rows).any()
  monkeypatch.setattr(gaussian_field, 'CHUNK', 100)  # two at once
  more = gaussian_field.load(ConfigDict(dict(data, train_images=9)), 'train')[0](rows)
  for name in batch:
    np.testing.assert_array_equal(batch[name], more[name])
  every = np.arange(12)
  fields = [fetch(every)['image'], gaussian_field.load(data, 'eval')[0](np.arange(5))['image']]
  assert len(np.unique(flat(np.concatenate(fields)), axis=0)) == 17


def test_a_split_has_the_density_of_its_field(data):
  data.train_images = 3000
  batch = gaussian_field.load(data, 'train')[0](np.arange(3000))
  field = gaussian_field.of(data)
  log_prob = field.log_prob_given(batch['image'], batch['condition'])
  error = log_prob.std() / math.sqrt(3000)
  assert abs(log_prob.mean() + 32 * field.conditional_entropy()) < 4 * error


def test_what_is_found_is_what_is_fetched(data):
  assert gaussian_field.found(data)['condition_shape'] == (4, 2, 1)
  data.condition_shape = ()
  assert gaussian_field.found(data)['condition_shape'] == ()
  assert set(gaussian_field.load(data, 'eval')[0](np.arange(2))) == {'image', 'label'}


@pytest.mark.parametrize(
  ('leaf', 'value', 'message'),
  [
    ('subsample', 3, 'a positive number that divides all of'),
    ('subsample', 0, 'a positive number that divides all of'),
    ('noise_std', 0.0, 'positive'),
    ('std', float('nan'), 'a number'),
    ('blur', -1.0, 'at least 0'),
    ('blurr', 1.0, 'one of exponent, std, mean, cutoff, blur, noise_std, subsample'),
  ],
)
def test_errors_name_the_leaf(data, leaf, value, message):
  data.gaussian_field = ConfigDict(dict(data.gaussian_field) | {leaf: value})
  with pytest.raises(
    ValueError, match=f'^config.data.gaussian_field.{leaf}={value} must be {message}'
  ):
    gaussian_field.load(data, 'train')


@pytest.mark.parametrize(
  ('leaf', 'value'), [('image_shape', (8, 8, 3)), ('image_shape', (8,)), ('train_split', 'valid')]
)
def test_errors_name_the_other_leaves(data, leaf, value):
  data[leaf] = value
  with pytest.raises(ValueError, match=f'^config.data.{leaf}='):
    gaussian_field.load(data, 'train')
