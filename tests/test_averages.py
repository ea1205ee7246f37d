import decimal
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm.diffusion import averages


@pytest.mark.parametrize('std', [0.02, 0.05, 0.1, 0.25])
def test_the_profile_has_the_standard_deviation_asked_for(std):
  tau, gamma = (np.arange(200_000) + 0.5) / 200_000, averages.exponent(std)
  p = (gamma + 1) * tau**gamma
  assert abs(p.mean() - 1) < 1e-4
  mean = (p * tau).mean()
  np.testing.assert_allclose(np.sqrt((p * (tau - mean) ** 2).mean()), std, rtol=1e-4)


def test_published_exponents():
  """EDM2, section 3.1: std 0.05 and 0.10 are gamma = 16.97 and 6.94."""
  np.testing.assert_allclose(
    [averages.exponent(0.05), averages.exponent(0.1)], [16.97, 6.94], atol=0.005
  )


def track(path, std):
  """The average after every step of a path [T, D]."""

  def update(average, numbered):
    step, point = numbered
    average += averages.power_share(step, std) * (point - average)
    return average, average

  return jax.lax.scan(update, jnp.full(path.shape[1], 1e6), (jnp.arange(len(path)), path))[1]


def test_the_updates_weigh_step_tau_by_its_power():
  """And the start, put far off here, is forgotten by the first update."""
  path = jax.random.normal(jax.random.key(0), (500, 3))
  tau = np.arange(1, 501)
  for std in (0.05, 0.1):
    gamma = averages.exponent(std)
    weights = (tau / 500) ** (gamma + 1) - ((tau - 1) / 500) ** (gamma + 1)
    np.testing.assert_allclose(track(path, std)[-1], weights @ path, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'target_std, target_time', [(0.075, 4096), (0.06, 4096), (0.08, 3072), (0.15, 4096)]
)
def test_stored_averages_add_up_to_one_that_was_tracked(target_std, target_time):
  """A random walk with drift; two lengths, stored 32 times; to 1e-3 of the parameters."""
  noise = jax.random.normal(jax.random.key(1), (4096, 64))
  path = 1 + jnp.cumsum(noise, axis=0) / 64
  tracked = {std: track(path, std) for std in (0.05, 0.1)}
  times = np.arange(128, 4097, 128)
  stored = np.stack([tracked[std][t - 1] for std in (0.05, 0.1) for t in times]).astype(np.float64)
  stds = np.repeat([0.05, 0.1], len(times))
  weights = averages.combination(np.tile(times, 2), stds, target_time, target_std)
  want = np.asarray(track(path, target_std)[target_time - 1], np.float64)
  error = np.linalg.norm(weights @ stored - want) / np.linalg.norm(want)
  assert error < 1e-3, error
  nearest = np.linalg.norm(np.asarray(path[target_time - 1]) - want) / np.linalg.norm(want)
  assert nearest > 0.02  # the parameters themselves are far from it


def exact_weights(times, stds, target_time, target_std):
  """EDM2's formula in 60 digits: overlaps of profiles, by elimination, divided by the sum."""

  def gamma(std):  # by bisection of the standard deviation of tau^gamma
    low, high = decimal.Decimal(0), decimal.Decimal(10**6)
    for _ in range(200):
      g = (low + high) / 2
      variance = (g + 1) / (g + 3) - ((g + 1) / (g + 2)) ** 2
      low, high = (g, high) if variance > decimal.Decimal(std) ** 2 else (low, g)
    return low

  def overlap(a, b):
    (s, f), (t, g) = sorted([a, b])  # s <= t: the integral ends at s
    return (f + 1) * (g + 1) / (f + g + 1) * (s / t) ** g / t

  with decimal.localcontext(decimal.Context(prec=60)):
    of = lambda time, std: (decimal.Decimal(int(time)), gamma(std))
    stored = [of(*pair) for pair in zip(times, stds, strict=True)]
    target = of(target_time, target_std)
    rows = [[overlap(a, b) for b in stored] + [overlap(a, target)] for a in stored]
    for i, pivot in enumerate(rows):
      for row in rows:
        if row is not pivot:
          factor = row[i] / pivot[i]
          row[i:] = [x - factor * p for x, p in zip(row[i:], pivot[i:], strict=True)]
    weights = [row[-1] / row[i] for i, row in enumerate(rows)]
    return np.array([float(weight / sum(weights)) for weight in weights])


@pytest.mark.parametrize('num_snapshots', [2, 5, 50])
@pytest.mark.parametrize('target_std', [0.05, 0.12, 0.2, 0.25])
def test_a_combination_is_an_average_and_that_of_the_formula(num_snapshots, target_std):
  steps = 40 * (1 + np.arange(num_snapshots))
  times, stds = np.tile(steps, 2), np.repeat([0.05, 0.1], num_snapshots)
  weights = averages.combination(times, stds, steps[-1], target_std)
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
  want = exact_weights(times, stds, steps[-1], target_std)
  path = 3 + np.random.default_rng(0).normal(size=(steps[-1], 8)).cumsum(axis=0) / 50
  stored = np.stack([np.asarray(track(path, std))[steps - 1] for std in (0.05, 0.1)])
  stored = stored.reshape(len(times), -1).astype(np.float64)
  np.testing.assert_allclose(weights @ stored, want @ stored, rtol=1e-6)


def test_a_length_no_profile_has_is_refused():
  with pytest.raises(ValueError, match=r'0\.3 must be in'):
    averages.exponent(0.3)


def test_average_forgets_the_start_early_on():
  share = averages.exponential_share(jnp.int32(0), 32, halflife_images=1e9, rampup_ratio=0.05)
  assert share > 1 - 1e-5
  late = averages.exponential_share(jnp.int32(10**6), 32, halflife_images=800, rampup_ratio=0.05)
  np.testing.assert_allclose(1 - late, 0.5 ** (32 / 800), rtol=1e-6)


@pytest.mark.parametrize('step', [10**3, 524_287, 609_999, 10**7, 2**31 - 2])
def test_shares_are_exact_in_long_runs(step):
  """More images than an int32 counts; and shares that one less a decay in float32 does not hold."""
  share = jax.jit(lambda step: averages.exponential_share(step, 4096, 5e7, 0.05))(step)
  halflife = min(5e7, (step + 1) * 4096 * 0.05)
  np.testing.assert_allclose(share, -math.expm1(4096 / halflife * math.log(0.5)), rtol=1e-5)
  for std in (0.05, 0.1):
    share = jax.jit(lambda step, std=std: averages.power_share(step, std))(step)
    exact = -math.expm1((averages.exponent(std) + 1) * math.log1p(-1 / (step + 1)))
    np.testing.assert_allclose(share, exact, rtol=1e-5)
