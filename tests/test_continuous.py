import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from vdm.configs import gaussian_fields

import vdm
from vdm.diffusion.continuous import censored, normal
from vdm.diffusion.decoders import prior_loss
from vdm.diffusion.elbo import diffusion_loss
from vdm.diffusion.gaussian import Prediction, alpha, expand_to, sigma
from vdm.diffusion.schedules import linear
from vdm.diffusion.weightings import elbo

SHIFT, SCALE = (3.0, -1.0), (2.0, 0.5)  # of two channels
KINDS = {
  'normal': functools.partial(normal, SHIFT, SCALE, 6.0),
  'normal learned': functools.partial(normal, SHIFT, SCALE, 6.0, learned_std=True),
  'censored': functools.partial(censored, SHIFT, SCALE, 6.0, low=-1.2, high=4.0),
  'censored learned': functools.partial(
    censored, SHIFT, SCALE, 6.0, learned_std=True, low=-1.2, high=4.0
  ),
}


def made(kind, log_std=-1.3):
  decoder = KINDS[kind]()
  params = {'decoder': jax.tree.map(lambda a: jnp.full_like(a, log_std), decoder.init())}
  return decoder.with_params(params)


@pytest.mark.parametrize('kind', KINDS)
def test_units_and_their_inverse(kind):
  decoder = KINDS[kind]()
  u = np.float32([[[3.0, -1.0]], [[3.5, -0.5]]])
  x = decoder.to_model(u)
  np.testing.assert_allclose(x, [[[0, 0]], [[0.25, 1]]])
  np.testing.assert_allclose(decoder.from_model(x), u, rtol=1e-6)
  assert decoder.unit == 'nats/dim' and decoder.metric == 'nats_per_dim'
  assert decoder.per_dim(6.0, 3) == 2


@pytest.mark.parametrize('kind', KINDS)
def test_the_likelihood_is_normalised_in_the_units_of_the_data(kind):
  decoder, log_snr_max = made(kind), jnp.float32(1.0)
  for channel, z in ((0, 0.4), (1, -0.9)):

    def probability(values, channel=channel, z=z):
      u = np.zeros((len(values), 1, 2), np.float32)
      u[:, 0, channel] = values
      z_0 = jnp.full((len(values), 1, 2), z)
      valid = jnp.broadcast_to(jnp.arange(2) == channel, u.shape)
      return np.exp(decoder.log_prob(jnp.asarray(u), z_0, log_snr_max, valid))

    bounded = kind.startswith('censored')
    grid = np.linspace(-1.2, 4.0, 4001) if bounded else np.linspace(-30, 40, 20001)
    inner = grid[1:-1] if bounded else grid
    total = integrate.trapezoid(probability(inner), inner)
    if bounded:
      total += probability(grid[[0, -1]]).sum()
    assert total == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_loss_is_the_likelihood_of_the_z_0_made_with_eps(kind):
  decoder, log_snr_max = made(kind), jnp.float32(2.0)
  rng = np.random.RandomState(0)
  u = np.clip(rng.normal(SHIFT, SCALE, (5, 3, 2)), -1.2, 4.0).astype(np.float32)
  eps = jnp.asarray(rng.normal(size=u.shape), jnp.float32)
  z_0 = alpha(log_snr_max) * decoder.to_model(u) + sigma(log_snr_max) * eps
  found = decoder.loss(jnp.asarray(u), eps, log_snr_max)
  np.testing.assert_allclose(found, -decoder.log_prob(u, z_0, log_snr_max), rtol=2e-5, atol=1e-4)


def test_normal_beside_scipy_and_censored_inside_its_bounds():
  log_snr_max, rng = jnp.float32(2.0), np.random.RandomState(1)
  u = rng.uniform(-1.1, 3.9, (4, 3, 2)).astype(np.float32)
  z_0 = jnp.asarray(rng.normal(size=u.shape), jnp.float32)
  for kind, std in (('normal', np.exp(-1.0)), ('normal learned', np.exp(-1.3))):
    y = np.asarray(z_0) / np.sqrt(1 / (1 + np.exp(-2.0)))
    exact = stats.norm.logpdf(u, y * SCALE + np.array(SHIFT), std * np.array(SCALE)).sum((1, 2))
    np.testing.assert_allclose(made(kind).log_prob(u, z_0, log_snr_max), exact, rtol=1e-5)
    inside = made(kind.replace('normal', 'censored')).log_prob(u, z_0, log_snr_max)
    np.testing.assert_allclose(inside, exact, rtol=1e-5)


def test_a_value_beyond_its_bounds_has_no_probability():
  decoder, z_0 = made('censored'), jnp.zeros((5, 1, 2))
  u = jnp.tile(jnp.float32([-1.3, -1.2, 0.0, 4.0, 4.1])[:, None, None], (1, 1, 2))
  found = decoder.log_prob(u, z_0, jnp.float32(2.0))
  np.testing.assert_array_equal(np.isfinite(found), [False, True, True, True, False])
  assert (np.asarray(found)[[0, -1]] == -np.inf).all()


@pytest.mark.parametrize('masked', [False, True])
def test_examples_beyond_the_bounds_are_refused_wherever_they_are(tmp_path, masked):
  x = np.linspace(-1.2, 0.1, 1200 * 4, dtype=np.float32).reshape(1200, 4, 1)
  mask = np.ones((1200, 4), np.uint8)
  mask[:, 3] = 0

  def load(**changes):
    np.savez(tmp_path / 'a.npz', x=x, **{'mask': mask} if masked else {})
    config = gaussian_fields.get_config()
    with config.unlocked():
      config.data.update(name='arrays', as_found=True, condition_shape=(), path=f'{tmp_path}/a.npz')
      config.data.update(train_split='[:1150]', eval_split='[1150:]')
      config.decoder.update(dict(name='censored', low=-1.2, high=0.1) | changes)
    return vdm.Experiment(config, {'train.batch_size': 8}).source('train')

  load().fetch(np.arange(1150))  # 0.1 as float32 has it
  with pytest.raises(ValueError, match=r'^config.decoder.low=-1.0 must be that of all values'):
    load(low=-1.0).fetch(np.arange(1))
  x[1100, 3] = 7  # what a mask leaves out does not count; and few examples are looked at before
  if masked:
    assert (load().fetch(np.arange(1100, 1101))['image'] == 0).any()
  x[1100, 1] = 7
  with pytest.raises(ValueError, match=r'^config.decoder.high=0.1 must be that of all values'):
    load().fetch(np.arange(1100, 1101))


@pytest.mark.parametrize('kind', KINDS)
def test_samples_have_the_distribution_of_the_likelihood(kind):
  decoder, log_snr_max = made(kind), jnp.float32(0.0)
  keys = jax.random.split(jax.random.key(0), 20_000)
  z_0 = jnp.full((20_000, 1, 2), 0.3)
  drawn = np.asarray(decoder.sample(keys, z_0, log_snr_max))[:, 0]
  std = np.exp(-1.3) if 'learned' in kind else 1.0
  mean = 0.3 * np.sqrt(2) * np.array(SCALE) + SHIFT
  for channel in range(2):
    exact = stats.norm(mean[channel], std * SCALE[channel])
    for value in (-1.1, 0.5, 2.0, 3.9):
      share = (drawn[:, channel] <= value).mean()
      assert share == pytest.approx(exact.cdf(value), abs=0.015)
  if kind.startswith('censored'):
    assert drawn.min() >= -1.2 and drawn.max() <= 4.0


def test_a_learned_std_starts_at_that_of_the_noise_and_is_a_parameter():
  decoder = KINDS['normal learned']()
  params = decoder.init()
  np.testing.assert_allclose(params['log_std'], [-3.0, -3.0])
  fixed = KINDS['normal']()
  u, eps = jnp.ones((2, 1, 2)), jnp.full((2, 1, 2), 0.7)
  own = decoder.with_params({'decoder': params}).loss(u, eps, jnp.float32(6.0))
  np.testing.assert_allclose(own, fixed.loss(u, eps, jnp.float32(6.0)), rtol=1e-6)
  of = lambda params: decoder.with_params({'decoder': params}).loss(u, eps, jnp.float32(6.0)).sum()
  # d/dlog_std of 1/2 eps^2 e^(-6 - 2 log_std) + log_std
  np.testing.assert_allclose(jax.grad(of)(params)['log_std'], 2 * (1 - 0.7**2), rtol=1e-5)


@pytest.mark.parametrize('learned', [False, True])
def test_the_bound_of_the_exact_denoiser_tends_to_the_exact_likelihood(learned):
  """Of u ~ N(mu, tau^2): by quadrature over log_snr and over eps, which is normal."""
  mu, tau, num = 5.0, 0.7, 4001
  gaps = []
  for log_snr_max in (4.0, 8.0, 12.0):
    decoder = normal((4.0,), (2.0,), log_snr_max, learned_std=learned)
    decoder = decoder.with_params({'decoder': decoder.init()})
    mean, var = (mu - 4.0) / 2.0, (tau / 2.0) ** 2  # of x

    def denoiser(z, log_snr, mean=mean, var=var):
      a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
      x = mean + var * a / (var * a**2 + s**2) * (z - a * mean)
      return Prediction(x, (z - a * x) / s)

    schedule = linear(-12.0, log_snr_max)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    u = jnp.full((1, 1, 1), 5.9)
    t = jnp.linspace(0, 1, num)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
      eps = jnp.full((num, 1, 1), node, jnp.float32)
      x = jnp.broadcast_to(decoder.to_model(u), eps.shape)
      term = diffusion_loss(denoiser, schedule, elbo(), x, t, eps)
      diffusion = integrate.simpson(np.asarray(term.elbo, np.float64), dx=1 / (num - 1))
      recon = decoder.loss(u, eps[:1], jnp.float32(log_snr_max))
      total += weight * (diffusion + float(recon[0]))
    total += float(prior_loss(decoder.to_model(u), jnp.float32(-12.0))[0])
    gaps.append(total + stats.norm.logpdf(5.9, mu, tau))
  assert gaps[0] > gaps[1] > gaps[2] > -1e-3
  assert gaps[2] < 2e-3


def test_the_ode_takes_real_values_as_they_are_and_counts_the_unit():
  decoder, u = KINDS['normal'](), jnp.ones((3, 4, 2))
  y, log_q = decoder.dequantizations['none'](None, u, jnp.float32(6.0))
  np.testing.assert_allclose(y, decoder.to_model(u))
  np.testing.assert_allclose(log_q, 4 * np.log(2.0 * 0.5), atol=1e-6)
  valid = jnp.broadcast_to(jnp.arange(4)[:, None] < 1, (3, 4, 1))
  only = KINDS['normal']().dequantizations['none'](None, u, jnp.float32(6.0), valid)[1]
  np.testing.assert_allclose(only, np.log(2.0 * 0.5), atol=1e-6)
  assert not KINDS['censored']().dequantizations


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: normal((0.0,), (0.0,), 6.0), r'scale=\(0.0,\) must be 1 positive numbers'),
    (lambda: normal((0.0,), (1.0, 1.0), 6.0), 'scale=.* must be 1 positive numbers'),
    (lambda: censored((0.0,), (1.0,), 6.0, low=1.0, high=1.0), 'low=1.0 must be below high=1.0'),
  ],
)
def test_refusals(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_censored_decoder_has_no_density_with_parameters_either():
  decoder = censored((0.0,), (1.0,), 8.0, learned_std=True)
  assert not decoder.dequantizations
  assert not decoder.with_params({'decoder': decoder.init()}).dequantizations
