import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm.diffusion.adaptive import PRIOR, Average, Hits, adaptive, predicted_reduction
from vdm.diffusion.gaussian import log_snr_and_slope

ENDS = dict(log_snr_min=-6.0, log_snr_max=10.0)


def state_of(mean, weight=1e9):
  """An average of these values, which many examples outweigh any other in."""
  return Average(jnp.asarray(mean), jnp.full(len(mean), weight))


def test_it_starts_linear():
  a = adaptive(**ENDS)
  t = jnp.linspace(0.0, 1.0, 1001)
  log_snr, slope = log_snr_and_slope(a.as_schedule(a.init()), t)
  np.testing.assert_allclose(log_snr, 10 - 16 * np.linspace(0, 1, 1001), atol=2e-5)
  np.testing.assert_allclose(slope, -16, rtol=1e-4)


def test_the_density_of_times_is_the_state():
  """A uniform t falls into each bin of log_snr with the bin's share of the state."""
  state = jnp.exp(jax.random.normal(jax.random.key(0), (16,)))
  schedule = adaptive(**ENDS, num_bins=16).as_schedule(state_of(state))
  t = (jnp.arange(100_000) + 0.5) / 100_000
  log_snr, slope = log_snr_and_slope(schedule, t)
  count, _ = np.histogram(log_snr, bins=16, range=(-6, 10))
  np.testing.assert_allclose(count / count.sum(), state / state.sum(), atol=3e-5)
  number = np.clip((np.asarray(log_snr) + 6).astype(int), 0, 15)
  np.testing.assert_allclose(-1 / slope, (state / state.sum())[number], rtol=2e-3)  # p per unit


def test_end_points_and_strict_fall_even_with_empty_bins():
  state = state_of([0.0, 1e-9, 1.0, 0.0])
  schedule = adaptive(**ENDS, num_bins=4).as_schedule(state)
  log_snr, slope = log_snr_and_slope(schedule, jnp.linspace(0.0, 1.0, 257))
  np.testing.assert_allclose([log_snr[0], log_snr[-1]], [10, -6], atol=1e-5)
  assert np.all(np.diff(log_snr) < 0) and np.all(np.isfinite(slope)) and np.all(slope < 0)


def test_hits_in_one_batch_count_as_often_as_they_come():
  """decay to the power of the count towards their mean; other bins keep their value."""
  a = adaptive(**ENDS, num_bins=4, decay=0.9)
  log_snr = jnp.array([-6.0, -5.0, -2.5, 10.0])  # bins 0, 0, 0 and the last
  state = Average(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.ones(4))
  mean, weight = a.update(state, a.hits(log_snr, jnp.array([5.0, 7.0, 9.0, 1.0])))
  want = [0.9**3 * 1 + (1 - 0.9**3) * 7, 2.0, 3.0, 0.9 * 4 + 0.1 * 1]
  np.testing.assert_allclose(mean, want, rtol=1e-6)
  np.testing.assert_allclose(weight, 1, rtol=1e-6)


def test_the_average_has_no_memory_of_where_it_started():
  """After any number of examples it is sum_i decay^(n-i) v_i / sum_i decay^(n-i)."""
  a = adaptive(**ENDS, num_bins=1, decay=0.9)
  state = a.init()
  values = np.random.default_rng(0).uniform(1, 9, 12)
  for value in values:
    state = a.update(state, a.hits(jnp.zeros(1), jnp.array([value])))
  share = 0.9 ** np.arange(11, -1, -1)
  np.testing.assert_allclose(state.mean[0], (share * values).sum() / share.sum(), rtol=1e-5)
  np.testing.assert_allclose(state.weight[0], 1 - 0.9**12, rtol=1e-5)


@pytest.mark.parametrize('scale', [1e-4, 1.0, 1e5])
def test_one_batch_moves_it_whatever_the_size_of_the_loss(scale):
  """With as many examples in a bin as the prior counts for, it is half way to their mean."""
  a = adaptive(**ENDS, num_bins=2, decay=0.999)
  log_snr = jnp.repeat(jnp.array([-3.0, 7.0]), PRIOR)
  state = a.update(a.init(), a.hits(log_snr, scale * jnp.repeat(jnp.array([1.0, 3.0]), PRIOR)))
  np.testing.assert_allclose(a.density(state) / scale, [1.5, 2.5], rtol=1e-5)


def test_parts_of_a_batch_add_up():
  a = adaptive(**ENDS)
  log_snr = jax.random.uniform(jax.random.key(1), (64,), minval=-6, maxval=10)
  value = jnp.exp(log_snr / 4)
  parts = [a.hits(log_snr[i::4], value[i::4]) for i in range(4)]
  pooled = Hits(sum(p.total for p in parts), sum(p.count for p in parts))
  whole = a.hits(log_snr, value)
  for one, other in zip(a.update(a.init(), pooled), a.update(a.init(), whole), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_it_finds_the_loss_of_a_power_law_gaussian(key):
  """3,072 dimensions with variances k^-2, weight sigmoid(2 - log_snr), 3,000 steps of 2,048.

  The exact denoiser's error is E|eps_hat - eps|^2 = sum_k a^2 v_k / (a^2 v_k + s^2), and its spread
  that of a weighted chi-square, drawn here as a normal. The target is the density proportional to
  the weighted error; the best fixed normal is found by search.
  """
  low, high = -12.0, 14.0
  v = np.arange(1, 3073) ** -2.0
  v /= v.mean() * 4  # mean square 1/4, as of images
  signal = lambda log_snr: 1 / (1 + np.exp(-log_snr)) * v
  noise = lambda log_snr: 1 / (1 + np.exp(log_snr))
  grid = np.linspace(low, high, 4001)
  shares = np.stack([signal(x) / (signal(x) + noise(x)) for x in grid])
  weight = 1 / (1 + np.exp(grid - 2))
  mean, std = weight * shares.sum(axis=1), weight * np.sqrt(2 * (shares**2).sum(axis=1))

  a = adaptive(low, high)
  table = [jnp.asarray(b, jnp.float32) for b in (grid, mean, std)]

  def step(state, key):
    key_t, key_eps = jax.random.split(key)
    t = (jnp.arange(2048) + jax.random.uniform(key_t)) / 2048
    log_snr, slope = log_snr_and_slope(a.as_schedule(state), t)
    spread = jnp.interp(log_snr, table[0], table[2]) * jax.random.normal(key_eps, (2048,))
    value = jnp.interp(log_snr, table[0], table[1]) + spread
    loss = -slope * value
    return a.update(state, a.hits(log_snr, value)), (loss.mean(), (loss**2).mean())

  state, (first, second) = jax.lax.scan(step, a.init(), jax.random.split(key, 3000))
  in_bins = np.interp(low + (np.arange(100 * 40) + 0.5) * (high - low) / 4000, grid, mean)
  target = in_bins.reshape(100, 40).mean(axis=1)
  state = a.density(state)
  total_variation = 0.5 * np.abs(state / state.sum() - target / target.sum()).sum()
  assert total_variation < 0.02, total_variation

  square = mean**2 + std**2
  expected = np.trapezoid(mean, grid)

  def cv_of_normal(centre, width):
    p = np.exp(-0.5 * ((grid - centre) / width) ** 2)
    p /= np.trapezoid(p, grid)
    return np.sqrt(np.trapezoid(square / p, grid) / expected**2 - 1)

  best = min(cv_of_normal(c, w) for c in np.linspace(-3, 8, 45) for w in np.linspace(0.8, 5, 43))
  cv = np.sqrt(second[-200:].mean() / first[-200:].mean() ** 2 - 1)
  assert cv < 1.1 * best, (cv, best)
  uniform = np.sqrt(np.trapezoid(square, grid) * (high - low) / expected**2 - 1)
  assert uniform > 5 * cv
  predicted = predicted_reduction(state)
  np.testing.assert_allclose(predicted, (cv**2 + 1) / (uniform**2 + 1), rtol=0.05)


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (dict(log_snr_min=3.0, log_snr_max=-3.0), 'log_snr_min=3.0 must be below'),
    (dict(ENDS, num_bins=0), 'num_bins=0 must be 1 or more'),
    (dict(ENDS, decay=1.0), r'decay=1.0 must be in \[0, 1\)'),
  ],
)
def test_bad_settings_are_refused(bad, message):
  with pytest.raises(ValueError, match=message):
    adaptive(**bad)
