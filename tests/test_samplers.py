"""Samplers on Gaussian data, whose denoiser and probability flow have closed forms."""

import importlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vdm.configs import default

from vdm import build, configs
from vdm.diffusion import samplers
from vdm.diffusion.gaussian import Prediction, alpha, expand_to, fold_in, sigma, standard_normal
from vdm.diffusion.samplers import (
  SAMPLERS,
  ancestral,
  ddim,
  deis,
  dpmpp_2m,
  dpmpp_2m_sde,
  heun,
  sample,
  time_grid,
)
from vdm.diffusion.schedules import SCHEDULES

MEAN = np.array([0.3, -0.5])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
VALUES, VECTORS = np.linalg.eigh(COVARIANCE)
CHURNING = dict(s_churn=30.0, s_min=0.05, s_max=5.0, s_noise=1.003)
EVERY = {
  'ancestral': ancestral(),
  'ancestral, upper variance': ancestral(1.0),
  'ddim, half ancestral': ddim(0.5),
  'heun, churning': heun(s_churn=30.0),
  'dpmpp_2m': dpmpp_2m(),
  'dpmpp_2m_sde': dpmpp_2m_sde(),
  'deis': deis(),
}
HIGHER_ORDER = ('heun', 'dpmpp_2m', 'dpmpp_2m_sde', 'deis')


@pytest.fixture
def exact(monkeypatch):
  """benchmarks.samplers: exact moments of what samplers draw."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1])
  return importlib.import_module('benchmarks.samplers')


def denoiser(z, log_snr):
  """E[x | z] for x ~ N(MEAN, COVARIANCE): mu + a C (a^2 C + s^2 I)^-1 (z - a mu)."""
  mean, values, vectors = (jnp.asarray(a, jnp.float32) for a in (MEAN, VALUES, VECTORS))
  a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
  shrunk = ((z - a * mean[None]) @ vectors) / (a**2 * values[None] + s**2)
  return Prediction(mean[None] + (a * values[None] * shrunk) @ vectors.T, (s * shrunk) @ vectors.T)


def flow(y, level_t, level_s):
  """The probability flow of y = z / alpha from one noise level to another, exactly."""
  scale = np.sqrt((VALUES + level_s**2) / (VALUES + level_t**2))
  return MEAN + ((np.float64(y) - MEAN) @ VECTORS * scale) @ VECTORS.T


def x_hat(y, level):
  """The denoiser for y = z / alpha, in float64."""
  return MEAN + ((y - MEAN) @ VECTORS * (VALUES / (VALUES + level**2))) @ VECTORS.T


def levels(log_snrs):
  return np.exp(-np.float64(log_snrs) / 2)


def draw(sampler, log_snrs, keys, denoise_last=False):
  run = lambda keys: sample(keys, sampler, denoiser, log_snrs, (2,), denoise_last)
  return jax.jit(run)(keys)


def linear_grid(num_steps, log_snr_min=-6.0, log_snr_max=6.0):
  return time_grid(SCHEDULES['linear'](log_snr_min, log_snr_max), num_steps)


def start_and_noises(log_snrs, keys):
  """y at the first level, and the noise of each step, from the keys as `sample` documents them."""
  key_start, key_steps = jax.vmap(jax.random.split, out_axes=1)(keys)
  noises = [
    standard_normal(fold_in(key_steps, jnp.full(len(keys), i)), (2,))
    for i in range(len(log_snrs) - 1)
  ]
  y = standard_normal(key_start, (2,)) / alpha(log_snrs[0])
  return np.float64(y), [np.float64(n) for n in noises]


@pytest.mark.parametrize('name', EVERY)
def test_samples_have_the_mean_and_covariance_of_the_data(name, key):
  count = 20_000
  grid = time_grid(SCHEDULES['cosine'](log_snr_min=-10.0, log_snr_max=10.0), 200)
  x = np.float64(draw(EVERY[name], grid, fold_in(key, jnp.arange(count))))
  # five standard errors, and 3 % for the finite number of steps
  np.testing.assert_allclose(x.mean(axis=0), MEAN, atol=5 * np.sqrt(0.5 / count))
  np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=5 * 0.5 * np.sqrt(2 / count) + 0.015)


@pytest.mark.parametrize(
  ('sampler', 'order', 'end'),
  # towards data without noise the third order shows below what float32 resolves only
  [(ddim(), 1, 6.0), (heun(), 2, 6.0), (dpmpp_2m(), 2, 6.0), (deis(), 3, 3.0)],
  ids=['ddim', 'heun', '2m', 'deis'],
)
def test_order_of_convergence_to_the_probability_flow(sampler, order, end, key):
  keys = fold_in(key, jnp.arange(64))

  def error(num_steps):
    grid = linear_grid(num_steps, log_snr_max=end)
    y, _ = start_and_noises(grid[:1], keys)
    exact = flow(y, *levels(grid[np.array([0, -1])]))
    return np.sqrt(np.mean((draw(sampler, grid, keys) - exact) ** 2))

  assert np.log2(error(40) / error(80)) == pytest.approx(order, abs=0.2)
  assert error(80) < 0.03


def test_ddim_with_eta_one_is_the_ancestral_sampler(key):
  keys, grid = fold_in(key, jnp.arange(16)), linear_grid(20)
  np.testing.assert_allclose(draw(ddim(1.0), grid, keys), draw(ancestral(), grid, keys), atol=2e-5)


@pytest.mark.parametrize(('grid', 'churn'), [('linear', {}), ('edm_sample', CHURNING)])
def test_heun_is_the_textbook_algorithm(grid, churn, key):
  """EDM algorithm 2 in float64, with its last step to level zero."""
  keys = fold_in(key, jnp.arange(8))
  grid = time_grid(SCHEDULES[grid](-8.0, 8.0), 17)
  churn = churn | ({} if churn else {'s_noise': 7.0})  # of no effect without churn
  s = dict(s_churn=0.0, s_min=0.0, s_max=np.inf) | churn
  y, noises = start_and_noises(grid, keys)
  sigmas = [*levels(grid), 0.0]
  for i, (t, t_next) in enumerate(itertools.pairwise(sigmas)):
    gamma = min(s['s_churn'] / len(grid), np.sqrt(2) - 1) if s['s_min'] <= t <= s['s_max'] else 0
    t_hat = t * (1 + gamma)
    if t_next == 0:
      gamma, t_hat = 0, t  # `denoise_last` adds no noise: below s_min, where it matters
    else:
      y = y + np.sqrt(t_hat**2 - t**2) * s['s_noise'] * noises[i]
    slope = (y - x_hat(y, t_hat)) / t_hat
    y_next = y + (t_next - t_hat) * slope
    if t_next > 0:
      slope_next = (y_next - x_hat(y_next, t_next)) / t_next
      y_next = y + (t_next - t_hat) * (slope + slope_next) / 2
    y = y_next
  actual = draw(heun(**churn), grid, keys, denoise_last=True)
  np.testing.assert_allclose(actual, y, atol=1e-4)


def test_churn_never_goes_above_the_first_level(key):
  highest = []

  def recording(z, log_snr):
    jax.debug.callback(lambda a: highest.append(float(a.min())), log_snr)
    return denoiser(z, log_snr)

  sample(key[None], heun(s_churn=1e3), recording, linear_grid(3), (2,))
  jax.effects_barrier()
  assert min(highest) >= -6.001 and len(highest) == 6


@pytest.mark.parametrize('stochastic', [False, True])
def test_dpmpp_2m_is_the_textbook_algorithm(stochastic, key):
  """Algorithm 2 of the paper and its SDE version, in float64: half log-SNR, coefficients by r.

  The last step of the grid is five times the one before it.
  """
  keys = fold_in(key, jnp.arange(8))
  grid = time_grid(SCHEDULES['cosine'](-7.0, 12.0), 9)
  half = np.float64(grid) / 2
  a, s = 1 / np.sqrt(1 + np.exp(-2 * half)), 1 / np.sqrt(1 + np.exp(2 * half))
  y, noises = start_and_noises(grid, keys)
  z, last = a[0] * y, None
  for i in range(len(grid) - 1):
    x = x_hat(z / a[i], s[i] / a[i])
    h = half[i + 1] - half[i]
    r = max(1.0, (half[i] - half[i - 1]) / h)
    data = x if i == 0 else (1 + 1 / (2 * r)) * x - 1 / (2 * r) * last
    if stochastic:
      z = s[i + 1] / s[i] * np.exp(-h) * z - a[i + 1] * np.expm1(-2 * h) * data
      z += s[i + 1] * np.sqrt(-np.expm1(-2 * h)) * noises[i]
    else:
      z = s[i + 1] / s[i] * z - a[i + 1] * np.expm1(-h) * data
    last = x
  sampler = dpmpp_2m_sde() if stochastic else dpmpp_2m()
  np.testing.assert_allclose(draw(sampler, grid, keys), z / a[-1], atol=1e-5)


@pytest.mark.parametrize('grid', ['linear', 'cosine', 'edm_sample'])
def test_deis_is_the_textbook_algorithm(grid, key):
  """In float64: eps_hat along y by Lagrange's polynomial in the level, integrated."""
  keys = fold_in(key, jnp.arange(8))
  grid = time_grid(SCHEDULES[grid](-7.0, 12.0), 9)
  y, _ = start_and_noises(grid, keys)
  at, past = levels(grid), []
  for i, (t, t_next) in enumerate(itertools.pairwise(at)):
    past.append((y - x_hat(y, t)) / t)
    nodes = at[max(0, i - 2) : i + 1]
    for node, eps in zip(nodes, past[-3:], strict=True):
      others = nodes[nodes != node]
      integral = np.poly1d(np.poly(others) / np.prod(node - others)).integ()
      y = y + (integral(t_next) - integral(t)) * eps
  np.testing.assert_allclose(draw(deis(), grid, keys), y, atol=1e-4)


def test_deis_is_exact_for_a_parabola_in_the_level(key):
  """After its two first steps, which have no three predictions."""
  grid = time_grid(SCHEDULES['cosine'](-3.0, 9.0), 6)

  def parabola(z, log_snr):
    a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
    eps = jnp.broadcast_to(0.4 - 0.3 * (s / a) + 0.2 * (s / a) ** 2, z.shape)
    return Prediction((z - s * eps) / a, eps)

  whole, part = (sample(key[None], deis(), parabola, g, (2,)) for g in (grid, grid[:3]))
  integral = np.polynomial.Polynomial([0.4, -0.3, 0.2]).integ()
  at = levels(grid)
  np.testing.assert_allclose(whole - part, integral(at[-1]) - integral(at[2]), rtol=1e-4)


def test_the_first_steps_of_multistep_samplers_are_those_of_the_single_step_ones(key):
  keys, grid = fold_in(key, jnp.arange(4)), linear_grid(1)
  first = {name: np.asarray(draw(EVERY[name], grid, keys)) for name in HIGHER_ORDER[1:]}
  np.testing.assert_allclose(first['dpmpp_2m'], draw(ddim(), grid, keys), rtol=1e-5)
  np.testing.assert_allclose(first['deis'], draw(ddim(), grid, keys), rtol=1e-5)
  np.testing.assert_allclose(first['dpmpp_2m_sde'], draw(ancestral(), grid, keys), rtol=1e-5)


def test_variance_of_the_stochastic_multistep_sampler_converges_to_second_order(exact):
  """To that of x and the noise that is left, wherever it started."""
  one = jnp.ones(1)

  def error(num_steps):
    drawn = exact.moments(dpmpp_2m_sde(), linear_grid(num_steps), 0.3 * one, 0.04 * one, False)[1]
    return float(drawn[0]) - 0.04 - np.exp(-6.0)

  assert np.log2(error(40) / error(80)) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize('name', ['heun, churning', 'dpmpp_2m_sde', 'deis', 'dpmpp_2m'])
@pytest.mark.parametrize('denoise_last', [False, True])
def test_exact_moments_are_those_of_samples(name, denoise_last, exact, key):
  mean, variance, count = jnp.array([0.3, -0.5]), jnp.array([0.04, 0.5]), 20_000
  grid = time_grid(SCHEDULES['cosine'](-4.0, 4.0), 6)
  keys = fold_in(key, jnp.arange(count))
  x = sample(keys, EVERY[name], exact.gaussian(mean, variance), grid, (2,), denoise_last)
  drawn_mean, drawn = exact.moments(EVERY[name], grid, mean, variance, denoise_last)
  np.testing.assert_allclose(drawn_mean, x.mean(axis=0), atol=5 * np.sqrt(0.6 / count))
  np.testing.assert_allclose(drawn, x.var(axis=0), rtol=5 * np.sqrt(2 / count))


CONFIGS = sorted(path.stem for path in pathlib.Path(configs.__file__).parent.glob('[a-z]*.py'))


@pytest.mark.parametrize('name', CONFIGS)
def test_samplers_of_higher_order_are_right_on_the_grid_of_every_config(name, exact):
  """Within 1 % of a standard deviation of .2, and 5 % of the energy of fine detail."""
  case = exact.load(name)
  assert set(case.samplers) == set(SAMPLERS)
  for sampler, made in case.samplers.items():
    mean, std, _, _, top = exact.sampler_errors(case, made)
    assert np.isfinite([mean, std, top]).all() and abs(mean) < 0.006
    if sampler in HIGHER_ORDER and case.config.sample.num_steps >= 32:
      assert abs(std) < 0.01 and abs(top) < 0.05, f'{sampler}: {std:.4f}, {top:.4f}'


@pytest.mark.parametrize('sampler', ['dpmpp_2m', 'dpmpp_2m_sde', 'deis'])
@pytest.mark.parametrize('ends', [(-8.0, 8.0), (-9.0, 13.3), (-20.0, 20.0)])
def test_a_long_last_step_does_not_carry_multistep_samplers_away(sampler, ends, exact):
  """32 steps by cosine: the last is up to ten times the one before."""
  grid, one = time_grid(SCHEDULES['cosine'](*ends), 32), jnp.ones(1)
  variance = exact.moments(SAMPLERS[sampler](), grid, 0.3 * one, 0.04 * one, False)[1]
  assert np.sqrt(variance[0]) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize('grid', ['linear', 'cosine', 'edm_sample'])
@pytest.mark.parametrize('sampler', HIGHER_ORDER)
def test_samplers_of_higher_order_are_right_on_long_grids_of_every_kind(grid, sampler, exact):
  grid, one = time_grid(SCHEDULES[grid](-9.0, 13.3), 100), jnp.ones(1)
  variance = exact.moments(SAMPLERS[sampler](), grid, 0.3 * one, 0.04 * one, False)[1]
  assert np.sqrt(variance[0]) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('denoise_last', [False, True])
def test_trajectory_is_the_prediction_of_every_step(name, denoise_last, key):
  keys, grid, seen = fold_in(key, jnp.arange(3)), linear_grid(5), []

  def recording(z, log_snr):
    prediction = denoiser(z, log_snr)
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), prediction.x, ordered=True)
    return prediction

  run = lambda trajectory: sample(
    keys, EVERY[name], recording, grid, (2,), denoise_last, trajectory=trajectory
  )
  x, x_hats = run(True)
  jax.effects_barrier()
  predictions = seen[:: EVERY[name].evaluations]
  assert x_hats.shape == (5 + denoise_last, 3, 2)
  np.testing.assert_allclose(x_hats, predictions, rtol=1e-6)
  np.testing.assert_array_equal(x, run(False))
  if denoise_last:
    np.testing.assert_array_equal(x, x_hats[-1])


def test_without_trajectory_no_step_is_kept(key):
  keys, grid = fold_in(key, jnp.arange(3)), linear_grid(5)
  program = lambda trajectory: str(
    jax.make_jaxpr(lambda: sample(keys, dpmpp_2m(), denoiser, grid, (2,), trajectory=trajectory))()
  )
  assert 'f32[5,3,2]' in program(True) and 'f32[5,3,2]' not in program(False)


@pytest.mark.parametrize('variance', [0.0, 0.3, 1.0])
def test_variance_of_the_ancestral_step(variance, key):
  """Between sigma_{t|s}^2 sigma_s^2 / sigma_t^2 and sigma_{t|s}^2, in float64."""
  log_snr_t, log_snr_s = -1.0, 0.5
  alphas, sigmas = (
    1 / np.sqrt(1 + np.exp(-sign * np.array([log_snr_t, log_snr_s]))) for sign in (1, -1)
  )
  upper = sigmas[0] ** 2 - (alphas[0] / alphas[1]) ** 2 * sigmas[1] ** 2
  lower = upper * sigmas[1] ** 2 / sigmas[0] ** 2
  z, keys = jnp.array([[0.1, 0.2]]), jax.random.split(key, 2)
  at = lambda a: jnp.full((1,), a)
  one, other = (
    ancestral(variance).step(k[None], z, (), denoiser, at(log_snr_t), at(log_snr_s))[0]
    for k in keys
  )
  noise = standard_normal(keys[:1], (2,)) - standard_normal(keys[1:], (2,))
  expected = np.exp((1 - variance) * np.log(lower) / 2 + variance * np.log(upper) / 2)
  np.testing.assert_allclose(one - other, expected * noise, rtol=1e-4)


@pytest.mark.parametrize('name', EVERY)
def test_a_sample_depends_on_its_own_key_alone(name, key):
  grid = linear_grid(5)
  keys = fold_in(key, jnp.arange(6))
  whole, part = (draw(EVERY[name], grid, k, denoise_last=True) for k in (keys, keys[4:]))
  np.testing.assert_allclose(whole[4:], part, rtol=1e-5, atol=1e-6)
  assert np.abs(whole[0] - whole[1]).min() > 0


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('denoise_last', [False, True])
def test_a_perfect_prediction_returns_the_data_from_any_level(name, denoise_last, key):
  """Over log_snr of -20 to 20, in float32."""
  x = jnp.array([[0.2, -0.7]])

  def perfect(z, log_snr):
    a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
    return Prediction(x, (z - a * x) / s)

  grid = linear_grid(6, -20.0, 20.0)
  drawn = sample(key[None], EVERY[name], perfect, grid, (2,), denoise_last)
  # the upper variance leaves the noise of the level before
  np.testing.assert_allclose(drawn, x, atol=0 if denoise_last else 5 * sigma(grid[-2]))


@pytest.mark.parametrize(
  ('name', 'denoise_last'),
  [
    ('ancestral', False),
    ('ddim', True),
    ('heun', False),
    ('heun', True),
    ('dpmpp_2m', False),
    ('dpmpp_2m_sde', True),
    ('deis', False),
  ],
)
def test_number_of_evaluations(name, denoise_last, key):
  calls = []

  def counted(z, log_snr):
    jax.debug.callback(lambda a: calls.append(a), log_snr)
    return denoiser(z, log_snr)

  sampler, num_steps = SAMPLERS[name](), 5
  sample(key[None], sampler, counted, linear_grid(num_steps - denoise_last), (2,), denoise_last)
  jax.effects_barrier()
  assert samplers.num_evaluations(sampler, num_steps, denoise_last) == len(calls)
  if (name, denoise_last) == ('heun', True):  # EDM: 2 N - 1
    assert len(calls) == 2 * num_steps - 1


def test_time_grid_goes_from_noise_to_data():
  grid = time_grid(SCHEDULES['cosine'](log_snr_min=-5.0, log_snr_max=8.0), 7)
  assert grid.shape == (8,) and np.all(np.diff(grid) > 0)
  np.testing.assert_allclose([grid[0], grid[-1]], [-5, 8], rtol=1e-5)


def test_edm_grid_is_that_of_the_paper():
  """EDM eq. 5 with N levels, and the same between end points in log_snr."""
  i, num, rho, low, high = np.arange(18), 18, 7, 0.002, 80.0
  expected = (high ** (1 / rho) + i / (num - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
  named = SCHEDULES['edm_sample'](rho=7.0, sigma_min=low, sigma_max=high)
  by_log_snr = SCHEDULES['edm_sample'](-2 * np.log(high), -2 * np.log(low))
  for schedule in (named, by_log_snr):
    np.testing.assert_allclose(levels(time_grid(schedule, num - 1)), expected, rtol=1e-4)


def config_of(**sample_settings):
  config = default.get_config()
  with config.unlocked():
    for name, value in sample_settings.items():
      block, _, leaf = name.partition('__')
      if leaf:
        config.sample[block][leaf] = value
      else:
        config.sample[block] = value
  return config


@pytest.mark.parametrize('name', SAMPLERS)
def test_every_sampler_is_chosen_by_its_name_alone(name):
  config = config_of(sampler__name=name)
  assert build.sampler(config.sample.sampler).evaluations == 1 + (name == 'heun')
  build.model(config)


def test_arguments_reach_the_sampler_and_its_grid(key):
  config = config_of(sampler__name='heun', sampler__s_churn=12.0)
  gamma, _ = build.sampler(config.sample.sampler).init(jnp.zeros((1, 2)), jnp.zeros(1), 60)
  assert float(gamma) == pytest.approx(0.2)
  own = SCHEDULES['linear'](log_snr_min=-5.0, log_snr_max=8.0)
  ends = lambda **settings: np.asarray(
    build.other_schedule(config_of(**settings).sample.grid, 'sample.grid', own)(
      jnp.array([1.0, 0.5, 0.0])
    )
  )
  np.testing.assert_allclose(ends(), [-5, 1.5, 8])
  np.testing.assert_allclose(ends(grid__name='cosine')[np.array([0, 2])], [-5, 8], rtol=1e-5)
  np.testing.assert_allclose(ends(grid__name='edm_sample')[np.array([0, 2])], [-5, 8], rtol=1e-5)
  narrow = ends(grid=dict(name='edm_sample', sigma_max=10.0, log_snr_max=7.0))
  np.testing.assert_allclose(narrow[np.array([0, 2])], [-2 * np.log(10), 7], rtol=1e-5)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(sampler__name='eular'), r"sample.sampler.name='eular' must be one of ancestral, ddim"),
    (dict(sampler__eta=0.5), r"sample.sampler.name='ancestral' does not take eta"),
    (dict(sampler=dict(name='ddim', etta=0.5)), r"sampler.name='ddim' does not take etta"),
    (dict(sampler__name='ddim', sampler__eta=2.0), r'sample.sampler.eta=2.0 must be from 0'),
    (dict(sampler__variance=-1.0), r'sample.sampler.variance=-1.0 must be from 0'),
    (dict(sampler__name='heun', sampler__s_churn=-1.0), r'sample.sampler.s_churn=-1.0 must be'),
    (dict(sampler__name='heun', sampler__s_max=0.0), r'sample.sampler.s_min=0.0 must be in'),
    (dict(grid__name='cosin'), r"sample.grid.name='cosin' must be one of .* edm"),
    (dict(grid__name='learned_net'), r"sample.grid.name='learned_net' must be .*'schedule' is"),
    (dict(grid=dict(name='schedule', rho=7.0)), r"grid.name='schedule' does not take rho"),
    (
      dict(grid=dict(name='edm_sample', sigma_max=80.0)),
      r'sample.grid=.* must be within .*-5.00 to 8.00',
    ),
    (dict(grid=dict(name='edm_sample', rho=0.0)), r'sample.grid.rho=0.0 must be positive'),
    (dict(denoise_last=True, num_steps=1), r'sample.num_steps=1 must be 2 or more'),
  ],
)
def test_bad_input_is_refused_when_the_model_is_built(settings, message):
  with pytest.raises(ValueError, match=r'^config\..*' + message):
    build.model(config_of(**settings))
