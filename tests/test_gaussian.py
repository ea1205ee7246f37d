import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vdm.configs import digits

from vdm import build
from vdm.diffusion import gaussian, heads
from vdm.diffusion.heads import HEADS
from vdm.nn import MLP

LOG_SNRS = np.linspace(-13, 13, 53)


def test_alpha_and_sigma_are_exact_in_float32_far_from_zero():
  exact_a = 1 / np.sqrt(1 + np.exp(-LOG_SNRS))
  exact_s = 1 / np.sqrt(1 + np.exp(LOG_SNRS))
  np.testing.assert_allclose(gaussian.alpha(jnp.float32(LOG_SNRS)), exact_a, rtol=1e-6)
  np.testing.assert_allclose(gaussian.sigma(jnp.float32(LOG_SNRS)), exact_s, rtol=1e-6)
  assert gaussian.sigma(jnp.float32(18.0)) > 0  # sqrt(1 - alpha^2) is 0 here


def target(head, x, eps, a, s):
  """What the head is to predict, each as its authors define it."""
  if head == 'F':  # EDM: (x - c_skip y) / c_out at y = x + sigma eps, sigma = s / a, sigma_data 1/2
    sigma = s / a
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
    return (x - c_skip * (x + sigma * eps)) / c_out
  return {'eps': eps, 'x': x, 'v': a * eps - s * x, 'o': eps - x, 'score': -eps / s}[head]


@pytest.mark.parametrize('head', HEADS)
def test_heads_return_the_data_and_the_noise_they_stand_for(head, key):
  log_snr = jnp.linspace(-6.0, 6.0, 16)
  x, eps = jax.random.normal(key, (2, 16, 3, 2, 1))
  a, s = (gaussian.expand_to(f(log_snr), x) for f in (gaussian.alpha, gaussian.sigma))
  z = gaussian.q_sample(x, eps, log_snr)
  prediction = heads.to_prediction(head, target(head, x, eps, a, s), z, log_snr)
  np.testing.assert_allclose(prediction.x, x, atol=2e-4)
  np.testing.assert_allclose(prediction.eps, eps, atol=2e-4)


@pytest.mark.parametrize('head', HEADS)
def test_any_output_of_a_head_is_consistent_with_z(head, key):
  """alpha x_hat + sigma eps_hat = z whatever the network says."""
  log_snr = jnp.linspace(-6.0, 6.0, 16)
  output, z = jax.random.normal(key, (2, 16, 5))
  x, eps = heads.to_prediction(head, output, z, log_snr)
  np.testing.assert_allclose(gaussian.q_sample(x, eps, log_snr), z, atol=1e-4)


@pytest.mark.parametrize('head', HEADS)
def test_heads_are_exact_where_they_can_be_for_log_snr_of_20(head):
  """In float32 eps_hat is to be had to 2e-4 at log_snr = -20, x_hat at 20, from the right output.

  The data at -20 and the noise at 20 are the worse for it by e^10: less than is left of a float32.
  """
  x, eps = np.random.default_rng(0).normal(size=(2, 2, 64))
  log_snr = np.array([-20.0, 20.0])
  a, s = (1 / np.sqrt(1 + np.exp(-sign * log_snr))[:, None] for sign in (1, -1))
  output, z = target(head, x, eps, a, s), a * x + s * eps
  got = heads.to_prediction(head, *map(jnp.float32, (output, z, log_snr)))
  assert np.all(np.isfinite(got.x)) and np.all(np.isfinite(got.eps))
  np.testing.assert_allclose(got.eps[0], eps[0], atol=2e-4)
  np.testing.assert_allclose(got.x[1], x[1], atol=2e-4)


RATIO = {
  'eps': lambda log_snr: np.ones_like(log_snr),
  'x': lambda log_snr: np.exp(-log_snr),
  'v': lambda log_snr: 1 + np.exp(-log_snr),
  'o': lambda log_snr: (1 + np.exp(-log_snr / 2)) ** 2,
  'score': lambda log_snr: 1 + np.exp(log_snr),
  'F': lambda log_snr: np.exp(-log_snr) / 0.5**2 + 1,
}


@pytest.mark.parametrize('head', HEADS)
def test_loss_ratio_is_the_heads_own_loss_by_that_of_eps(head):
  """|out_hat - out|^2 / |eps_hat - eps|^2 of two outputs, and the formula of VDM++."""
  log_snr = np.linspace(-8, 8, 17)
  a, s = 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))
  x, eps, error = 0.3, -0.8, 0.45
  wrong_x = x - s / a * error  # alpha x_hat + sigma eps_hat = z
  own = (target(head, wrong_x, eps + error, a, s) - target(head, x, eps, a, s)) ** 2
  np.testing.assert_allclose(own / error**2, RATIO[head](log_snr), rtol=1e-6)
  got = heads.loss_ratio(head, jnp.float32(log_snr))
  np.testing.assert_allclose(got, RATIO[head](log_snr), rtol=1e-5)


def test_the_network_of_f_reads_what_edms_does(key):
  """c_in y at y = z / alpha, and unit variance for data of deviation 1/2 at every log_snr."""
  log_snr = jnp.linspace(-13.0, 13.0, 7)
  x, eps = jax.random.normal(key, (2, 7, 5))
  z = gaussian.q_sample(x, eps, log_snr)
  sigma = np.exp(-np.float64(log_snr) / 2)[:, None]
  c_in = 1 / np.sqrt(sigma**2 + 0.25)
  np.testing.assert_allclose(
    heads.network_input('F', z, log_snr), c_in * (x + sigma * eps), rtol=1e-4, atol=1e-5
  )
  for head in set(HEADS) - {'F'}:
    assert heads.network_input(head, z, log_snr) is z
  z = gaussian.q_sample(0.5 * x, eps, log_snr)
  scale = heads.network_input('F', jnp.ones_like(z), log_snr)[:, 0]
  variance = (gaussian.alpha(log_snr) / 2) ** 2 + gaussian.sigma(log_snr) ** 2  # of z
  np.testing.assert_allclose(scale**2 * variance, 1, rtol=1e-5)


def test_a_built_denoiser_with_head_f_is_edms_preconditioned_network(key):
  """D(y; sigma) = c_skip y + c_out F(c_in y), F the network itself, at y = z / alpha."""
  config = digits.get_config('debug').unlock()
  config.data.image_shape = (2,)
  common = dict(class_conditional=False, condition_on='live', dtype='float32', dropout=0.0)
  config.model = dict(name='mlp', output='F', width=8, **common)
  config.schedule = dict(name='linear', log_snr_min=-6.0, log_snr_max=6.0)
  model = build.model(config.lock())
  params = jax.jit(model.init)(key)
  # zero no more; biases that differ, lest LayerNorm hide the scale of the input
  wave = lambda p: p + jnp.sin(jnp.arange(1.0, p.size + 1)).reshape(p.shape)
  params['network'] = jax.tree.map(wave, params['network'])
  z, log_snr = jax.random.normal(key, (3, 2)), jnp.array([-5.0, 0.0, 5.0])
  network = MLP(width=8, residual=False)
  sigma = np.exp(-log_snr / 2)[:, None]
  y = z * np.sqrt(1 + sigma**2)
  c_in = 1 / np.sqrt(sigma**2 + 0.25)
  c_skip, c_out = 0.25 * c_in**2, sigma * 0.5 * c_in
  t = (6 - log_snr) / 12
  apply = jax.jit(lambda params, *args: network.apply({'params': params}, *args, train=False))
  out = apply(params['network'], c_in * y, t)
  got = jax.jit(model.denoiser(params))(z, log_snr)
  assert np.abs(out).max() > 0.1
  np.testing.assert_allclose(got.x, c_skip * y + c_out * out, rtol=1e-4, atol=1e-5)


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


def test_density_is_that_of_log_snr_at_uniform_times():
  """log_snr = 5 - 3 t^2 has p = 1 / (6 t) = 1 / (2 sqrt(3 (5 - log_snr)))."""
  t = jnp.linspace(0.1, 1.0, 9)
  schedule = lambda t: 5 - 3 * t**2
  want = 1 / (2 * np.sqrt(3 * (5 - np.float64(schedule(t)))))
  np.testing.assert_allclose(gaussian.density(schedule, t), want, rtol=1e-5)


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
