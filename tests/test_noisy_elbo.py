"""Gaussian data, for which everything has a closed form.

x ~ N(0, c I) in D dimensions, with its exact denoiser and q(z_1) as the prior: h is
D sigmoid(log_snr + log c), and L is the mutual information of z and x, D/2 log(1 + c e^log_snr).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm.diffusion.noisy_elbo import augmented
from vdm.diffusion.weightings import WEIGHTINGS

D, C = 7, 0.3
LOW, HIGH = -6.0, 9.0


def information(log_snr):
  return D / 2 * np.log1p(C * np.exp(log_snr))


def table(num_bins):
  """(edges, the mean of h in each bin): exactly, from the differences of L."""
  edges = np.linspace(LOW, HIGH, num_bins + 1)
  return jnp.asarray(edges), jnp.asarray(2 * np.diff(information(edges)) / np.diff(edges))


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def test_h_is_the_error_of_the_exact_denoiser():
  """Posterior variance of x, times alpha^2 / sigma^2, is the mean error of eps_hat: by its bins."""
  edges, h = table(3000)
  log_snr = (np.array(edges)[1:] + np.array(edges)[:-1]) / 2
  snr = np.exp(log_snr)
  np.testing.assert_allclose(h, D * snr / (1 / C + snr), rtol=1e-4)


def test_losses_at_the_edges_are_the_mutual_information():
  edges, h = table(30)
  got = augmented(WEIGHTINGS['elbo'](), edges, h, information(LOW)).losses
  np.testing.assert_allclose(got, information(np.array(edges)), rtol=1e-12)


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_both_sides_of_the_theorem_agree_for_every_weighting(name):
  """-w' by differentiation and a fine sum of its own, w by the function's quadrature."""
  w = WEIGHTINGS[name]()
  edges, h = table(30)
  got = augmented(w, edges, h, information(LOW))
  by_parts = got.atom * got.losses[-1] - got.total * got.losses[0] + got.parts.sum()
  np.testing.assert_allclose(got.weighted, by_parts, rtol=1e-10)
  np.testing.assert_allclose(got.atom + got.mass.sum(), got.total, rtol=1e-10)

  step = (HIGH - LOW) / 30 / 400
  middle = jnp.asarray(LOW + step * (np.arange(30 * 400) + 0.5))
  _, slope = jax.jvp(w, (middle,), (jnp.ones_like(middle),))
  loss = np.interp(middle, edges, got.losses)
  sums = lambda f: step * np.asarray(f).reshape(30, 400).sum(axis=1)
  # the kinks of edm_monotonic and min_snr are inside a bin
  size = np.abs(sums(slope * loss)).max()
  np.testing.assert_allclose(got.parts, sums(-slope * loss), atol=2e-3 * size + 1e-12)
  np.testing.assert_allclose(got.mass, sums(-slope), atol=2e-3 * np.abs(sums(slope)).max() + 1e-12)


def test_a_weighted_loss_in_closed_form():
  """For w = sigmoid(k - log_snr), k = -log c: 1/2 int w h = D/2 [sigmoid(log_snr - k)]."""
  k = -np.log(C)
  sigmoid = lambda a: 1 / (1 + np.exp(-a))
  exact = D / 2 * (sigmoid(HIGH - k) - sigmoid(LOW - k))
  error = [
    float(augmented(WEIGHTINGS['sigmoid'](bias=k), *table(n)).weighted) - exact for n in (30, 60)
  ]
  assert abs(error[1]) < 2e-3 * exact
  np.testing.assert_allclose(error[0] / error[1], 4, rtol=0.05)  # h is constant in a bin


def test_the_bound_itself_has_all_its_weight_on_the_data():
  edges, h = table(30)
  got = augmented(WEIGHTINGS['elbo'](), edges, h)
  np.testing.assert_array_equal(got.mass, 0)
  assert got.atom == 1 and got.total == 1
  np.testing.assert_allclose(got.weighted, got.losses[-1], rtol=1e-12)


def test_a_rising_weighting_has_negative_mass():
  edges, h = table(30)
  assert np.all(augmented(WEIGHTINGS['sigmoid'](), edges, h).mass >= 0)
  assert np.any(augmented(WEIGHTINGS['iddpm'](), edges, h).mass < 0)


def test_works_in_float32_under_jit():
  edges, h = (a.astype(jnp.float32) for a in table(30))
  w = WEIGHTINGS['sigmoid']()
  with jax.enable_x64(False):
    got = jax.jit(lambda edges, h: augmented(w, edges, h))(edges, h)
  exact = augmented(w, *table(30))
  for a, b in zip(got, exact, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
