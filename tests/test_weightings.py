import jax.numpy as jnp
import numpy as np
import pytest

from vdm.schedules import SCHEDULES
from vdm.weightings import WEIGHTINGS

LOG_SNR = jnp.linspace(-20.0, 20.0, 401)


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_positive_and_finite_in_float32(name):
  w = WEIGHTINGS[name]()(LOG_SNR)
  assert w.shape == LOG_SNR.shape and w.dtype == jnp.float32
  assert np.all(np.isfinite(w)) and np.all(w > 0)


def test_elbo_is_one():
  np.testing.assert_array_equal(WEIGHTINGS['elbo']()(LOG_SNR), 1)


def test_sigmoid_closed_form():
  exact = 1 / (1 + np.exp(np.float64(LOG_SNR) - 1.5))
  np.testing.assert_allclose(WEIGHTINGS['sigmoid'](bias=1.5)(LOG_SNR), exact, rtol=1e-5)


def test_iddpm_is_the_unweighted_eps_loss_under_the_cosine_schedule():
  """E_t |eps_hat - eps|^2 = int p(log_snr) |.|^2 dlog_snr: w = p = -dt/dlog_snr, up to a factor."""
  cosine = SCHEDULES['cosine'](log_snr_min=-12.0, log_snr_max=12.0)
  t = np.linspace(0.05, 0.95, 19)
  step = 1e-3
  density = -2 * step / (np.float64(cosine(jnp.float32(t + step))) - cosine(jnp.float32(t - step)))
  w = np.float64(WEIGHTINGS['iddpm']()(cosine(jnp.float32(t))))
  np.testing.assert_allclose(w / w[9], density / density[9], rtol=2e-3)
