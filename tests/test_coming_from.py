"""docs/coming_from.md: what other packages call by other names is the same number."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm.diffusion import averages, elbo, gaussian, guidance, heads, samplers, schedules, weightings
from vdm.diffusion.gaussian import Prediction

LOG_SNR = np.array([-6.0, -1.0, 0.0, 2.5, 9.0])
X, EPS = np.random.default_rng(0).normal(size=(2, 5, 3))
Z = gaussian.q_sample(jnp.asarray(X), jnp.asarray(EPS), jnp.asarray(LOG_SNR))


def near(a, b, rtol=2e-5):
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=2e-5)


def alpha_sigma(log_snr=LOG_SNR):
  return np.asarray(gaussian.alpha(jnp.asarray(log_snr))), np.asarray(
    gaussian.sigma(jnp.asarray(log_snr))
  )


def step(sampler, t, s, z, x, keys=None):
  """One step of a sampler whose denoiser says x, whatever it is asked; its z_s."""
  keys = jax.random.split(jax.random.key(0), len(z)) if keys is None else keys

  def denoiser(z, log_snr):
    a, s = (f(log_snr)[:, None] for f in (gaussian.alpha, gaussian.sigma))
    return Prediction(x, (z - a * x) / s)

  t, s = (jnp.full(len(z), value) for value in (t, s))
  memory = sampler.init(z, t, 2)
  return sampler.step(keys, z, memory, denoiser, t, s)[0]


def test_levels_of_edm_vdm_ddpm_and_flow_matching():
  a, s = alpha_sigma()
  level = s / a
  near(LOG_SNR, -2 * np.log(level))
  near(np.asarray(Z) / a[:, None], X + level[:, None] * EPS)
  near(a**2, 1 / (1 + np.exp(-LOG_SNR)))  # alphas_cumprod
  gamma = -LOG_SNR
  near(s**2, 1 / (1 + np.exp(-gamma)))
  t = s / (a + s)
  near(LOG_SNR, 2 * np.log((1 - t) / t))
  near(np.asarray(Z) / (a + s)[:, None], (1 - t)[:, None] * X + t[:, None] * EPS)


@pytest.mark.parametrize(
  ('head', 'target'),
  [
    ('eps', lambda a, s: EPS),
    ('x', lambda a, s: X),
    ('v', lambda a, s: a * EPS - s * X),
    ('o', lambda a, s: EPS - X),
    ('score', lambda a, s: -EPS / s),
  ],
)
def test_what_a_network_predicts(head, target):
  output = jnp.asarray(target(*(part[:, None] for part in alpha_sigma())))
  prediction = heads.to_prediction(head, output, Z, jnp.asarray(LOG_SNR))
  near(prediction.x[1:4], X[1:4])
  near(prediction.eps[1:4], EPS[1:4])


def test_the_preconditioning_of_edm():
  level, data = np.exp(-LOG_SNR / 2)[:, None], heads.SIGMA_DATA
  y = X + level * EPS
  norm = np.sqrt(level**2 + data**2)
  out = np.random.default_rng(1).normal(size=y.shape)
  denoised = data**2 / norm**2 * y + level * data / norm * out  # c_skip y + c_out F
  near(heads.to_prediction('F', jnp.asarray(out), Z, jnp.asarray(LOG_SNR)).x, denoised)
  near(heads.network_input('F', Z, jnp.asarray(LOG_SNR)), y / norm)
  near(-LOG_SNR / 8, np.log(level[:, 0]) / 4)


def test_the_normal_density_of_edm():
  mean, std = -1.2, 1.2  # P_mean, P_std of log sigma
  schedule = schedules.edm_train(-25.0, 30.0, mean=-2 * mean, std=2 * std)
  t = jnp.array([0.05, 0.3, 0.5, 0.9])
  log_level = -np.asarray(schedule(t)) / 2
  normal = np.exp(-0.5 * ((log_level - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
  near(gaussian.density(schedule, t), normal / 2, rtol=1e-4)  # d log_snr = 2 d log sigma
  level, data = np.exp(log_level), 0.5
  native = normal / 2 * (level**2 + data**2) / (level * data) ** 2  # of |x_hat - x|^2
  ours = weightings.edm(mean=-2 * mean, std=2 * std, sigma_data=data)(schedule(t))
  # |x_hat - x|^2 = sigma^2 |eps_hat - eps|^2, in levels
  near(native * level**2 / np.asarray(ours), np.full(4, data**-2), rtol=1e-4)


@pytest.mark.parametrize('n', [5, 18])
def test_the_levels_of_karras(n):
  least, most, rho = 0.002, 80.0, 7.0
  ramp = np.linspace(0, 1, n)
  sigmas = (most ** (1 / rho) + ramp * (least ** (1 / rho) - most ** (1 / rho))) ** rho
  grid = samplers.time_grid(schedules.edm_sample(sigma_min=least, sigma_max=most, rho=rho), n - 1)
  near(np.exp(-np.asarray(grid, np.float64) / 2), sigmas, rtol=1e-4)


def test_evaluations_of_256_steps():
  assert samplers.num_evaluations(samplers.heun(), 256, denoise_last=True) == 511


def test_euler_in_sigma_and_euler_in_t_are_ddim():
  t, s = -1.0, 0.5
  (a_t, a_s), (s_t, s_s) = alpha_sigma(np.array([t, s]))
  z, x = jnp.asarray(Z[:4]), jnp.asarray(X[:4])
  ours = np.asarray(step(samplers.ddim(), t, s, z, x))
  y, level_t, level_s = np.asarray(z) / a_t, s_t / a_t, s_s / a_s
  near(ours / a_s, y + (y - X[:4]) / level_t * (level_s - level_t))
  flow, time_t, time_s = np.asarray(z) / (a_t + s_t), s_t / (a_t + s_t), s_s / (a_s + s_s)
  eps = (np.asarray(z) - a_t * X[:4]) / s_t
  near(ours / (a_s + s_s), flow + (time_s - time_t) * (eps - X[:4]))


@pytest.mark.parametrize('eta', [0.0, 0.4, 1.0])
def test_the_ancestral_step_of_k_diffusion(eta):
  """sigma_down and sigma_up are what is left of the noise, and what is new."""
  t, s = -1.0, 0.5
  (a_t, a_s), (s_t, s_s) = alpha_sigma(np.array([t, s]))
  level_t, level_s = s_t / a_t, s_s / a_s
  up = min(level_s, eta * math.sqrt(level_s**2 * (level_t**2 - level_s**2) / level_t**2))
  down = math.sqrt(level_s**2 - up**2)
  keys = jax.random.split(jax.random.key(0), 4000)
  z, x = jnp.ones((4000, 1)), jnp.full((4000, 1), 0.3)
  noise = np.asarray(gaussian.standard_normal(keys, (1,)))
  y = 1 / a_t
  theirs = y + (y - 0.3) / level_t * (down - level_t) + up * noise
  near(step(samplers.ddim(eta), t, s, z, x, keys) / a_s, theirs)


@pytest.mark.parametrize('variance', [0.0, 1.0])
def test_the_variances_of_ddpm(variance):
  """fixed_small is (1 - abar_s) / (1 - abar_t) beta_t, fixed_large is beta_t."""
  t, s = -1.0, 0.5
  (a_t, a_s), (s_t, s_s) = alpha_sigma(np.array([t, s]))
  beta = 1 - a_t**2 / a_s**2
  wanted = beta if variance else s_s**2 / s_t**2 * beta
  keys = jax.random.split(jax.random.key(0), 100)
  z = jnp.zeros((100, 1))
  drawn = step(samplers.ancestral(variance), t, s, z, z, keys)
  near(drawn, math.sqrt(wanted) * np.asarray(gaussian.standard_normal(keys, (1,))))


def test_linear_betas_of_a_thousand_steps():
  alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))
  schedule = schedules.ddpm(log_snr[-1], 20.0, beta_min=0.1, beta_max=20.0)
  steps = np.array([100, 500, 900])
  np.testing.assert_allclose(schedule(jnp.asarray(steps / 1000)), log_snr[steps - 1], atol=0.06)


def test_min_snr_is_a_weight_on_the_error_of_the_noise():
  snr, gamma = np.exp(LOG_SNR), 5.0
  density = 1 / np.cosh(LOG_SNR / 2)  # of the cosine schedule, up to a constant
  ours = np.asarray(weightings.min_snr(gamma)(jnp.asarray(LOG_SNR)))
  near(ours / (density * np.minimum(snr, gamma) / snr), np.ones(5))


def test_guidance_scale_is_the_weight():
  own, other = (
    lambda z, log_snr, v=v: Prediction(jnp.full_like(z, v), jnp.full_like(z, -v))
    for v in (1.0, 0.4)
  )
  guided = guidance.guide(own, guidance.pair(own, other), 3.0, -100.0, 100.0)
  near(guided(jnp.zeros((1, 1)), jnp.zeros(1)).eps, [[-0.4 + 3.0 * (-1.0 + 0.4)]])


def test_the_half_life_of_an_average():
  rate, batch = 0.9999, 128
  halflife = batch * math.log(0.5) / math.log(rate)
  near(1 - averages.exponential_share(10**6, batch, halflife, rampup_ratio=0.0), rate)


def test_discrete_time_is_that_of_the_public_code():
  """1/2 T expm1(gamma_t - gamma_s) |eps - eps_hat|^2 at t = ceil(uT) / T."""
  schedule = schedules.linear(-5.0, 13.3)
  u, num = jnp.array([0.31, 0.72]), 10
  denoiser = lambda z, log_snr: Prediction(z, jnp.zeros_like(z))
  eps = jnp.asarray(EPS[:2])
  term = elbo.diffusion_loss(denoiser, schedule, weightings.elbo(), eps, u, eps, num)
  gamma = lambda t: -13.3 + 18.3 * t
  t = np.ceil(np.asarray(u) * num) / num
  wanted = 0.5 * num * np.expm1(gamma(t) - gamma(t - 1 / num)) * (EPS[:2] ** 2).sum(axis=1)
  near(term.loss, wanted, rtol=1e-4)
