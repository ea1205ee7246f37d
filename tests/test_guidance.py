"""Guidance, dropped labels and thresholding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vdm.configs import cifar10, default, digits

from vdm import build
from vdm.diffusion import guidance
from vdm.diffusion.decoders import discrete
from vdm.diffusion.gaussian import Prediction, alpha, expand_to, fold_in, q_sample, sigma
from vdm.diffusion.samplers import heun, time_grid
from vdm.diffusion.samplers import sample as draw
from vdm.diffusion.schedules import SCHEDULES
from vdm.sampling.draw import make_guidance, make_sampler
from vdm.system import parallel
from vdm.training.step import loss, recipe
from vdm.workdir import checkpoint, config_file, load

EVERYWHERE = (-100.0, 100.0)


def gaussian(variance):
  """The exact denoiser of x ~ N(0, variance)."""

  def denoise(z, log_snr):
    a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
    scaled = z / (a**2 * variance + s**2)
    return Prediction(a * variance * scaled, s * scaled)

  return denoise


def reconstructed(prediction, log_snr):
  return q_sample(prediction.x, prediction.eps, log_snr)


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('weight', [0.0, 1.0, 2.5])
def test_guided_score_is_the_weighted_sum_of_scores(weight):
  """-eps / sigma is the score; that of N(0, v) at z is -z / (alpha^2 v + sigma^2)."""
  own, other = gaussian(0.5), gaussian(2.0)
  guided = guidance.guide(own, guidance.pair(own, other), weight, *EVERYWHERE)
  z, log_snr = normal(5, 3), jnp.linspace(-4, 4, 5)
  prediction = guided(z, log_snr)
  a2, s2 = (np.float64(f(log_snr) ** 2)[:, None] for f in (alpha, sigma))
  score = -np.float64(z) * (weight / (a2 * 0.5 + s2) + (1 - weight) / (a2 * 2.0 + s2))
  np.testing.assert_allclose(-prediction.eps / np.sqrt(s2), score, rtol=1e-4)
  np.testing.assert_allclose(reconstructed(prediction, log_snr), z, atol=1e-5)


def test_guided_flow_of_two_gaussians_is_the_closed_form(key):
  """dy/dlevel = level y sum_i w_i / (v_i + level^2): y ~ prod_i (v_i + level^2)^(w_i/2)."""
  own, other, weight = 0.3, 1.5, 2.0
  guided = guidance.guide(
    gaussian(own), guidance.pair(gaussian(own), gaussian(other)), weight, *EVERYWHERE
  )
  grid = time_grid(SCHEDULES['linear'](-6.0, 6.0), 100)
  run = jax.jit(lambda grid, keys: draw(keys, heun(), guided, grid, (2,)))
  keys = fold_in(key, jnp.arange(4))
  start, end = run(grid[:1], keys), run(grid, keys)
  first, last = np.exp(-np.float64(grid[np.array([0, -1])]))
  growth = ((own + last) / (own + first)) ** (weight / 2)
  growth *= ((other + last) / (other + first)) ** ((1 - weight) / 2)
  np.testing.assert_allclose(end, start * growth, rtol=3e-3)


def test_outside_the_limits_the_model_is_alone():
  calls = []

  def other(z, log_snr):
    jax.debug.callback(lambda _: calls.append(1), log_snr)
    return gaussian(2.0)(z, log_snr)

  own = gaussian(0.5)
  guided = jax.jit(guidance.guide(own, guidance.pair(own, other), 3.0, -1.0, 1.0))
  z, mixed = normal(5, 3), jnp.array([-1.5, -1.0, 0.0, 1.0, 1.5])
  free = guidance.guide(own, guidance.pair(own, gaussian(2.0)), 3.0, *EVERYWHERE)
  inside = np.array([False, True, True, True, False])[:, None]
  expected = np.where(inside, free(z, mixed).x, own(z, mixed).x)
  np.testing.assert_allclose(guided(z, mixed).x, expected, rtol=1e-5)
  jax.effects_barrier()
  assert len(calls) == 1
  np.testing.assert_allclose(guided(z, jnp.full(5, 1.1)).x, own(z, jnp.full(5, 1.1)).x, rtol=1e-6)
  jax.effects_barrier()
  assert len(calls) == 1  # not even computed


def test_conditions_pair_is_one_call_of_twice_the_batch():
  shapes = []

  def denoiser_of(given):
    def denoise(z, log_snr):
      shapes.append(z.shape)
      x = z * expand_to(given['label'] + 0.5, z) + expand_to(log_snr, z)
      return Prediction(x, 2 * x)

    return denoise

  z, log_snr, label = normal(3, 2, 2, 1), jnp.arange(3.0), jnp.array([4, 0, 7])
  own, null = guidance.conditions_pair(denoiser_of, {'label': label})(z, log_snr)
  assert shapes == [(6, 2, 2, 1)]
  for a, b in zip(own, denoiser_of({'label': label})(z, log_snr), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(null, denoiser_of({'label': jnp.full(3, -1)})(z, log_snr), strict=True):
    np.testing.assert_array_equal(a, b)


def test_labels_are_dropped_one_by_one_at_the_rate(key):
  label = jnp.arange(10_000) % 10
  keys = fold_in(key, jnp.arange(10_000))
  drop = lambda keys, label: np.asarray(guidance.drop(keys, {'label': label}, 0.1)['label'])
  dropped = drop(keys, label)
  lost = dropped == -1
  assert abs(lost.mean() - 0.1) < 5 * 0.003
  np.testing.assert_array_equal(dropped[~lost], label[~lost])
  np.testing.assert_array_equal(drop(keys[7:], label[7:]), dropped[7:])


def test_all_conditions_of_an_example_are_withheld_together_but_never_its_mask(key):
  given = {
    'label': jnp.full(1000, 3),
    'vector': jnp.ones((1000, 3)),
    'condition': jnp.full((1000, 2, 2, 1), 7, jnp.uint8),
    'valid': jnp.ones((1000, 4, 4, 1), bool),
  }
  dropped = jax.device_get(guidance.drop(fold_in(key, jnp.arange(1000)), given, 0.1))
  lost = dropped['label'] == -1
  assert abs(lost.mean() - 0.1) < 5 * 0.01
  for name in ('vector', 'condition'):
    np.testing.assert_array_equal(np.isnan(dropped[name]).reshape(1000, -1).all(axis=1), lost)
    np.testing.assert_array_equal(np.isnan(dropped[name]).reshape(1000, -1).any(axis=1), lost)
    np.testing.assert_array_equal(dropped[name][~lost], given[name][~lost])
  assert dropped['valid'].all()

  def denoiser_of(given):
    total = jnp.nan_to_num(given['vector']).sum(axis=1)
    return lambda z, log_snr: Prediction(z, total[:, None] + z)

  z = jnp.zeros((4, 2))
  own, null = guidance.conditions_pair(denoiser_of, {'vector': jnp.ones((4, 3))})(z, jnp.zeros(4))
  assert (own.eps == 3).all() and (null.eps == 0).all()


@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_training_withholds_labels(rate, key):
  config = default.get_config()
  config.model.class_conditional, config.train.label_dropout = True, rate

  class Seen(Exception):
    """Carries the labels that the network would have been given."""

  def denoiser(params, given, flag, *, train, key_dropout):
    raise Seen(given['label'])

  linear = SCHEDULES['linear'](log_snr_min=-5.0, log_snr_max=5.0)
  model = build.Model(None, lambda *_: linear, denoiser, None, (1, 2, 1), discrete(17))
  index = jnp.arange(128)
  batch = {'image': jnp.zeros((128, 1, 2, 1), jnp.uint8), 'label': index % 10, 'index': index}
  with pytest.raises(Seen) as seen:
    loss(recipe(config, model), {'schedule': {}}, None, {}, batch, key, None)
  label = np.asarray(seen.value.args[0])
  lost = label == -1
  assert abs(lost.mean() - rate) < 0.25 and lost.any() == (rate > 0)
  np.testing.assert_array_equal(label[~lost], batch['label'][~lost])


@pytest.mark.parametrize(
  'threshold', [guidance.static_threshold(), guidance.dynamic_threshold(0.9)], ids=['static', 'dyn']
)
def test_thresholding_keeps_z_and_the_range(threshold):
  z, log_snr = 3 * normal(6, 5, 4), jnp.array([-9.0, -3.0, 0.0, 3.0, 9.0, 13.0])
  plain, changed = gaussian(2.0)(z, log_snr), threshold(gaussian(2.0))(z, log_snr)
  assert np.abs(changed.x).max() <= 1 and np.abs(plain.x).max() > 1
  np.testing.assert_allclose(reconstructed(changed, log_snr), z, rtol=1e-4, atol=1e-5)
  # what is inside stays as it is, to the last bit
  small = threshold(gaussian(2.0))(z / 100, log_snr)
  for a, b in zip(small, gaussian(2.0)(z / 100, log_snr), strict=True):
    np.testing.assert_array_equal(a, b)


def test_thresholds_are_those_of_the_paper():
  x = 2 * normal(4, 10, 10)
  fixed = lambda z, log_snr: Prediction(x, z)
  z, log_snr = normal(4, 10, 10, seed=1), jnp.zeros(4)
  np.testing.assert_array_equal(guidance.static_threshold()(fixed)(z, log_snr).x, np.clip(x, -1, 1))
  s = np.percentile(np.abs(x).reshape(4, -1), 90, axis=1)[:, None, None]
  assert s.min() > 1
  dynamic = guidance.dynamic_threshold(0.9)(fixed)(z, log_snr)
  np.testing.assert_allclose(dynamic.x, np.clip(x, -s, s) / s, rtol=1e-5)


def config_of(**guidance_settings):
  config = default.get_config('debug')
  config.sample.num_steps = 2
  config.sample.guidance.update(guidance_settings)
  return config


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('sample.guidance.kind', 'cfg', r"guidance.kind='cfg' must be 'none', "),
    (
      'sample.guidance.kind',
      'classifier_free',
      r'told no condition; train with config.train.label_dropout=0.1 and classes \(config.model.cl',
    ),
    ('sample.guidance.kind', 'auto', r"guidance.checkpoint='' must be the workdir"),
    ('sample.guidance.log_snr_min', 200.0, r'log_snr_min=200.0 must be below'),
    ('sample.threshold.name', 'hard', r"threshold.name='hard' must be one of none, static"),
    ('sample.threshold.percentile', 0.9, r"threshold.name='none' does not take percentile"),
    (
      'train.label_dropout',
      0.1,
      r'label_dropout=0.1 must be in \[0, 1\), and 0 without conditions',
    ),
  ],
)
def test_bad_input_is_refused_when_the_model_is_built(path, value, message):
  config = config_of()
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ValueError, match=r'^config\..*' + message):
    build.model(config)


def test_a_percentile_out_of_range_is_refused():
  config = config_of()
  config.sample.threshold.update(name='dynamic', percentile=0.0)
  with pytest.raises(ValueError, match=r'sample.threshold.percentile=0.0 must be in \(0, 1\]'):
    build.threshold(config.sample.threshold)


def test_a_percentile_of_data_with_masks_is_refused():
  config = config_of()
  config.data.update(derive='inpainting', masked=True, condition_shape=config.data.image_shape)
  build.check_config(config)
  config.sample.threshold.name = 'dynamic'
  with pytest.raises(ValueError, match=r"sample.threshold.name='dynamic' must be 'static' or"):
    build.check_config(config)


@pytest.fixture(scope='module')
def run_and_state(tmp_path_factory):
  """A run of no steps, on disk, and its state."""
  workdir, config = tmp_path_factory.mktemp('guide'), config_of()
  config_file.open_workdir(workdir, config)
  with jax.numpy_rank_promotion('allow'):
    init = build.init_state(config, build.model(config))
    state = parallel.initial_state(parallel.make_mesh(), init)
  with checkpoint.manager(workdir, 1) as manager:
    checkpoint.save(manager, 3, state)
  return workdir, state


def images(config, state):
  sampler = make_sampler(config, build.model(config), parallel.make_mesh())
  return np.concatenate(list(sampler(state.averages['ema'])))


def test_a_model_guided_by_itself_is_itself(run_and_state, rank_promotion_allowed):
  workdir, state = run_and_state
  alone = images(config_of(), state)
  itself = config_of(kind='auto', weight=5.0, checkpoint=str(workdir))
  np.testing.assert_array_equal(images(itself, state), alone)
  other = state.replace(averages=jax.tree.map(lambda a: a + 0.05, state.averages))
  assert (images(itself, other) != images(config_of(), other)).any()


def test_a_guide_has_to_be_a_run_of_the_same_images(run_and_state, tmp_path, monkeypatch):
  workdir, _ = run_and_state

  def guidance_of(config, **change):
    model, mesh = build.model(config)._replace(**change), parallel.make_mesh()
    return make_guidance(config.sample.guidance, config.schedule, model, mesh)

  config = config_of(kind='auto', checkpoint=str(tmp_path))
  with pytest.raises(ValueError, match=r'guidance.checkpoint=.* must be the workdir of a run'):
    guidance_of(config)
  config = config_of(kind='auto', checkpoint=str(workdir))
  with config.unlocked():
    config.data.update(num_values=256)
  with pytest.raises(ValueError, match=r'guidance.checkpoint=.* a model of 256 values'):
    guidance_of(config)
  config = config_of(kind='auto', checkpoint=str(workdir), log_snr_max=-8.0, log_snr_min=-9.0)
  with pytest.raises(ValueError, match=r'guidance.checkpoint=.* overlap nowhere, -5 to -8;'):
    guidance_of(config)
  with pytest.raises(ValueError, match=r"guidance.checkpoint=.* model.name='mlp', not 'vdm_unet'"):
    guidance_of(config, network='mlp')
  config = config_of(kind='auto', checkpoint=str(workdir))
  seven, ten = (build.model(config).takes._replace(num_classes=n) for n in (7, 10))
  real = build.model
  with monkeypatch.context() as patch:
    patch.setattr(build, 'model', lambda config: real(config)._replace(takes=ten))
    with pytest.raises(ValueError, match=r'guidance.checkpoint=.* with num_classes 7, not 10'):
      guidance_of(config, takes=seven)
  with pytest.raises(
    ValueError, match=r'has a path for each channel, not one path for all dimensions;'
  ):
    guidance_of(config, multivariate=True)
  more = build.model(config).takes._replace(vector_size=3)
  with monkeypatch.context() as patch:
    patch.setattr(build, 'model', lambda config: real(config)._replace(takes=more))
    with pytest.raises(ValueError, match=r'learned to do without its vector, which the model is'):
      guidance_of(config, takes=build.model(config).takes._replace(vector_size=0))
  units = build.model(config).decoder._replace(to_model=lambda u: u / 9)
  with pytest.raises(ValueError, match=r'guidance.checkpoint=.* with the same config.data.shift'):
    guidance_of(config, decoder=units)


def test_paths_by_place_and_by_channel_are_told_apart():
  for per, said in (('channel', 'a path for each channel'), ('dimension', 'each dimension')):
    config = cifar10.get_config('debug')
    with config.unlocked():
      config.schedule.update(name='learned_multivariate', per=per)
    assert load._paths_of(build.model(config)).endswith(said)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'guidance.weight': 4.0}, r"guidance\.weight=4\.0 must be 1 with .*kind='none'"),
    ({'label': 3}, r'sample\.label=3 must be -1 for a model that is told no class'),
    ({'embeddings': 'no.npy'}, r"sample\.embeddings='no\.npy' must be '' for a model that"),
  ],
)
def test_what_samples_of_the_model_cannot_follow_is_refused(change, message):
  config = digits.get_config('debug')
  with config.unlocked():
    config.sample.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    build.model(config)


def test_a_remedy_for_guidance_is_one_that_the_model_can_have():
  config = default.get_config('debug')
  config.data.update(embedding_size=3, vector_shift=(0.0,) * 3, vector_scale=(1.0,) * 3)
  config.sample.guidance.kind = 'classifier_free'
  told = 'for a model that was told its vector of all examples; train with config.train.label_drop'
  with pytest.raises(ValueError, match=told):
    build.model(config)


def test_classifier_free_guidance_from_a_config(rank_promotion_allowed):
  """A network that says x = label for a class and 0 for none: guided, weight x label."""
  config = config_of(kind='classifier_free', weight=0.5)
  config.model.class_conditional, config.train.label_dropout = True, 0.1
  config.sample.update(denoise_last=True, num_images=8)
  build.model(config)

  def denoiser(params, given):
    label = given['label']

    def denoise(z, log_snr):
      level = jnp.where(label == -1, 0.0, 0.1 * label)
      x = jnp.broadcast_to(expand_to(level, z), z.shape)
      return Prediction(x, (z - expand_to(alpha(log_snr), z) * x) / expand_to(sigma(log_snr), z))

    return denoise

  own = SCHEDULES['linear'](-5.0, 8.0)
  model = build.Model(None, lambda params: own, denoiser, None, (1, 2, 1), discrete(256))
  drawn = np.concatenate(list(make_sampler(config, model, parallel.make_mesh())({})))
  expected = np.round(((0.05 * np.arange(8) + 1) * 256 - 1) / 2)
  np.testing.assert_allclose(drawn[:, 0, 0, 0], expected, atol=1)
