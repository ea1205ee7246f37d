import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from vdm.diffusion.gaussian import density, log_snr_and_slope
from vdm.diffusion.schedules import SCHEDULES, Learned

ENDS = dict(log_snr_min=-7.0, log_snr_max=11.0)
EXTRA = {'shifted_cosine': dict(image_size=128)}


def make(name):
  """The schedule as a function of t, at its initial parameters if it has any."""
  schedule = SCHEDULES[name](**ENDS, **EXTRA.get(name, {}))
  return schedule.as_schedule(schedule.init()) if isinstance(schedule, Learned) else schedule


@pytest.mark.parametrize('name', SCHEDULES)
def test_falls_strictly_from_end_to_end(name):
  t = jnp.linspace(0.0, 1.0, 1001)
  log_snr, slope = log_snr_and_slope(make(name), t)
  np.testing.assert_allclose(log_snr[0], ENDS['log_snr_max'], rtol=1e-5)
  np.testing.assert_allclose(log_snr[-1], ENDS['log_snr_min'], rtol=1e-5)
  assert np.all(np.diff(log_snr) < 0)
  assert np.all(slope < 0)
  assert log_snr.dtype == jnp.float32


@pytest.mark.parametrize('name', SCHEDULES)
def test_works_for_a_scalar_and_under_jit_and_grad(name):
  schedule = make(name)
  assert jnp.isfinite(jax.jit(jax.grad(schedule))(0.3))


@pytest.mark.parametrize('name', SCHEDULES)
def test_swapped_end_points_are_refused(name):
  with pytest.raises(ValueError, match=r'^log_snr_min=3.0 must be below'):
    SCHEDULES[name](log_snr_min=3.0, log_snr_max=-3.0, **EXTRA.get(name, {}))


FIXED = [name for name in SCHEDULES if not name.startswith('learned')]


@pytest.mark.parametrize('name', FIXED)
@pytest.mark.parametrize('ends', [(-20.0, 20.0), (-5.0, 8.0), (9.0, 14.0), (-20.0, -15.0)])
def test_as_exact_as_float32_allows_anywhere(name, ends):
  """log_snr to 5e-6 and its slope to 5e-6 of itself: neither end loses its digits."""
  schedule = SCHEDULES[name](*ends, **EXTRA.get(name, {}))
  t = jnp.linspace(0.0, 1.0, 257)
  log_snr, slope = log_snr_and_slope(schedule, t)
  with jax.enable_x64(True):
    exact, exact_slope = log_snr_and_slope(schedule, jnp.float64(np.float64(t)))
  np.testing.assert_allclose(exact[np.array([0, -1])], ends[::-1], rtol=1e-12)
  np.testing.assert_allclose(log_snr, exact, atol=5e-6)
  np.testing.assert_allclose(slope, exact_slope, rtol=5e-6)


@pytest.mark.parametrize('name', FIXED)
@pytest.mark.parametrize('ends', [(-26.0, 26.0), (-20.0, 20.0), (-5.0, 8.0)])
def test_a_compiler_loses_no_end_point(name, ends):
  """XLA adds up what is constant in a sum (JAX 0.11 and older), and may lose the small one."""
  schedule = SCHEDULES[name](*ends, **EXTRA.get(name, {}))
  t = jnp.array([0.0, 0.25, 1.0])
  np.testing.assert_allclose(jax.jit(schedule)(t), schedule(t), rtol=1e-5)
  np.testing.assert_allclose(jax.jit(schedule)(t)[::2], ends[::-1], rtol=1e-5)


@pytest.mark.parametrize(
  'name, ends, leaf',
  [
    ('edm_train', (-40.0, 14.0), 'log_snr_min=-40.0'),
    ('edm_train', (-10.0, 40.0), 'log_snr_max=40.0'),
  ],
)
def test_end_points_whose_times_underflow_are_refused(name, ends, leaf):
  with pytest.raises(ValueError, match=f'^{leaf} must be an end that the schedule reaches '):
    SCHEDULES[name](*ends)


@pytest.mark.parametrize('name', FIXED)
@pytest.mark.parametrize(
  'ends, leaf', [((-88.0, 10.0), 'log_snr_min=-88.0'), ((-10.0, 89.0), 'log_snr_max=89.0')]
)
def test_end_points_without_signal_or_noise_in_float32_are_refused(name, ends, leaf):
  with pytest.raises(ValueError, match=f'^{leaf} must be between -80 and 80; '):
    SCHEDULES[name](*ends, **EXTRA.get(name, {}))


@pytest.mark.parametrize(
  'name, ends',
  [
    ('ddpm', (-80.0, 80.0)),
    ('softplus', (-80.0, 80.0)),
    ('edm_train', (-26.0, 30.0)),
    ('cosine', (-80.0, 80.0)),
    ('flow_matching', (-80.0, 80.0)),
  ],
)
def test_end_points_far_out_are_reached_with_their_slopes(name, ends):
  t = jnp.array([0.0, 1.0])
  log_snr, slope = jax.jit(lambda t: log_snr_and_slope(SCHEDULES[name](*ends), t))(t)
  np.testing.assert_allclose(log_snr, ends[::-1], rtol=1e-5)
  assert np.all(np.isfinite(slope)) and np.all(slope < 0)
  backward = jax.vmap(jax.grad(SCHEDULES[name](*ends)))(t)
  np.testing.assert_allclose(backward, slope, rtol=1e-4)


def test_a_beta_that_falls_is_refused():
  with pytest.raises(ValueError, match=r'^beta_max=0.1 must be at least beta_min=20.0; swap'):
    SCHEDULES['ddpm'](-10.0, 10.0, beta_min=20.0, beta_max=0.1)


normal_cdf = norm(2.4, 2.4).cdf
# t(log_snr) of the base schedules, and p(log_snr) up to the factor that truncation brings
INVERSE = {
  'linear': lambda a: -a,
  'cosine': lambda a: 2 / np.pi * np.arctan(np.exp(-a / 2)),
  'shifted_cosine': lambda a: 2 / np.pi * np.arctan(np.exp(-a / 2 + np.log(64 / 128))),
  'ddpm': lambda a: (-0.1 + np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(np.exp(-a)))) / 19.9,
  'edm_train': lambda a: 1 - normal_cdf(a),
  'edm_sample': lambda a: np.exp(-a / 14),
  'flow_matching': lambda a: 1 / (1 + np.exp(a / 2)),
  'softplus': lambda a: -np.log1p(np.exp(a)),
}
DENSITY = {
  'linear': lambda a: np.ones_like(a),
  'cosine': lambda a: 1 / np.cosh(a / 2) / (2 * np.pi),
  'shifted_cosine': lambda a: 1 / np.cosh(a / 2 - np.log(64 / 128)) / (2 * np.pi),
  'ddpm': lambda a: 1 / (1 + np.exp(a)) / np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(np.exp(-a))),
  'edm_train': norm(2.4, 2.4).pdf,
  'edm_sample': lambda a: np.exp(-a / 14) / 14,
  'flow_matching': lambda a: 1 / np.cosh(a / 4) ** 2 / 8,
  'softplus': lambda a: 1 / (1 + np.exp(-a)),
}


@pytest.mark.parametrize('name', FIXED)
def test_truncated_inverse_and_density_are_the_published_ones(name):
  """u = (t(log_snr) - t0) / (t1 - t0) and p~ = p / (t1 - t0), with t0, t1 at the end points."""
  with jax.enable_x64(True):
    u = jnp.linspace(0.0, 1.0, 257, dtype=jnp.float64)
    log_snr, p = np.array(make(name)(u)), np.array(density(make(name), u))
  t, (t0, t1) = INVERSE[name](log_snr), INVERSE[name](np.array([11.0, -7.0]))
  np.testing.assert_allclose((t - t0) / (t1 - t0), u, atol=1e-9)
  np.testing.assert_allclose(p, DENSITY[name](log_snr) / (t1 - t0), rtol=1e-6)


def test_edm_sample_is_the_published_grid():
  """EDM eq. 5 for N = 18 steps of sigma from 80 to 0.002, rho = 7."""
  sigma_min, sigma_max, rho, i, n = 0.002, 80, 7, np.arange(18), 18
  grid = sigma_max ** (1 / rho) + i / (n - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
  schedule = SCHEDULES['edm_sample'](-2 * np.log(sigma_max), -2 * np.log(sigma_min))
  np.testing.assert_allclose(
    np.exp(-schedule(jnp.float32(1 - i / (n - 1))) / 2), grid**rho, rtol=1e-5
  )


def test_edm_train_draws_edms_sigma():
  """ln sigma of mean -1.2 and deviation 1.2: little is cut off between -20 and 20."""
  log_snr = SCHEDULES['edm_train'](-20.0, 20.0)((jnp.arange(4096) + 0.5) / 4096)
  log_sigma = -np.float64(log_snr) / 2
  np.testing.assert_allclose([log_sigma.mean(), log_sigma.std()], [-1.2, 1.2], atol=2e-3)


def test_ddpm_is_its_own_forward_process():
  """100,000 small steps z <- sqrt(1 - beta dt) z + sqrt(beta dt) eps, beta from 0.1 to 20."""
  beta = 0.1 + 19.9 * (np.arange(100_000) + 0.5) / 100_000
  alpha_squared = np.cumprod(1 - beta / 100_000)
  log_snr = np.log(alpha_squared / (1 - alpha_squared))
  schedule = SCHEDULES['ddpm'](log_snr[-1], log_snr[999])
  t = (np.array([20_000, 50_000, 90_000]) - 1000) / 99_000
  got = schedule(jnp.float32(t))
  np.testing.assert_allclose(got, log_snr[[19_999, 49_999, 89_999]], atol=5e-3)


@pytest.mark.parametrize(
  ('name', 'bad'),
  [
    ('shifted_cosine', {'image_size': 0}),
    ('ddpm', {'beta_min': 0.0}),
    ('edm_train', {'std': -1.0}),
    ('edm_sample', {'rho': 0.0}),
  ],
)
def test_bad_arguments_are_refused_by_name(name, bad):
  ((field, value),) = bad.items()
  with pytest.raises(ValueError, match=rf'^{field}={value} must be positive'):
    SCHEDULES[name](**ENDS, **bad)


@pytest.mark.parametrize(
  ('name', 'bad'),
  [('edm_sample', {'rho': 1e-30}), ('edm_sample', {'rho': 1e-3}), ('ddpm', {'log_snr_min': -1e4})],
)
def test_what_overflows_is_refused_by_name(name, bad):
  ((field, value),) = bad.items()
  with pytest.raises(ValueError, match=rf'^{field}={value} must be '):
    SCHEDULES[name](**ENDS | bad)


def test_cosine_is_alpha_equals_cos():
  """Untruncated, alpha = cos(pi t / 2): truncation only stretches t."""
  t = np.linspace(0, 1, 101)
  inverse = lambda log_snr: 2 / np.pi * np.arctan(np.exp(-log_snr / 2))
  base = inverse(11.0) + (inverse(-7.0) - inverse(11.0)) * t
  log_snr = 2 * np.log(np.cos(np.pi * base / 2) / np.sin(np.pi * base / 2))
  np.testing.assert_allclose(make('cosine')(jnp.float32(t)), log_snr, rtol=1e-4, atol=1e-4)


def test_shifted_cosine_is_the_cosine_moved_by_the_resolution():
  """At image size d, log_snr is lower by 2 log(d / 64) at every base time."""
  shifted = SCHEDULES['shifted_cosine'](log_snr_min=-8.0, log_snr_max=6.0, image_size=256)
  moved = SCHEDULES['cosine'](log_snr_min=-8 + 2 * np.log(4), log_snr_max=6 + 2 * np.log(4))
  t = jnp.linspace(0.0, 1.0, 33)
  np.testing.assert_allclose(shifted(t), moved(t) - 2 * np.log(4), rtol=1e-4, atol=1e-4)


def test_learned_end_points_fall_whatever_the_optimizer_does():
  learned = SCHEDULES['learned_endpoints'](**ENDS)
  params = learned.init() | {'slope': jnp.float32(-4.0)}
  ends = learned.as_schedule(params)(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(ends, [11, 7])


def random_net(seed, **ends):
  """A learned network far from linear: positive weights of many sizes, units anywhere."""
  learned = SCHEDULES['learned_net'](**(ENDS | ends), num_hidden=64)
  params = learned.init()
  keys = jax.random.split(jax.random.key(seed), 3)
  interior = {
    k: v + 4 * jax.random.normal(key, v.shape)
    for key, (k, v) in zip(keys, params['interior'].items(), strict=True)
  }
  return learned.as_schedule(params | {'interior': interior}), interior


@pytest.mark.parametrize('seed', range(5))
def test_a_learned_net_falls_strictly_between_pinned_ends(seed):
  schedule, _ = random_net(seed)
  log_snr, slope = log_snr_and_slope(schedule, jnp.linspace(0.0, 1.0, 257))
  assert np.all(np.diff(log_snr) < 0) and np.all(slope < 0)
  np.testing.assert_allclose([log_snr[0], log_snr[-1]], [11, -7], atol=1e-5)
  assert log_snr.max() <= 11 + 1e-5 and log_snr.min() >= -7 - 1e-5
  assert np.abs(log_snr - np.linspace(11, -7, 257)).max() > 0.1  # and it is not the line


def test_a_learned_net_is_the_papers_network():
  """gamma = gamma_0 + (gamma_1 - gamma_0) (g(t) - g(0)) / (g(1) - g(0)), g = l1 + l3 sig l2 l1."""
  schedule, interior = random_net(7)
  a, b = (np.log1p(np.exp(np.float64(interior[k]))) for k in 'ab')
  weight_1, bias_1 = 18.3, -13.3  # any l1: its scale and offset are taken out by the pinning
  l1 = lambda t: weight_1 * t + bias_1
  weight_2 = 2 * b / weight_1
  bias_2 = np.float64(interior['c']) - b - weight_2 * bias_1
  g = lambda t: l1(t) + (weight_1 * a / (1 + np.exp(-(weight_2 * l1(t) + bias_2)))).sum()
  for t in (0.0, 0.1, 0.5, 0.83, 1.0):
    want = 11 - 18 * (g(t) - g(0)) / (g(1) - g(0))
    np.testing.assert_allclose(schedule(jnp.float32(t)), want, rtol=1e-5, atol=1e-5)


def test_a_learned_net_starts_almost_linear():
  t = jnp.linspace(0.0, 1.0, 65)
  assert np.abs(make('learned_net')(t) - (11 - 18 * t)).max() < 0.5
