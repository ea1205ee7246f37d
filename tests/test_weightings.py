import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from vdm.configs import digits

from vdm import build
from vdm.diffusion.elbo import diffusion_loss
from vdm.diffusion.heads import HEADS, loss_ratio, to_prediction
from vdm.diffusion.schedules import SCHEDULES
from vdm.diffusion.weightings import WEIGHTINGS, is_monotone, shifted

LOG_SNR = jnp.linspace(-20.0, 20.0, 401)
# Where each w is highest (maths of VDM++ table 1); None where it never rises.
PEAK = {
  'elbo': None,
  'ddpm': -0.922,
  'iddpm': 0.0,
  'edm': -3.30778,
  'edm_monotonic': None,
  'v_cosine': None,
  'flow_matching': None,
  'indi': None,
  'p2': -np.log(3),
  'min_snr': 0.0,
  'sigmoid': None,
  'sd3': -3.376,
}


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_positive_finite_and_differentiable_in_float32(name):
  weighting = WEIGHTINGS[name]()
  w, pull = jax.vjp(weighting, LOG_SNR)
  (slope,) = pull(jnp.ones_like(w))
  assert w.shape == LOG_SNR.shape and w.dtype == jnp.float32
  assert np.all(np.isfinite(w)) and np.all(w > 0) and np.all(np.isfinite(slope))
  with jax.enable_x64(True):
    exact = weighting(jnp.float64(np.float64(LOG_SNR)))
  np.testing.assert_allclose(w, exact, rtol=3e-5)


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_far_from_the_data_w_is_that_of_double_precision(name):
  log_snr = [-170.0, -120.0, -100.0, -90.0, -60.0, 60.0, 90.0]  # e^90 is beyond float32
  heads = [{'head': head} for head in HEADS] if name == 'sd3' else [{}]
  for arguments in heads:
    weighting = WEIGHTINGS[name](**arguments)
    w = weighting(jnp.float32(log_snr))
    with jax.enable_x64(True):
      exact = weighting(jnp.float64(log_snr))
    np.testing.assert_allclose(w, exact, rtol=1e-4, atol=1e-37, err_msg=f'{arguments}')


# Every method's own loss of a scalar x = 0.3, as its authors wrote it: log_snr of its own variable,
# and the loss for a network whose noise estimate is off by `error`. Nothing of vdm is used.
X, EPS = 0.3, -0.7


def cosine(t):
  return 2 * np.log(np.cos(np.pi * t / 2) / np.sin(np.pi * t / 2))


def estimate(a, b, error):
  """(x_hat, eps_hat) with a x_hat + b eps_hat = z, for z = a x + b eps."""
  eps_hat = EPS + error
  return (a * X + b * EPS - b * eps_hat) / a, eps_hat


def eps_loss(a, b, error):
  return (estimate(a, b, error)[1] - EPS) ** 2


def x_loss(a, b, error):
  return (estimate(a, b, error)[0] - X) ** 2


def o_loss(t, error):
  """Flow matching: |v_hat - (eps - x)|^2 at (1 - t) x + t eps."""
  x_hat, eps_hat = estimate(1 - t, t, error)
  return (eps_hat - x_hat - (EPS - X)) ** 2


def v_loss(t, error):
  a, b = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
  x_hat, eps_hat = estimate(a, b, error)
  return (a * eps_hat - b * x_hat - (a * EPS - b * X)) ** 2


def linear_beta(t):
  """VP SDE: log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2."""
  log_alpha = -(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2
  return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))


def cos_sin(t):
  return np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)


def snr(t):
  return (np.cos(np.pi * t / 2) / np.sin(np.pi * t / 2)) ** 2


def edm_loss(log_sigma, error):
  """lambda(sigma) |D(x + sigma eps) - x|^2, sigma_data 0.5, ln sigma ~ N(-1.2, 1.2^2)."""
  sigma = np.exp(log_sigma)
  weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
  return norm.pdf(log_sigma, -1.2, 1.2) * weight * x_loss(1.0, sigma, error)


def sd3_loss(logit_t, error):
  return norm.pdf(logit_t) * o_loss(1 / (1 + np.exp(-logit_t)), error)


def ncsn_loss(log_sigma, error):
  """sigma^2 |score_hat - score|^2 at x + sigma eps, sigma log-uniform (Song and Ermon)."""
  sigma = np.exp(log_sigma)
  return sigma**2 * (estimate(1.0, sigma, error)[1] / sigma - EPS / sigma) ** 2


# name: (log_snr of the method's variable, its domain, its loss density over that variable)
flow = lambda t: 2 * np.log((1 - t) / t)
linear_log_snr = lambda t: np.log(linear_beta(t)[0] ** 2 / linear_beta(t)[1] ** 2)
NATIVE = {
  'elbo': (lambda u: -2 * u, (-6, 6), ncsn_loss),
  'ddpm': (linear_log_snr, (0.01, 1), lambda t, e: eps_loss(*linear_beta(t), e)),
  'iddpm': (cosine, (0.02, 0.98), lambda t, e: eps_loss(*cos_sin(t), e)),
  'edm': (lambda u: -2 * u, (-6, 4), edm_loss),
  'v_cosine': (cosine, (0.02, 0.98), v_loss),
  'flow_matching': (flow, (0.02, 0.98), o_loss),
  'indi': (flow, (0.02, 0.98), lambda t, e: x_loss(1 - t, t, e)),
  'p2': (cosine, (0.02, 0.98), lambda t, e: eps_loss(*cos_sin(t), e) / (1 + snr(t))),
  'min_snr': (
    cosine,
    (0.02, 0.98),
    lambda t, e: np.minimum(snr(t), 5) * x_loss(*cos_sin(t), e),
  ),
  'sigmoid': (  # simple diffusion 2, eq. 4: sigmoid(log_snr - bias) on the error of x
    lambda u: u,
    (-8, 8),
    lambda u, e: x_loss(np.exp(u / 2), 1.0, e) / (1 + np.exp(2.0 - u)),
  ),
  'sd3': (lambda n: -2 * n, (-5, 5), sd3_loss),
}

# Squared errors of eps_hat as functions of log_snr; the last is a narrow bump.
ERRORS = (
  lambda log_snr: 1 / (1 + np.exp(log_snr - 1)) + 0.1,
  lambda log_snr: np.exp(-((log_snr + 1) ** 2) / 2),
  lambda log_snr: np.exp(-8 * (log_snr - 2) ** 2),
)


NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(len(LOG_SNR))


def integrate(f, low, high):
  return (high - low) / 2 * np.sum(NODE_WEIGHTS * f(low + (high - low) * (NODES + 1) / 2))


def ratios(log_snr_of, low, high, loss, w):
  """Own loss over own variable by 1/2 int w h dlog_snr, for each of three errors h."""
  ends = sorted((log_snr_of(np.float64(low)), log_snr_of(np.float64(high))))
  for h in ERRORS:
    own = integrate(lambda u, h=h: loss(u, np.sqrt(h(log_snr_of(u)))), low, high)
    yield own / integrate(lambda a, h=h: np.asarray(w(jnp.asarray(a))) * h(a) / 2, *ends)


@pytest.mark.parametrize('name', NATIVE)
def test_the_methods_own_loss_is_this_weighting(name, float64):
  log_snr_of, domain, loss = NATIVE[name]
  constants = list(ratios(log_snr_of, *domain, loss, WEIGHTINGS[name]()))
  np.testing.assert_allclose(constants, constants[0], rtol=3e-4)  # min_snr has a kink


@pytest.mark.parametrize(
  ('name', 'arguments', 'loss'),
  [
    ('p2', {'gamma': 0.5}, lambda t, e: eps_loss(*cos_sin(t), e) / np.sqrt(1 + snr(t))),
    ('min_snr', {'gamma': 1.5}, lambda t, e: np.minimum(1.5 / snr(t), 1) * eps_loss(1.0, 1.0, e)),
  ],
)
def test_arguments_are_the_methods_own(name, arguments, loss, float64):
  constants = list(ratios(cosine, 0.02, 0.98, loss, WEIGHTINGS[name](**arguments)))
  np.testing.assert_allclose(constants, constants[0], rtol=3e-4)  # min_snr has a kink


@pytest.mark.parametrize('predicted', ['x', 'eps', 'v', 'o'])
@pytest.mark.parametrize('space', ['x', 'eps', 'v', 'o'])
def test_any_prediction_by_any_loss_is_a_weighting_of_one_loss(predicted, space, float64):
  """An output that is wrong by noise: the error in the loss's own space, and the one loss's term.

  The first is written with what the space is of x and eps alone. Times are JiT's, of a normal
  log-SNR, whose density is then all of the weight but `loss_ratio`.
  """
  mean, std, ends = -1.6, 1.6, dict(log_snr_min=-9.0, log_snr_max=6.0)
  schedule = SCHEDULES['edm_train'](**ends, mean=mean, std=std)
  t = jnp.linspace(0.02, 0.98, 9)
  x, eps, wrong = np.random.default_rng(0).normal(size=(3, 9, 5))
  log_snr = np.asarray(schedule(t))
  a, s = (1 / np.sqrt(1 + np.exp(-sign * log_snr))[:, None] for sign in (1, -1))
  of = {
    'x': lambda x, eps: x,
    'eps': lambda x, eps: eps,
    'v': lambda x, eps: a * eps - s * x,
    'o': lambda x, eps: eps - x,
  }
  seen = []

  def denoiser(z, log_snr):
    output = jnp.asarray(of[predicted](x, eps) + wrong)
    seen.append(to_prediction(predicted, output, z, log_snr))
    return seen[-1]

  weighting = WEIGHTINGS['sd3'](mean=mean, std=std, head=space)
  term = diffusion_loss(denoiser, schedule, weighting, jnp.asarray(x), t, jnp.asarray(eps))
  own = ((of[space](*seen[0]) - of[space](x, eps)) ** 2).sum(axis=1) / 2
  if predicted == space:
    np.testing.assert_allclose(own, (wrong**2).sum(axis=1) / 2, rtol=1e-9)
  inside = norm.cdf(6.0, mean, std) - norm.cdf(-9.0, mean, std)
  np.testing.assert_allclose(term.loss, inside * own, rtol=1e-5)  # p is the slope's inverse
  of_eps = ((seen[0].eps - eps) ** 2).sum(axis=1) / 2
  np.testing.assert_allclose(own, loss_ratio(space, jnp.asarray(log_snr)) * of_eps, rtol=1e-9)


def test_sd3_has_edms_loss_for_edms_head(float64):
  log_snr = jnp.asarray(np.float64(LOG_SNR))
  w = WEIGHTINGS['sd3'](mean=2.4, std=2.4, head='F')(log_snr)
  np.testing.assert_allclose(w * 0.25, WEIGHTINGS['edm']()(log_snr), rtol=1e-9)


def test_sigmoid_closed_form():
  exact = 1 / (1 + np.exp(np.float64(LOG_SNR) - 1.5))
  np.testing.assert_allclose(WEIGHTINGS['sigmoid'](bias=1.5)(LOG_SNR), exact, rtol=1e-5)


def test_edm_monotonic_is_edm_above_its_peak_and_constant_below(float64):
  grid = jnp.linspace(-20.0, 20.0, 4097)
  edm, monotonic = WEIGHTINGS['edm']()(grid), WEIGHTINGS['edm_monotonic']()(grid)
  edm, monotonic, below = np.array(edm), np.array(monotonic), np.array(grid) < -3.30778
  np.testing.assert_allclose(monotonic[~below], edm[~below], rtol=1e-12)
  np.testing.assert_allclose(monotonic[below], 0.271027, atol=5e-7)
  np.testing.assert_allclose(np.max(edm), 0.271027, atol=5e-6)


@pytest.mark.parametrize(
  'arguments',
  # the last has two peaks: it falls, rises and falls again
  [{'mean': 0.5, 'std': 1.0}, {'sigma_data': 2.0}, {'mean': 7.6, 'std': 4.0, 'sigma_data': 0.5}],
)
def test_edm_monotonic_falls_for_any_arguments(arguments):
  assert not is_monotone(WEIGHTINGS['edm'](**arguments), -30.0, 20.0)
  assert is_monotone(WEIGHTINGS['edm_monotonic'](**arguments), -30.0, 20.0)


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_monotone_exactly_above_the_peak(name, float64):
  weighting, peak = WEIGHTINGS[name](), PEAK[name]
  assert is_monotone(weighting, -20.0, 20.0) == (peak is None)
  if peak is not None:
    grid = jnp.linspace(peak - 0.5, peak + 0.5, 4097)
    np.testing.assert_allclose(grid[np.argmax(weighting(grid))], peak, atol=1e-3)
    assert is_monotone(weighting, peak + 0.1, 20.0)
    assert not is_monotone(weighting, peak - 0.1, 20.0)


def test_a_slow_rise_is_seen_in_float32():
  """One per mille over the whole range: less than rounding from one point of a grid to the next."""
  assert not is_monotone(lambda log_snr: 1 + 1e-3 * jax.nn.sigmoid(log_snr), -10.0, 10.0)
  assert is_monotone(lambda log_snr: 1 - 1e-3 * jax.nn.sigmoid(log_snr), -10.0, 10.0)


@pytest.mark.parametrize('image_size', [32, 128, 512])
def test_the_shift_is_that_of_the_shifted_cosine(image_size, float64):
  """iddpm, the eps loss under the cosine schedule, shifted: the same under the shifted schedule."""
  ends = dict(log_snr_min=-12.0, log_snr_max=12.0)
  schedule = SCHEDULES['shifted_cosine'](**ends, image_size=image_size)
  log_snr, slope = jax.jvp(schedule, (t := jnp.linspace(0.01, 0.99, 99),), (jnp.ones_like(t),))
  w = shifted(WEIGHTINGS['iddpm'](), image_size)(log_snr)
  np.testing.assert_allclose(-w * slope, -w[0] * slope[0], rtol=1e-9)


def test_the_shift_has_the_published_sizes():
  """-1.386, -2.773, -4.159 at 128, 256, 512: the same weight at lower log_snr."""
  for image_size, shift in ((64, 0.0), (128, -1.386), (256, -2.773), (512, -4.159)):
    w = shifted(WEIGHTINGS['sigmoid'](bias=2.0), image_size)
    np.testing.assert_allclose(w(LOG_SNR), jax.nn.sigmoid(2 + shift - LOG_SNR), rtol=1e-3)


def built(**weighting):
  config = digits.get_config().unlock()
  config.schedule = dict(name='cosine', log_snr_min=-5.0, log_snr_max=7.0)
  config.weighting = weighting
  return build.model(config.lock()).weighting


def test_any_weighting_is_shifted_from_the_config():
  w = built(name='sigmoid', bias=2.0, image_size=256)
  np.testing.assert_allclose(w(LOG_SNR), jax.nn.sigmoid(2 - np.log(16) - LOG_SNR), rtol=1e-5)
  np.testing.assert_array_equal(built(name='sd3')(LOG_SNR), WEIGHTINGS['sd3']()(LOG_SNR))


@pytest.mark.parametrize(
  'weighting',
  [
    dict(name='sigmoid', image_size=0),
    dict(name='edm', std=0.0),
    dict(name='min_snr', gamma=-1.0),
    dict(name='ddpm', beta_min=0.0),
    dict(name='sd3', std=0.0),
  ],
)
def test_bad_arguments_are_refused_by_name(weighting):
  field, value = list(weighting.items())[1]
  with pytest.raises(ValueError, match=rf'config.weighting.{field}={value} must be positive'):
    built(**weighting)


def test_a_head_that_is_none_is_refused():
  with pytest.raises(ValueError, match=r"config.weighting.head='y' must be one of eps, x, v, o,"):
    built(name='sd3', head='y')


def test_a_far_mean_does_not_overflow():
  w = WEIGHTINGS['edm_monotonic'](mean=800.0)
  assert bool(jnp.isfinite(w(jnp.float32(0.0))))
