import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm import samplers
from vdm.gaussian import Prediction, alpha, expand_to, fold_in, sigma
from vdm.schedules import SCHEDULES

MEAN = np.array([0.3, -0.5])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])


def denoiser(z, log_snr):
  """E[x | z] for x ~ N(MEAN, COVARIANCE): mu + a C (a^2 C + s^2 I)^-1 (z - a mu)."""
  a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
  a2, s2 = a[..., None] ** 2, s[..., None] ** 2
  noisy = a2 * COVARIANCE[None] + s2 * jnp.eye(2)[None]
  gain = a[..., None] * jnp.linalg.solve(noisy, jnp.broadcast_to(COVARIANCE, noisy.shape))
  x = MEAN[None] + jnp.einsum('bji,bj->bi', gain, z - a * MEAN[None])
  return Prediction(x, (z - a * x) / s)


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_ancestral_samples_have_the_mean_and_covariance_of_the_data(schedule, key):
  count = 20_000
  schedule = SCHEDULES[schedule](log_snr_min=-10.0, log_snr_max=10.0)
  keys = fold_in(key, jnp.arange(count))
  grid = samplers.time_grid(schedule, 400)
  x = jax.jit(lambda keys: samplers.sample(keys, samplers.ancestral, denoiser, grid, (2,)))(
    keys
  ) / alpha(grid[-1])
  x = np.float64(x)
  # five standard errors, and 2 % for the finite number of steps
  np.testing.assert_allclose(x.mean(axis=0), MEAN, atol=5 * np.sqrt(0.5 / count))
  np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=5 * 0.5 * np.sqrt(2 / count) + 0.01)


def test_a_sample_depends_on_its_own_key_alone(key):
  grid = samplers.time_grid(SCHEDULES['linear'](log_snr_min=-5.0, log_snr_max=5.0), 5)
  keys = fold_in(key, jnp.arange(6))
  whole = samplers.sample(keys, samplers.ancestral, denoiser, grid, (2,))
  part = samplers.sample(keys[4:], samplers.ancestral, denoiser, grid, (2,))
  np.testing.assert_allclose(whole[4:], part, rtol=1e-5)
  assert np.abs(whole[0] - whole[1]).min() > 0


def test_time_grid_goes_from_noise_to_data():
  grid = samplers.time_grid(SCHEDULES['cosine'](log_snr_min=-5.0, log_snr_max=8.0), 7)
  assert grid.shape == (8,) and np.all(np.diff(grid) > 0)
  np.testing.assert_allclose([grid[0], grid[-1]], [-5, 8], rtol=1e-5)


def test_the_last_step_with_a_perfect_prediction_returns_the_data(key):
  x = jnp.array([[0.2, -0.7]])
  perfect = lambda z, log_snr: Prediction(x, (z - expand_to(alpha(log_snr), z) * x))
  grid = jnp.array([-2.0, 1.0, 12.0])
  z = samplers.sample(key[None], samplers.ancestral, perfect, grid, (2,))
  np.testing.assert_allclose(z / alpha(jnp.float32(12.0)), x, atol=5 * np.exp(-6))
