"""Likelihoods of single examples: beside exact ones, with errors that are errors, and paired."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdm
from vdm.diffusion.gaussian import Prediction, alpha, expand_to, sigma
from vdm.evaluation import inference, likelihood

FIELD = vdm.data.gaussian_field.GaussianField(shape=(16,), exponent=-2.0, std=1.0)
DECODER = vdm.continuous.normal(shift=(0.0,), scale=(1.0,), log_snr_max=9.0)
SCHEDULE = vdm.schedules.linear(-7.0, 9.0)


def given(theta):
  """The best denoiser of theta[0] + exp(theta[1]) u, for u of FIELD: theta may be traced."""
  mean, power = theta[0], jnp.exp(2 * theta[1]) * jnp.asarray(FIELD.power, jnp.float32)[None]

  def denoise(z, log_snr):
    a, s = expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z)
    modes = jnp.fft.fft((z - a * mean)[..., 0], norm='ortho')
    total = a[..., 0] ** 2 * power + s[..., 0] ** 2
    back = lambda of: jnp.fft.ifft(of, norm='ortho').real[..., None]
    x_hat = mean + back(a[..., 0] * power / total * modes)
    return Prediction(x_hat, back(s[..., 0] / total * modes))

  return denoise


def exact(theta, u):
  """Log p(u | theta) [N] nats."""
  scale = np.exp(theta[1])
  return FIELD.log_prob((np.asarray(u) - theta[0]) / scale) - FIELD.shape[0] * theta[1]


@functools.cache
def some(count, seed=0):
  return jnp.asarray(FIELD.draw(np.random.default_rng(seed), count)[0])


@functools.partial(jax.jit, static_argnames=('draws', 'intervals'))
def by_draw(u, seed, draws, intervals=0):
  key, index = jax.random.key(seed), jnp.arange(len(u))
  args = given(jnp.zeros(2)), SCHEDULE, DECODER, u, index, key, draws
  return likelihood.bound_by_draw(*args, intervals=intervals)


def nats(u, seed, draws):
  terms, _ = by_draw(u, seed, draws)
  return likelihood.LogProb(-np.asarray(terms.sum(axis=2), np.float64), likelihood.STRATA)


def test_single_examples_have_their_exact_likelihood_within_their_error():
  u = some(64)
  found = nats(u, 0, 512)
  away = (found.value - exact(np.zeros(2), u)) / found.stderr
  assert np.abs(away).max() < 4 and 0.5 < away.std() < 1.3 and abs(away.mean()) < 0.5


def test_the_error_is_the_spread_over_seeds_and_a_fraction_of_that_of_free_times():
  u, draws = some(64), 32
  found = [nats(u, seed, draws) for seed in range(40)]
  spread = np.std([one.value for one in found], axis=0, ddof=1).mean()
  stated = np.mean([one.stderr for one in found])
  assert 0.95 < stated / spread < 1.3  # overstated if anything
  one = np.array([nats(u, 100 + seed, 1).value for seed in range(200)])
  assert spread < 0.6 * one.std(axis=0, ddof=1).mean() / np.sqrt(draws)


@pytest.mark.parametrize('draws', [2, 3, 7, 8])
@pytest.mark.parametrize('alike', [2, 100])
def test_the_error_of_free_draws(draws, alike):
  white = np.random.default_rng(0).standard_normal((draws, 20_000))
  alike = min(alike, draws)
  square = likelihood.standard_error(white, alike) ** 2
  np.testing.assert_allclose(square.mean(), 1 / draws, rtol=0.05)
  whole = likelihood.standard_error(white, draws)
  np.testing.assert_allclose(whole, white.std(axis=0, ddof=1) / np.sqrt(draws))
  assert np.isnan(likelihood.standard_error(white[:1])).all()


@pytest.mark.parametrize(('draws', 'strata', 'free'), [(1, 0, 0), (2, 1, 1), (3, 2, 2), (5, 3, 4)])
def test_the_degrees_of_freedom_are_those_of_the_groups(draws, strata, free):
  """Five draws in strata are a pair and a group of three."""
  estimates = np.zeros((draws, 7))
  assert likelihood.LogProb(estimates, likelihood.STRATA).dof == strata
  assert likelihood.LogProb(estimates, draws).dof == free


@pytest.mark.parametrize('intervals', [1, 5])
def test_maps_add_up_to_the_diffusion_term(intervals):
  u = some(8)
  terms, maps = by_draw(u, 0, 64, intervals=intervals)
  assert maps.shape == (8, intervals, 16, 1)
  np.testing.assert_allclose(maps.sum(axis=(1, 2, 3)), terms[..., 2].mean(axis=0), rtol=1e-5)
  # half the squared error of each mode, integrated over each interval of log-SNR
  low, high = -7.0, 9.0
  lam = np.linspace(low, high, 4001)
  inside = np.exp(lam)[:, None] * FIELD.power
  mean = 0.5 * (inside / (1 + inside)).mean(axis=1)  # E |eps_hat - eps|^2 / 2, per dimension
  edges = np.linspace(high, low, intervals + 1)
  _, maps = by_draw(some(512), 0, 64, intervals=intervals)
  for number, (top, bottom) in enumerate(itertools.pairwise(edges)):
    part = (lam >= bottom) & (lam <= top)
    area = np.trapezoid(mean[part], lam[part])
    np.testing.assert_allclose(maps[:, number].mean(), area, rtol=0.05, atol=2e-3)


def test_what_is_not_valid_has_no_part_in_a_map():
  u, valid = some(4), jnp.tile(jnp.arange(16).reshape(1, 16, 1) < 10, (4, 1, 1))
  args = given(jnp.zeros(2)), SCHEDULE, DECODER, u, jnp.arange(4), jax.random.key(0), 4
  terms, maps = likelihood.bound_by_draw(*args, valid=valid, intervals=1)
  assert (maps[:, :, 10:] == 0).all() and (maps[:, :, :10] > 0).any(axis=2).all()
  np.testing.assert_allclose(maps.sum(axis=(1, 2, 3)), terms[..., 2].mean(axis=0), rtol=1e-5)


def conditional(u, draws, seed=0):
  """theta -> estimates [draws N], as `Experiment.log_prob_given` makes them."""
  denoiser = lambda vector: given(vector[0])
  found = likelihood.by_condition(denoiser, lambda **_: SCHEDULE, DECODER, u, seed, draws)
  return lambda theta: found(vector=theta)


def test_differences_of_conditions_are_paired():
  u, here = some(32), jnp.zeros(2)
  there = here + jnp.array([0.1, 0.1])
  log_prob, other = (jax.jit(conditional(u, 64, seed)) for seed in (0, 1))
  of = lambda estimates: likelihood.LogProb(np.asarray(estimates, np.float64), likelihood.STRATA)
  paired = of(log_prob(there)).minus(of(log_prob(here)))
  free = of(log_prob(there)).minus(of(other(here)))
  truth = exact(np.asarray(there, np.float64), u) - exact(np.zeros(2), u)
  assert np.abs((paired.value - truth) / paired.stderr).max() < 4.5
  assert 5 * paired.stderr.mean() < free.stderr.mean()


def test_the_gradient_with_respect_to_a_condition_is_that_of_the_exact_likelihood():
  u = some(256)
  gradient = jax.jit(jax.grad(lambda theta: conditional(u, 64)(theta).mean()))(
    jnp.array([0.2, 0.1])
  )
  step = 1e-4
  at = lambda i, sign: exact(np.array([0.2, 0.1]) + sign * step * np.eye(2)[i], u).mean()
  truth = [(at(i, 1) - at(i, -1)) / (2 * step) for i in range(2)]
  np.testing.assert_allclose(gradient, truth, atol=0.15)


def test_a_condition_is_for_all_or_for_each():
  u = some(3)
  told = []
  denoiser = lambda vector: told.append(vector) or given(vector[0])
  found = likelihood.by_condition(denoiser, lambda **_: SCHEDULE, DECODER, u, 0, 2)
  np.testing.assert_array_equal(found(vector=jnp.ones(2)), found(vector=jnp.ones((3, 2))))
  assert [value.shape for value in told] == [(3, 2), (3, 2)]
  with pytest.raises(ValueError, match="conditions='mask' must be label, vector or condition"):
    found(mask=1)


def test_intervals_of_a_grid_are_quantiles():
  values = np.linspace(-6, 6, 241)
  rows = np.stack([-0.5 * (values - mean) ** 2 / std**2 for mean, std in ((0.3, 1), (-1, 0.5))])
  posterior = inference.on_grid(rows[None])
  np.testing.assert_allclose(posterior.probability.sum(axis=1), 1)
  low, high = inference.interval(posterior.probability, values, 0.9)
  np.testing.assert_allclose(low, [0.3 - 1.6449, -1 - 0.5 * 1.6449], atol=2e-3)
  np.testing.assert_allclose(high, [0.3 + 1.6449, -1 + 0.5 * 1.6449], atol=2e-3)
  prior = inference.on_grid(rows[None] * 0.5, rows * 0.5)  # half of the evidence in the prior
  np.testing.assert_allclose(prior.probability, posterior.probability)
  with pytest.raises(ValueError, match=r'level=95 must be in \(0, 1\)'):
    inference.interval(posterior.probability, values, 95)


@pytest.mark.slow
def test_posteriors_of_the_bound_are_the_exact_ones_and_hold_the_truth():
  rng, count, points = np.random.default_rng(3), 300, 31
  axes = [np.linspace(-1, 1, points), np.linspace(-0.7, 0.7, points)]
  truth = rng.uniform([-1, -0.7], [1, 0.7], (count, 2))
  u = np.asarray(some(count, seed=4), np.float64)
  u = truth[:, :1, None] + np.exp(truth[:, 1:, None]) * u
  theta = np.stack(np.meshgrid(*axes, indexing='ij'), axis=-1).reshape(-1, 2)
  log_prob = jax.jit(lambda points: jax.lax.map(conditional(jnp.float32(u), 32), points))
  estimates = np.moveaxis(np.asarray(log_prob(jnp.float32(theta))), 0, -1)  # [draws N G]
  found = inference.on_grid(estimates)
  known = np.stack([exact(point, u) for point in theta], axis=1)
  best = np.argmax(estimates.mean(axis=0), axis=1)
  relative = estimates.mean(axis=0) - np.take_along_axis(estimates.mean(axis=0), best[:, None], 1)
  wanted = known - np.take_along_axis(known, best[:, None], 1)
  probable = found.probability > 1e-4
  away = (relative - wanted)[probable] / np.maximum(found.stderr[probable], 1e-2)
  assert np.mean(np.abs(away) < 2) > 0.9 and abs(away.mean()) < 0.3
  share = 0.0
  for number, axis in enumerate(axes):
    both = found.probability.reshape(count, points, points)
    low, high = inference.interval(both.sum(axis=2 - number), axis)
    share += np.mean((low <= truth[:, number]) & (truth[:, number] <= high)) / 2
  assert 0.93 <= share <= 0.97
