import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from vdm.configs import default

from vdm import build, cards, data
from vdm.diffusion.decoders import bits_per_dim, discrete
from vdm.diffusion.elbo import DiffusionTerm
from vdm.diffusion.gaussian import Prediction, alpha, log_snr_and_slope, sigma
from vdm.diffusion.schedules import SCHEDULES
from vdm.diffusion.weightings import WEIGHTINGS
from vdm.evaluation import evaluate
from vdm.evaluation.bound import (
  NUM_BINS,
  BitsPerDim,
  elbo_fields,
  log_snr_bins,
  make_evaluator,
  sentence,
  summarize,
)
from vdm.sampling.draw import make_sampler
from vdm.sampling.picture import image_grid
from vdm.system import parallel, stopping

SHAPE, VALUES = (2, 3, 1), 256
# To sigma_0 = 1.1 cells of the grid: with less noise a denoiser that does not know that the data is
# discrete is no longer exact; with more, the decoder's flat prior is not (0.002 bits/dim here).
LOG_SNR_MIN, LOG_SNR_MAX = -12.0, 9.5


@pytest.mark.parametrize(
  ('split', 'total', 'which'),
  [
    ('test', 360, '360 test images'),
    ('train[90%:]', 360, '360 images of train[90%:]'),
    ('test', 10_000, 'the first 360 of 10,000 test images'),
  ],
)
def test_the_sentence_of_a_bound(split, total, which):
  """The last parameters, which rank checkpoints, come first."""
  of = lambda value: (value, 0.0083, 31, None, {}, 360, (1.0, None), None, (1.0, 1.0))
  made = lambda value: BitsPerDim(*of(value))
  bounds = {'raw': made(2.30123), 'ema': made(2.26789)}
  text = sentence(bounds, {'split': split, 'num_images': total})
  assert text == f'2.268 +- 0.008 bits/dim on {which} (ema), 2.301 +- 0.008 (raw)'


def gaussian_data(seed=0):
  """Mean and covariance of correlated Gaussian images well inside [-1, 1]."""
  rng = np.random.default_rng(seed)
  dims = int(np.prod(SHAPE))
  factor = rng.normal(size=(dims, dims)) / np.sqrt(dims)
  return rng.uniform(-0.2, 0.2, dims), 0.02 * (factor @ factor.T + 0.5 * np.eye(dims))


def exact_model(mean, covariance, schedule='linear'):
  """A model whose denoiser is E[x | z] = mu + a C (a^2 C + s^2 I)^-1 (z - a mu)."""
  values, vectors = (jnp.asarray(a, jnp.float32) for a in np.linalg.eigh(covariance))
  mean = jnp.asarray(mean, jnp.float32)

  def denoise(z, log_snr):
    a, s = alpha(log_snr)[:, None], sigma(log_snr)[:, None]
    residual = (z.reshape(len(z), -1) - a * mean[None]) @ vectors
    # eps_hat from the residual itself: z - a x_hat would cancel where there is little noise
    shrink = 1 / (a**2 * values[None] + s**2)
    x = mean[None] + (a * values[None] * shrink * residual) @ vectors.T
    eps = (s * shrink * residual) @ vectors.T
    return Prediction(x.reshape(z.shape), eps.reshape(z.shape))

  fixed = SCHEDULES[schedule](log_snr_min=LOG_SNR_MIN, log_snr_max=LOG_SNR_MAX)
  return build.Model(
    init=None,
    schedule=lambda *_: fixed,
    denoiser=lambda params, conditions=None, **_: denoise,
    weighting=WEIGHTINGS['elbo'](),
    image_shape=SHAPE,
    decoder=discrete(VALUES),
  )


def quantised(mean, covariance, count, seed=1):
  """Draws, rounded to the grid, and their exact bits/dim: the density times the cell.

  The cell is 1/128 against a standard deviation of 0.1 and more in every direction: the midpoint
  rule is off by less than 1e-3 bits/dim.
  """
  rng = np.random.default_rng(seed)
  x = rng.multivariate_normal(mean, covariance, count)
  u = np.clip(np.round(((x + 1) * VALUES - 1) / 2), 0, VALUES - 1)
  offset = (2 * u + 1) / VALUES - 1 - mean
  dims = len(mean)
  nats = 0.5 * np.einsum('ni,ij,nj->n', offset, np.linalg.inv(covariance), offset)
  nats += 0.5 * np.linalg.slogdet(covariance)[1] + dims / 2 * np.log(2 * np.pi)
  bits = (nats - dims * np.log(2 / VALUES)) / (dims * np.log(2))
  return u.astype(np.uint8).reshape(count, *SHAPE), bits.mean()


def source_of(images):
  def fetch(indices):
    return {'image': images[indices], 'label': np.zeros(len(indices), np.int32)}

  return data.Source(fetch, {'num_images': len(images)})


def config_of(**settings):
  config = default.get_config()
  with config.unlocked():
    config.eval.update(batch_size=256, draws=8)
    config.eval.update(settings)
  return config


def score(model, config, images, evaluator=None):
  evaluator = evaluator or make_evaluator(model, parallel.make_mesh(), config.eval)
  batches = data.eval_batches(
    source_of(images),
    batch_size=config.eval.batch_size,
    max_images=config.eval.max_images,
    process_index=0,
    process_count=1,
  )
  return evaluator({}, batches, data.num_eval_images(source_of(images), config.eval.max_images))


def test_bound_of_the_exact_denoiser_is_the_exact_likelihood():
  mean, covariance = gaussian_data()
  images, exact = quantised(mean, covariance, 3000)
  result = score(exact_model(mean, covariance), config_of(draws=64), images)
  assert result.num_images == 3000
  assert result.stderr < 0.03
  assert abs(result.value - exact) < 3 * result.stderr, (result.value, exact)


def test_training_loss_is_the_weighted_integral():
  """1/2 int w(log_snr) sum_i a^2 c_i / (a^2 c_i + s^2) dlog_snr, for the exact denoiser."""
  mean, covariance = gaussian_data()
  images, _ = quantised(mean, covariance, 2000)
  weighting = WEIGHTINGS['sigmoid'](bias=2.0)
  model = exact_model(mean, covariance)._replace(weighting=weighting)
  result = score(model, config_of(draws=32), images)
  log_snr = np.linspace(LOG_SNR_MIN, LOG_SNR_MAX, 4001)
  c = np.linalg.eigvalsh(covariance)[:, None]
  error = (c / (c + np.exp(-log_snr))).sum(axis=0)
  integral = np.trapezoid(error / 2 / (1 + np.exp(log_snr - 2)), log_snr) / len(c)
  ends = sum(result.terms[term]['value'] for term in ('recon', 'prior')) * np.log(2)
  assert result.loss[1] < 0.01 * integral
  assert abs(result.loss[0] - ends - integral) < 4 * result.loss[1]


def test_bound_of_a_wrong_denoiser_is_worse():
  mean, covariance = gaussian_data()
  images, exact = quantised(mean, covariance, 1000)
  result = score(exact_model(mean, 4 * covariance), config_of(), images)
  assert result.value > exact + 5 * result.stderr + 0.02


def test_discrete_bound_is_above_the_continuous_one_and_tends_to_it():
  mean, covariance = gaussian_data()
  images, _ = quantised(mean, covariance, 1000)
  model = exact_model(mean, covariance)
  value = lambda steps: score(model, config_of(num_timesteps=steps), images)
  few, many, continuous = value(10), value(1000), value(0)
  assert few.value > continuous.value + 5 * continuous.stderr
  assert abs(many.value - continuous.value) < 4 * continuous.stderr + 0.05


@pytest.mark.slow
def test_standard_error_is_that_of_repeated_evaluations():
  mean, covariance = gaussian_data()
  images, _ = quantised(mean, covariance, 600)
  model = exact_model(mean, covariance)
  config = config_of(draws=4, batch_size=128)
  evaluator = make_evaluator(model, parallel.make_mesh(), config.eval)
  for count in (16, 100, 600):
    config.eval.max_images, runs = count, []
    for config.eval.seed in range(100):
      runs.append(score(model, config, images, evaluator))
    spread = np.std([run.value for run in runs], ddof=1)
    stated = np.sqrt(np.mean([run.stderr**2 for run in runs]))
    assert 0.8 < stated / spread < 1.25, (count, stated, spread)


@pytest.mark.parametrize('count', [1, 16, 100, 600])
def test_an_evaluation_does_not_depend_on_its_batches_and_devices(count):
  """Value, errors, bins: whole batches, partial ones, batches larger than all images."""
  mean, covariance = gaussian_data()
  images, _ = quantised(mean, covariance, 700)
  model = exact_model(mean, covariance)
  results = []
  for size, devices in ((8, 8), (64, 8), (1000, 8), (1000, 1), (25, 1)):
    config = config_of(batch_size=size, max_images=count)
    mesh = parallel.make_mesh(devices=jax.devices()[:devices])
    results.append(score(model, config, images, make_evaluator(model, mesh, config.eval)))
  for other in results[1:]:
    for a, b in zip(
      *map(jax.tree.leaves, (results[0]._replace(unit=()), other._replace(unit=()))), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('count, groups', [(16, 1), (360, 1), (1000, 3)])
def test_the_interval_covers_with_two_draws(count, groups):
  """Totals of blocks over draws as they are, Gaussian: 95 % of 4,000 intervals hold the mean."""
  rng, draws, sizes = np.random.default_rng(0), 2, [256] * (groups - 1)
  sizes.append(count - sum(sizes))
  block = np.repeat(np.arange(groups), sizes)
  inside = 0
  for _ in range(4000):
    common = rng.normal(size=(groups, draws)) / np.sqrt(sizes)[:, None]  # u is a block's own
    terms = np.zeros((draws, count, 3))
    terms[..., 2] = common[block].T
    part = {'terms': terms, 'loss': terms[..., 2], 'index': np.arange(count)}
    part |= {'mask': np.ones(count), 'moments': np.ones(3), 'ends': np.array([8.0, -5.0])}
    part |= {'bins': {'spent': np.ones(1), 'width': np.ones(1)}}
    result = summarize([part])
    low, high = cards.error_fields(result.value, result.stderr, result.dof)['interval_95']
    inside += low < 0 < high
  assert result.dof == pytest.approx(count**2 / np.square(sizes).sum())
  assert abs(inside / 4000 - 0.95) < 0.015, inside


def test_max_images_evaluates_the_first_ones():
  mean, covariance = gaussian_data()
  images, _ = quantised(mean, covariance, 100)
  model = exact_model(mean, covariance)
  part = score(model, config_of(batch_size=8, max_images=20), images)
  assert part.num_images == 20
  alone = score(model, config_of(batch_size=8), images[:20])
  np.testing.assert_allclose(part.value, alone.value, rtol=1e-6)


def test_a_single_draw_has_no_standard_error():
  mean, covariance = gaussian_data()
  images, _ = quantised(mean, covariance, 16)
  config = config_of(draws=1, batch_size=8)
  result = score(exact_model(mean, covariance), config, images)
  assert result.stderr is None and result.loss[1] is None and np.isfinite(result.stderr_images)
  fields = elbo_fields(config.eval, result)
  assert fields['stderr'] is None and fields['interval_95'] is None and fields['stderr_dof'] == 0
  json.dumps(fields, allow_nan=False)


def test_a_single_image_says_nothing_of_its_population():
  mean, covariance = gaussian_data()
  images, _ = quantised(mean, covariance, 1)
  result = score(exact_model(mean, covariance), config_of(draws=2, batch_size=8), images)
  assert result.stderr_images is None and np.isfinite(result.stderr)


def test_bins_hold_the_bits_per_unit_of_log_snr():
  log_snr = jnp.array([-5.0, -4.9, 0.01, 4.99, 5.0])
  nats = jnp.arange(1.0, 6.0) * 3 * np.log(2)
  term = DiffusionTerm(nats, nats, log_snr, jnp.full(5, -2.0))
  mask = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])
  bins = log_snr_bins(term, jnp.array([5.0, -5.0]), bits_per_dim(term.elbo, 3), mask)
  middle = NUM_BINS // 2
  np.testing.assert_allclose(bins['spent'][jnp.array([0, middle, -1])], [3, 3, 4], rtol=1e-6)
  np.testing.assert_allclose(bins['width'][jnp.array([0, middle, -1])], [4, 2, 2])
  assert bins['width'].sum() == 8


@pytest.mark.parametrize('name', ['linear', 'cosine', 'ddpm', 'softplus'])
def test_bins_add_up_to_the_diffusion_term_of_any_schedule(name):
  """Data N(0, 0.01) have an exact denoiser, and a term that is an integral in closed form."""
  ends, variance, times = (13.3, -10.0), 0.01, (jnp.arange(100_000) + 0.5) / 100_000
  log_snr, slope = log_snr_and_slope(
    SCHEDULES[name](log_snr_min=ends[1], log_snr_max=ends[0]), times
  )
  elbo = -slope * 0.5 * variance / (variance + jnp.exp(-log_snr))
  bins = log_snr_bins(DiffusionTerm(elbo, elbo, log_snr, slope), ends, elbo, jnp.ones(len(times)))
  spent = (bins['spent'] / bins['width']).sum() * (ends[0] - ends[1]) / NUM_BINS
  exact = 0.5 * (np.log1p(variance * np.exp(ends[0])) - np.log1p(variance * np.exp(ends[1])))
  np.testing.assert_allclose(spent, exact, rtol=2e-4)


def test_bits_per_unit_of_log_snr_and_their_spread_do_not_depend_on_the_schedule():
  """Bins, and the coefficient of variation under a uniform log_snr, are properties of the model."""
  mean, covariance = gaussian_data()
  images, _ = quantised(mean, covariance, 1000)
  config = config_of(draws=16)
  linear, cosine = (
    score(exact_model(mean, covariance, name), config, images) for name in ('linear', 'cosine')
  )
  width = (LOG_SNR_MAX - LOG_SNR_MIN) / NUM_BINS
  spent = linear.bins.sum() * width
  assert abs(spent - linear.terms['diffusion']['value']) < 4 * linear.stderr
  seen = np.isfinite(cosine.bins)
  np.testing.assert_allclose(cosine.bins[seen], linear.bins[seen], rtol=0.2, atol=0.01)
  np.testing.assert_allclose(linear.cv[0], linear.cv[1], rtol=1e-5)
  np.testing.assert_allclose(cosine.cv[1], linear.cv[1], rtol=0.1)
  assert cosine.cv[0] > 1.2 * linear.cv[0] or cosine.cv[0] < linear.cv[0] / 1.2


def test_samples_of_the_exact_denoiser_have_the_mean_and_covariance_of_the_data():
  """Through the sampler a config builds: keys by image number, grid, decoder."""
  mean, covariance = gaussian_data()
  config = default.get_config()
  config.sample.update(num_images=9000, batch_size=4096, num_steps=250)
  sampler = make_sampler(config, exact_model(mean, covariance, 'cosine'), parallel.make_mesh())
  u = np.concatenate(list(sampler({}))).reshape(9000, -1)
  x = (2 * u + 1) / VALUES - 1
  np.testing.assert_allclose(x.mean(axis=0), mean, atol=5 * np.sqrt(covariance.max() / 9000))
  error = 5 * covariance.max() * np.sqrt(2 / 9000)
  np.testing.assert_allclose(np.cov(x.T), covariance, atol=error + 0.01 * covariance.max())


def test_images_do_not_depend_on_the_batch_they_are_drawn_in():
  mean, covariance = gaussian_data()
  model = exact_model(mean, covariance)
  config = default.get_config()
  config.sample.update(num_images=20, batch_size=8, num_steps=10)
  small = np.concatenate(list(make_sampler(config, model, parallel.make_mesh())({})))
  config.sample.batch_size = 24
  large = np.concatenate(list(make_sampler(config, model, parallel.make_mesh())({})))
  assert small.shape == (20, *SHAPE)
  np.testing.assert_array_equal(small, large)


def test_grid_shows_every_image_once():
  images = np.arange(5 * 2 * 3 * 1).reshape(5, 2, 3, 1) % 17
  picture = image_grid(discrete(17).to_pixels(images), least_width=1)
  assert picture.shape == (2 * 6, 3 * 7, 1) and picture.dtype == np.uint8
  np.testing.assert_array_equal(picture[2:4, 9:12, 0], np.round(images[1, ..., 0] * 255 / 16))


@pytest.mark.parametrize('shape, num_values', [((28, 20, 1), 17), ((9, 7, 4), 32)])
def test_a_uniform_predictor_costs_log2_of_the_number_of_values(
  shape, num_values, rank_promotion_allowed
):
  """At a log-SNR of -60 and below nothing of the data is left, and the new network says eps = z.

  So all bits are the decoder's, which is uniform: whatever the shape, and for the real network.
  """
  config = default.get_config('debug')
  with config.unlocked():
    config.data.update(image_shape=shape, num_values=num_values, num_classes=0)
    config.schedule = dict(name='linear', log_snr_min=-70.0, log_snr_max=-60.0)
    config.eval.update(batch_size=8, draws=2)
  model = build.model(config)
  params = parallel.initial_state(parallel.make_mesh(), build.init_state(config, model)).params
  images = np.random.default_rng(0).integers(0, num_values, (11, *shape)).astype(np.uint8)
  batches = data.eval_batches(source_of(images), batch_size=8, process_index=0, process_count=1)
  result = make_evaluator(model, parallel.make_mesh(), config.eval)(params, batches, 11)
  assert result.num_images == 11
  # XLA:CPU computes log(32) to 2e-6 of itself
  np.testing.assert_allclose(result.value, np.log2(num_values), rtol=3e-6)
  terms = {name: term['value'] for name, term in result.terms.items()}
  assert terms['prior'] < 1e-6 and terms['diffusion'] < 1e-6


def test_training_goes_on_after_a_plot_that_fails_but_not_after_a_signal(caplog):
  state, found = types.SimpleNamespace(step=np.int32(7)), evaluate.Result(scalars={'a': 1.0})

  def failing(state, found):
    raise TypeError('no number')

  def stopped(state, found):
    raise stopping.Stopped(75)

  logging.set_verbosity('info')
  with caplog.at_level('ERROR', logger='absl'):
    assert evaluate.going_on(failing)(state, found) is found
  assert 'step 7: the plots could not be drawn; the run goes on' in caplog.text
  assert 'TypeError: no number' in caplog.text
  more = evaluate.going_on(lambda state, found: found.plus(scalars={'b': 2.0}))
  assert more(state, found).scalars == {'a': 1.0, 'b': 2.0}
  with pytest.raises(stopping.Stopped):
    evaluate.going_on(stopped)(state, found)

  def diverged(state, found):
    raise FloatingPointError('a sample is nan')

  with pytest.raises(FloatingPointError):
    evaluate.going_on(diverged)(state, found)
