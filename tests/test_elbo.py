import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdm.diffusion import gaussian, heads
from vdm.diffusion.decoders import discrete
from vdm.diffusion.elbo import (
  coefficients_of_variation,
  diffusion_loss,
  interior_gradient,
  moments,
  variational_bound,
)
from vdm.diffusion.gaussian import Prediction
from vdm.diffusion.schedules import SCHEDULES, Learned
from vdm.diffusion.weightings import WEIGHTINGS

ENDS = dict(log_snr_min=-5.0, log_snr_max=7.0)
EXTRA = {'shifted_cosine': dict(image_size=32)}


def make(name):
  schedule = SCHEDULES[name](**ENDS, **EXTRA.get(name, {}))
  return schedule.as_schedule(schedule.init()) if isinstance(schedule, Learned) else schedule


def known_error(z, log_snr):
  """A denoiser whose squared error is a smooth function of log_snr alone, where eps = x = 0."""
  error = jax.nn.sigmoid(1 - log_snr) + 0.1
  return Prediction(z, jnp.zeros_like(z) + gaussian.expand_to(jnp.sqrt(error), z))


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_the_loss_is_the_same_for_every_schedule_between_equal_end_points(weighting):
  """1/2 int w(log_snr) error(log_snr) dlog_snr, by quadrature in t and in log_snr."""
  w = WEIGHTINGS[weighting]()
  nodes, weights = np.polynomial.legendre.leggauss(200)
  grid = jnp.float32(1 + 6 * nodes)  # from -5 to 7
  exact = 0.5 * np.sum(6 * weights * np.float64(w(grid) * (jax.nn.sigmoid(1 - grid) + 0.1)))
  t = jnp.float32((nodes + 1) / 2)
  zeros = jnp.zeros((200, 1))
  rtol = 1e-4 if weighting == 'min_snr' else 1e-5  # w has a kink: the quadrature is not as good
  for name in SCHEDULES:
    term = diffusion_loss(known_error, make(name), w, zeros, t, zeros)
    np.testing.assert_allclose(np.sum(np.float64(term.loss) * weights / 2), exact, rtol=rtol)


def test_weight_multiplies_the_bound(key):
  t = jnp.linspace(0.01, 0.99, 8)
  x, eps = jax.random.normal(key, (2, 8, 4))
  w = WEIGHTINGS['sigmoid'](bias=1.0)
  term = diffusion_loss(known_error, make('cosine'), w, x, t, eps)
  np.testing.assert_allclose(term.loss, term.elbo * w(term.log_snr), rtol=1e-6)


@pytest.mark.parametrize('num_timesteps', [1, 3, 1000])
def test_discrete_loss_is_a_kl_between_posteriors(num_timesteps, key):
  """T KL(q(z_s | z_t, x) || q(z_s | z_t, x_hat)), two Gaussians of the same variance."""
  schedule = make('cosine')
  t = jnp.array([0.2004, 0.9007])  # inside a step, not at its end
  x, eps = jax.random.normal(key, (2, 2, 3))
  end = np.ceil(np.array(t) * num_timesteps) / num_timesteps
  log_snr_t = schedule(jnp.float32(end))
  log_snr_s = schedule(jnp.float32(end - 1 / num_timesteps))
  z = gaussian.q_sample(x, eps, log_snr_t)
  denoiser = lambda z, log_snr: heads.to_prediction('eps', 0.3 * jnp.sin(z), z, log_snr)
  # q(z_s | z_t, x) in float64: the means differ by alpha_s sigma_ts^2 / sigma_t^2 (x - x_hat)
  (a2t, s2t), (a2s, s2s) = (
    (1 / (1 + np.exp(-ls)), 1 / (1 + np.exp(ls))) for ls in map(np.float64, (log_snr_t, log_snr_s))
  )
  s2_ts = s2t - a2t / a2s * s2s
  difference = np.float64(x - denoiser(z, log_snr_t).x)
  shift = (np.sqrt(a2s) * s2_ts / s2t)[:, None] * difference
  variance = s2_ts * s2s / s2t
  kl = num_timesteps * 0.5 * np.sum(shift**2, axis=1) / variance
  term = diffusion_loss(
    denoiser, schedule, WEIGHTINGS['elbo'](), x, t, eps, num_timesteps=num_timesteps
  )
  np.testing.assert_allclose(term.elbo, kl, rtol=2e-3)


def test_discrete_time_tends_to_continuous_time_at_rate_one_over_t():
  schedule, elbo = make('cosine'), WEIGHTINGS['elbo']()
  nodes, weights = np.polynomial.legendre.leggauss(400)
  t = jnp.float32((nodes + 1) / 2)
  zeros = jnp.zeros((400, 1))
  term = diffusion_loss(known_error, schedule, elbo, zeros, t, zeros)
  continuous = np.sum(np.float64(term.elbo) * weights / 2)

  def gap(num_timesteps):
    ends = (jnp.arange(num_timesteps) + 0.5) / num_timesteps  # one time in each step
    zeros = jnp.zeros((num_timesteps, 1))
    term = diffusion_loss(known_error, schedule, elbo, zeros, ends, zeros, num_timesteps)
    return np.float64(term.elbo).mean() - continuous

  assert gap(128) > 0  # the bound tightens with T
  np.testing.assert_allclose(gap(64) / gap(128), 2, rtol=0.1)
  np.testing.assert_allclose(gap(128) / gap(256), 2, rtol=0.1)


def test_terms_of_the_bound_are_per_example(key):
  u = jax.random.randint(key, (4, 3, 3, 1), 0, 17)
  eps_0, eps = jax.random.normal(key, (2, *u.shape))
  args = (known_error, make('linear'), discrete(17), WEIGHTINGS['elbo']())
  t = jnp.array([0.1, 0.4, 0.6, 0.9])
  bound = variational_bound(*args, u, t, eps_0, eps)
  alone = variational_bound(*args, u[2:3], t[2:3], eps_0[2:3], eps[2:3])
  for whole, part in zip(jax.tree.leaves(bound), jax.tree.leaves(alone), strict=True):
    assert whole.shape in ((4,), u.shape)
    np.testing.assert_allclose(whole[2], part[0], rtol=1e-5)


def test_interior_of_a_schedule_gets_no_gradient_of_the_mean():
  """d/d eta of the integral is zero where the end points stay: invariance, differentiated."""
  nodes, weights = np.polynomial.legendre.leggauss(200)
  t = jnp.float32((nodes + 1) / 2)
  zeros = jnp.zeros((200, 1))

  def loss(bend):
    schedule = lambda t: 7 - 12 * t + bend * t * (1 - t)
    term = diffusion_loss(known_error, schedule, WEIGHTINGS['elbo'](), zeros, t, zeros)
    return jnp.sum(term.elbo * jnp.float32(weights / 2))

  np.testing.assert_allclose(jax.grad(loss)(2.0), 0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('weighting', ['elbo', 'sigmoid'])
def test_interior_gradient_is_that_of_the_mean_square(weighting, key):
  """One backward pass of the mean loss against automatic differentiation of mean(loss^2)."""
  learned = SCHEDULES['learned_net'](**ENDS, num_hidden=5)
  params = learned.init()
  params['interior'] = jax.tree.map(lambda a: a + jnp.linspace(-1, 1, 5), params['interior'])
  w = WEIGHTINGS[weighting]()
  x, eps = jax.random.normal(key, (2, 16, 3))
  t = (jnp.arange(16) + 0.3) / 16
  wrong = lambda z, log_snr: heads.to_prediction(
    'eps', jnp.sin(z) * gaussian.expand_to(jax.nn.sigmoid(log_snr), z), z, log_snr
  )

  def loss_of(params, probe=None):
    return diffusion_loss(wrong, learned.as_schedule(params), w, x, t, eps, probe=probe).loss

  want = jax.grad(lambda p: (loss_of(p) ** 2).mean())(params)['interior']
  zeros = jnp.zeros(16)
  probe_gradients = jax.grad(lambda probe: loss_of(params, probe).mean())((zeros, zeros))
  got = interior_gradient(learned.as_schedule, params, t, loss_of(params), probe_gradients)
  for name in 'abc':
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-6)
    assert np.abs(want[name]).max() > 1e-4


def test_least_variance_makes_the_density_follow_the_loss():
  """With |eps_hat - eps|^2 a function of log_snr alone the optimum has no variance at all."""
  learned = SCHEDULES['learned_net'](**ENDS, num_hidden=64)
  params = learned.init()
  t = (jnp.arange(256) + 0.5) / 256
  zeros = jnp.zeros((256, 1))
  w = WEIGHTINGS['elbo']()

  @jax.jit
  def step(params, opt_state):
    def mean_loss(probe):
      schedule = learned.as_schedule(params)
      term = diffusion_loss(known_error, schedule, w, zeros, t, zeros, probe=probe)
      return term.loss.mean(), term

    probe = (jnp.zeros(256), jnp.zeros(256))
    gradients, term = jax.grad(mean_loss, has_aux=True)(probe)
    interior = interior_gradient(learned.as_schedule, params, t, term.loss, gradients)
    updates, opt_state = adam.update(interior, opt_state)
    return params | {'interior': optax.apply_updates(params['interior'], updates)}, opt_state, term

  adam = optax.adam(0.03)
  opt_state = adam.init(params['interior'])
  spread = []
  for _ in range(300):
    params, opt_state, term = step(params, opt_state)
    m = moments(term, jnp.float32(12.0)).mean(axis=0)
    spread.append(coefficients_of_variation(m))
  assert spread[0][0] > 0.5 and spread[-1][0] < 0.1 * spread[0][0]
  np.testing.assert_allclose(spread[-1][1], spread[0][1], rtol=0.05)  # of the linear one: the same


def test_coefficients_of_variation_are_nan_where_there_are_none():
  assert coefficients_of_variation(np.array([2.0, 5.0, 8.0], np.float32)) == (0.5, 1.0)
  assert np.isnan(coefficients_of_variation(np.zeros(3, np.float32))).all()
  ahead, behind = coefficients_of_variation(np.array([2.0, 3.0, 4.0], np.float32))
  assert np.isnan(ahead) and behind == 0
