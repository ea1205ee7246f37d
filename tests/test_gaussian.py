import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm import gaussian
from vdm.gaussian import HEADS

LOG_SNRS = np.linspace(-13, 13, 53)


def test_alpha_and_sigma_are_exact_in_float32_far_from_zero():
  exact_a = 1 / np.sqrt(1 + np.exp(-LOG_SNRS))
  exact_s = 1 / np.sqrt(1 + np.exp(LOG_SNRS))
  np.testing.assert_allclose(gaussian.alpha(jnp.float32(LOG_SNRS)), exact_a, rtol=1e-6)
  np.testing.assert_allclose(gaussian.sigma(jnp.float32(LOG_SNRS)), exact_s, rtol=1e-6)
  assert gaussian.sigma(jnp.float32(18.0)) > 0  # sqrt(1 - alpha^2) is 0 here


def target(head, x, eps, a, s):
  return {'eps': eps, 'x': x, 'v': a * eps - s * x}[head]


@pytest.mark.parametrize('head', HEADS)
def test_heads_return_the_data_and_the_noise_they_stand_for(head, key):
  log_snr = jnp.linspace(-6.0, 6.0, 16)
  x, eps = jax.random.normal(key, (2, 16, 3, 2, 1))
  a, s = (gaussian.expand_to(f(log_snr), x) for f in (gaussian.alpha, gaussian.sigma))
  z = gaussian.q_sample(x, eps, log_snr)
  prediction = gaussian.to_prediction(head, target(head, x, eps, a, s), z, log_snr)
  np.testing.assert_allclose(prediction.x, x, atol=2e-4)
  np.testing.assert_allclose(prediction.eps, eps, atol=2e-4)


@pytest.mark.parametrize('head', HEADS)
def test_any_output_of_a_head_is_consistent_with_z(head, key):
  """alpha x_hat + sigma eps_hat = z whatever the network says."""
  log_snr = jnp.linspace(-6.0, 6.0, 16)
  output, z = jax.random.normal(key, (2, 16, 5))
  x, eps = gaussian.to_prediction(head, output, z, log_snr)
  np.testing.assert_allclose(gaussian.q_sample(x, eps, log_snr), z, atol=1e-4)


def test_posterior_is_bayes_rule():
  """q(z_s | z_t, x) is proportional to q(z_t | z_s) q(z_s | x), completed square by hand."""
  log_snr_t, log_snr_s, x, z_t = -1.3, 0.7, 0.4, -0.9
  sq = lambda log_snr: (1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr)))
  (a2t, s2t), (a2s, s2s) = sq(log_snr_t), sq(log_snr_s)
  a_ts = np.sqrt(a2t / a2s)
  s2_ts = s2t - a_ts**2 * s2s
  precision = a_ts**2 / s2_ts + 1 / s2s
  mean = (a_ts * z_t / s2_ts + np.sqrt(a2s) * x / s2s) / precision
  got_mean, got_variance = gaussian.posterior(
    *(jnp.array([v], jnp.float32) for v in (z_t, x, log_snr_t, log_snr_s))
  )
  np.testing.assert_allclose(got_mean[0], mean, rtol=1e-5)
  np.testing.assert_allclose(got_variance[0], 1 / precision, rtol=1e-5)


def test_posterior_of_no_step_is_z_and_of_the_whole_way_is_x():
  z, x = jnp.array([[0.3]]), jnp.array([[-0.8]])
  mean, variance = gaussian.posterior(z, x, jnp.array([1.0]), jnp.array([1.0]))
  np.testing.assert_allclose(mean, z, rtol=1e-6)
  np.testing.assert_allclose(variance, 0, atol=1e-7)
  mean, variance = gaussian.posterior(z, x, jnp.array([1.0]), jnp.array([30.0]))
  np.testing.assert_allclose(mean, x, rtol=1e-5)


def test_slope_is_the_derivative(key):
  schedule = lambda t: 5 - 3 * t - 4 * t**3
  t = jnp.linspace(0.0, 1.0, 9)
  log_snr, slope = gaussian.log_snr_and_slope(schedule, t)
  np.testing.assert_allclose(log_snr, schedule(t))
  np.testing.assert_allclose(slope, -3 - 12 * t**2, rtol=1e-6)


def test_kl_to_standard_normal_against_quadrature():
  grid = np.linspace(-12, 12, 200_001)
  mean, variance = 0.7, 0.4
  p = np.exp(-((grid - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
  log_q = -(grid**2) / 2 - np.log(2 * np.pi) / 2
  exact = np.trapezoid(p * (np.log(p + 1e-300) - log_q), grid)
  got = gaussian.kl_to_standard_normal(jnp.full((1, 2), mean), jnp.full((1, 2), variance))
  np.testing.assert_allclose(got, [2 * exact], rtol=1e-5)


def test_noise_of_an_example_does_not_depend_on_the_others(key):
  index = jnp.arange(8)
  whole = gaussian.standard_normal(gaussian.fold_in(key, index), (4, 3))
  part = gaussian.standard_normal(gaussian.fold_in(key, index[5:]), (4, 3))
  np.testing.assert_array_equal(whole[5:], part)
  assert len(np.unique(whole)) == whole.size
