"""Exact denoisers through the evaluator: on one, two and three axes, for each decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from vdm.configs import default

from vdm import build
from vdm.data.gaussian_field import GaussianField
from vdm.data.source import of_arrays
from vdm.diffusion.gaussian import Prediction, alpha, expand_to, sigma
from vdm.evaluation.bound import make_evaluator
from vdm.evaluation.study import batches
from vdm.system import parallel

SHAPES = [(32,), (8, 6), (4, 4, 6)]


def evaluated(denoiser, images, decoder, statistics, log_snr_max, num_values=0, **given):
  """Returns the bound of images under an exact denoiser: (z, conditions) -> Prediction."""
  config = default.get_config('debug')
  with config.unlocked():
    config.data.update(image_shape=images.shape[1:], num_values=num_values)
    config.data.update(shift=(statistics[0],), scale=(statistics[1],))
    config.decoder.update(decoder)
    config.model = dict(
      name='mlp',
      width=8,
      num_blocks=1,
      output='eps',
      class_conditional=False,
      condition_on='live',
      dtype='float32',
    )
    config.schedule.update(name='linear', log_snr_min=-14.0, log_snr_max=log_snr_max)
    config.eval.update(draws=32, batch_size=64, max_images=0)
  model = build.model(config)
  model = model._replace(denoiser=lambda params, conditions, **_: denoiser(conditions))
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  params = {'network': {}, 'schedule': {}, 'decoder': model.decoder.init()}
  source = of_arrays(images, **given)
  return make_evaluator(model, mesh, config.eval)(params, batches(source, config.eval), len(images))


@pytest.mark.parametrize('conditional', [False, True])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_normal_decoder_gives_the_density_of_a_gaussian_field(shape, conditional):
  field = GaussianField(shape, -2.0, 3.0, mean=10.0, blur=0.7, noise_std=1.0)
  u, y = field.draw(np.random.RandomState(0), 256)
  exact = field.log_prob_given(u, y) if conditional else field.log_prob(u)
  exact = -exact.mean() / np.prod(shape)
  of = lambda conditions: field.denoiser(9.0, 4.0, conditions['condition'] if conditional else None)
  more = {'condition': y} if conditional else {}
  result = evaluated(of, u, dict(name='normal'), (9.0, 4.0), 13.0, **more)
  assert result.unit == 'nats/dim'
  assert result.value == pytest.approx(exact, abs=4 * result.stderr + 1e-3)
  assert result.stderr < 0.03
  spread = field.entropy() - field.conditional_entropy()
  if conditional:
    assert spread > 10 * result.stderr  # an unconditional denoiser would not pass


def atoms(mean, std, low, high):
  """The exact denoiser of independent clip(N(mean, std), low, high), in the same units."""
  mass_low, mass_high = stats.norm.cdf(low, mean, std), stats.norm.sf(high, mean, std)
  norm = jax.scipy.stats.norm

  def denoise(z, log_snr):
    a, s = expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z)
    total = a**2 * std**2 + s**2
    centre, spread = mean + a * std**2 / total * (z - a * mean), std * s / jnp.sqrt(total)
    lower, upper = (low - centre) / spread, (high - centre) / spread
    log_inside = jnp.log(jnp.maximum(norm.cdf(upper) - norm.cdf(lower), 1e-37))
    logs = jnp.stack(
      [
        jnp.log(mass_low) + norm.logpdf(z, a * low, s),
        jnp.log(mass_high) + norm.logpdf(z, a * high, s),
        norm.logpdf(z, a * mean, jnp.sqrt(total)) + log_inside,
      ]
    )
    inside = centre + spread * (norm.pdf(lower) - norm.pdf(upper)) / jnp.exp(log_inside)
    values = jnp.stack([jnp.full_like(z, low), jnp.full_like(z, high), jnp.clip(inside, low, high)])
    x = (jax.nn.softmax(logs, axis=0) * values).sum(axis=0)
    return Prediction(x, (z - a * x) / s)

  return denoise


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_censored_decoder_costs_a_nat_for_each_value_at_a_bound(shape):
  """There y = bound + s eps, and -log Phi(-eps) is the logarithm of a uniform number."""
  mean, std, low, high = 0.2, 1.0, -0.5, 1.5
  rng = np.random.RandomState(0)
  u = np.clip(rng.normal(mean, std, (256, *shape, 1)), low, high).astype(np.float32)
  at = [(u <= np.float32(low)), (u >= np.float32(high))]
  each = np.where(at[0], -stats.norm.logcdf(low, mean, std), -stats.norm.logpdf(u, mean, std))
  each = np.where(at[1], -stats.norm.logsf(high, mean, std), each)
  share = (at[0] | at[1]).mean()
  result = evaluated(
    lambda _: atoms(mean, std, low, high),
    u,
    dict(name='censored', low=low, high=high),
    (0.0, 1.0),
    13.0,
  )
  assert 0.3 < share < 0.4
  # what is inside and within the noise of a bound is told from it by no more than that noise
  assert result.value - share == pytest.approx(each.mean(), abs=4 * result.stderr + 0.01)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_discrete_decoder_gives_the_probability_of_quantised_values(shape):
  """Of fair coin flips, one bit each; the denoiser of two atoms is a hyperbolic tangent."""
  u = np.random.RandomState(0).randint(0, 2, (128, *shape, 1)).astype(np.uint8)

  def denoise(z, log_snr):  # x = -1/2 or 1/2
    a, s = expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z)
    x = 0.5 * jnp.tanh(0.5 * a * z / s**2)
    return Prediction(x, (z - a * x) / s)

  result = evaluated(lambda _: denoise, u, dict(name='discrete'), (0, 1), 8.0, num_values=2)
  assert result.unit == 'bits/dim'
  assert result.value == pytest.approx(1.0, abs=4 * result.stderr + 1e-3)
