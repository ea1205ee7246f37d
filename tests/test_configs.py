"""Every file in configs/ is loaded, built and shape-evaluated; its :debug runs a step."""

import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vdm import build, configs, data
from vdm.diffusion.schedules import SCHEDULES, Learned
from vdm.diffusion.weightings import WEIGHTINGS
from vdm.evaluation.bound import make_evaluator
from vdm.sampling.draw import make_sampler
from vdm.system import parallel, runners
from vdm.training.step import make_train_step
from vdm.workdir import config_file

NAMES = sorted(path.stem for path in pathlib.Path(configs.__file__).parent.glob('[a-z]*.py'))
QUICK = ('digits', 'digits_dit', 'digits_pp', 'fashion_mnist_uvit')


def each(names):
  """Returns the names as cases, but for a few of which the tests are slow ones."""
  return [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in names]


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def load(name, arg=''):
  return importlib.import_module(f'vdm.configs.{name}').get_config(arg)


def batch_of(config, size):
  data, rng = config.data, np.random.default_rng(0)
  shape = (size, *data.image_shape)
  image = rng.integers(0, data.num_values, shape, np.uint8) if data.num_values else None
  batch = {
    'image': rng.normal(size=shape).astype(np.float32) if image is None else image,
    'label': np.zeros(size, np.int32),
    'index': np.arange(size, dtype=np.int32),
  }
  if data.condition_shape:
    batch['condition'] = rng.normal(size=(size, *data.condition_shape)).astype(np.float32)
  return batch


@pytest.mark.parametrize('name', each(NAMES))
def test_full_size_builds_and_a_step_has_the_right_shapes(name):
  config = load(name)
  assert config.is_locked and config.name == name
  if 'scan_blocks' in config.model:
    config.model.scan_blocks = 'on'  # traces one block, not up to 131
  model = build.model(config)
  build.check_devices(config, 8)
  state = jax.eval_shape(build.init_state(config, model))
  step = make_train_step(config, model)
  size = config.train.batch_size
  batch = jax.eval_shape(  # its images would take up to 1.6 GB
    lambda: {
      'image': jnp.zeros((size, *config.data.image_shape), model.decoder.dtype),
      'label': jnp.zeros(size, jnp.int32),
      'index': jnp.zeros(size, jnp.int32),
    }
  )
  after, metrics = jax.eval_shape(step, state, batch)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
  assert all(jax.tree.leaves(same))
  assert metrics.scalars[model.decoder.metric].shape == ()


def test_debug_evaluates_less_where_examples_are_large():
  evaluated = {
    name: (load(name, 'debug').eval.max_images, load(name, 'debug').train.eval_every_steps)
    for name in ('cifar10', 'imagenet64', 'fields3d', 'signals1d')
  }
  assert evaluated == dict(cifar10=(16, 2), imagenet64=(8, 4), fields3d=(8, 4), signals1d=(16, 2))


# imagenet256 and 512 shrink to what imagenet128 does, but for their images
@pytest.mark.parametrize('name', each(n for n in NAMES if n not in ('imagenet256', 'imagenet512')))
def test_debug_runs_a_step_an_evaluation_and_the_sampler(name):
  config = load(name, 'debug')
  assert config.name == f'{name}_debug'
  config.sample.num_steps = 2
  model = build.model(config)
  mesh = parallel.make_mesh()
  init = build.init_state(config, model)
  state = parallel.initial_state(mesh, init)
  runner = runners.runner(
    'jit',
    make_train_step(config, model),
    mesh,
    parallel.abstract_state(mesh, init),
  )
  batch = batch_of(config, config.train.batch_size)
  state, metrics = runner.step(state, runner.put_batch(batch))
  assert np.isfinite(metrics.scalars[model.decoder.metric])
  assert np.isfinite(metrics.scalars['grad_norm'])
  result = make_evaluator(model, mesh, config.eval)(
    state.averages['ema'],
    [batch | {'mask': np.ones(len(batch['label']), np.float32)}],
    len(batch['label']),
  )
  assert np.isfinite(result.value)
  images = next(make_sampler(config, model, mesh)(state.averages['ema']))
  assert images.shape == (config.sample.num_images, *config.data.image_shape)
  assert images.dtype == model.decoder.dtype or config.data.num_values
  if config.data.num_values:
    assert images.min() >= 0 and images.max() < config.data.num_values


@pytest.mark.slow
def test_vdm_configs_have_the_published_numbers_of_parameters(monkeypatch):
  """The public code's, less 4 x width for its augmentation flag where a config has none."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1])
  parameters = importlib.import_module('benchmarks.parameters')
  for name, public in parameters.PUBLIC.items():
    config = load(name)
    flag = 0 if config.model.augmentation_flag else 4 * config.model.width
    assert sum(parameters.count(config).values()) == public - flag
  for name, millions in parameters.ROUNDED.items():
    assert round(parameters.count(load(name))['network'] / 1e6) == millions


def test_the_two_imagenets_are_not_mixed_up():
  """Old and new have other pixels: the name, the counts and the labels tell them apart."""
  for name in NAMES:
    data = load(name).data
    if data.name.startswith('downsampled_imagenet/'):
      assert (data.train_images, data.eval_images, data.num_classes) == (1_281_149, 49_999, 0)
      assert data.eval_split == 'validation' and not data.flip
    elif data.name.startswith('imagenet_resized/'):
      assert (data.train_images, data.eval_images, data.num_classes) == (1_281_167, 50_000, 1000)
      assert data.eval_split == 'validation'


@pytest.mark.parametrize('shape', [(256, 256, 1), (100, 75, 2), (64, 64, 64, 1), (1000, 3)])
def test_large_arrays_of_any_size_have_a_network_that_takes_them(shape):
  config = load('my_arrays', 'large').unlock()
  config.data.update(image_shape=shape, as_found=False)
  config.data.update(shift=(0.0,) * shape[-1], scale=(1.0,) * shape[-1])
  model = build.model(config)
  z = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  eps = lambda key, z: model.denoiser(model.init(key))(z, jnp.zeros(2)).eps
  assert jax.eval_shape(eps, jax.random.key(0), z).shape == z.shape


def test_arrays_too_large_to_attend_over_are_refused_with_what_takes_them():
  config = load('my_arrays').unlock()
  config.data.update(image_shape=(256, 256, 1), shift=(0.0,), scale=(1.0,), as_found=False)
  model = build.model(config)
  with pytest.raises(ValueError, match=r'has 65,536 positions, .*--config=configs/my_arrays.py:l'):
    jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize('size', [64, 96])
def test_attention_is_at_levels_that_there_are(size):
  config = load('imagenet64').unlock()
  config.data.image_shape = (size, size, 3)
  model = build.model(config)
  if size == 64:
    jax.eval_shape(model.init, jax.random.key(0))
    return
  with pytest.raises(ValueError, match=r'attention_resolutions=\(32, 16, 8\) .* 96, 48, 24, 12;'):
    jax.eval_shape(model.init, jax.random.key(0))


def own(name, factory, block, monkeypatch, **leaves):
  """The config of digits with a schedule or weighting of one's own."""
  table = {'schedule': SCHEDULES, 'weighting': WEIGHTINGS}[block]
  monkeypatch.setitem(table, name, factory)
  config = load('digits').unlock()
  config[block] = ConfigDict(dict(name=name, **leaves))
  return config


ENDS = dict(log_snr_min=-5.0, log_snr_max=8.0)


@pytest.mark.parametrize(
  ('of', 'time'),
  [
    (lambda low, high, t: low + (high - low) * t, '0.00391'),  # gamma, whose sign is the other
    (lambda low, high, t: jnp.where(t < 0.5, high, low), '0.0312'),  # a step
    (lambda low, high, t: high + (low - high) * (t + 0.5 * jnp.sin(2 * jnp.pi * t)), '0.305'),
    (lambda low, high, t: -2 * jnp.log(jnp.tan(jnp.pi / 2 * t)), '0'),  # the cosine without ends
  ],
)
def test_a_schedule_of_ones_own_must_fall(monkeypatch, of, time):
  """Rising, it would have a negative diffusion term, and a card with a bound that is none."""
  factory = lambda log_snr_min, log_snr_max: lambda t: of(log_snr_min, log_snr_max, t)
  config = own('mine', factory, 'schedule', monkeypatch, **ENDS)
  with pytest.raises(ValueError, match=rf"schedule.name='mine' must be .*not at t = {time}, and"):
    build.model(config)
  config = load('digits').unlock()
  config.eval.schedule.name = 'mine'
  with pytest.raises(
    ValueError, match=rf"config.eval.schedule.name='mine' must .* t = {time}, and"
  ):
    build.model(config)


def test_a_schedule_of_ones_own_with_parameters_must_fall_at_the_start(monkeypatch):
  ends = lambda params: (params['first'], params['last'])
  line = lambda first, last: lambda t: first + (last - first) * t

  def build_of(first, last):
    init = lambda: {'first': jnp.float32(first), 'last': jnp.float32(last)}
    factory = lambda log_snr_min, log_snr_max: Learned(init, lambda params: line(*ends(params)))
    return build.model(own('mine', factory, 'schedule', monkeypatch, **ENDS))

  with pytest.raises(ValueError, match=r"schedule.name='mine' must be .*not at t = 0.00391, and"):
    build_of(-5.0, 8.0)
  model = build_of(8.0, -5.0)
  jax.jit(lambda: build_of(8.0, -5.0).schedule(model.init(jax.random.key(0)))(jnp.ones(1)))()


def test_a_schedule_that_falls_slowly_somewhere_is_none_that_does_not(monkeypatch):
  """Its first levels are equal in float32."""
  factory = lambda log_snr_min, log_snr_max: (
    lambda t: log_snr_max + (log_snr_min - log_snr_max) * t**4
  )
  build.model(own('mine', factory, 'schedule', monkeypatch, **ENDS))


@pytest.mark.parametrize(
  ('of', 'at'),
  [(lambda a: -a, '-0.0273'), (lambda a: jnp.where(a > 7.5, jnp.nan, 1.0), 'nan at 7.5')],
)
def test_a_weighting_of_ones_own_must_be_finite_and_not_negative(monkeypatch, of, at):
  config = own('mine', lambda: of, 'weighting', monkeypatch)
  with pytest.raises(ValueError, match=rf"weighting.name='mine' must be finite, .* it is {at}"):
    build.model(config)


def test_a_model_block_without_a_leaf_is_refused_by_name():
  config = load('digits').unlock()
  del config.model.condition_on
  with pytest.raises(ValueError, match=r'config.model.condition_on=None must be given'):
    build.model(config)


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    (
      'digits',
      {'train.num_timesteps': 10},
      'num_timesteps=10 must be 0 with config.schedule.name=',
    ),
    ('fashion_mnist_haar:details1', {'data.flip': True}, 'config.data.flip=True must be False for'),
    (
      'gaussian_fields',
      {'data.rotate': True, 'data.gaussian_field.subsample': 2},
      'config.data.rotate=True must be False for coefficients',
    ),
  ],
)
def test_what_would_train_on_something_else_is_refused(name, changes, message):
  """Haar's details and every nth pixel do not turn as pictures do; T steps lie where t is even."""
  config = config_file.read_config(name, changes)
  with pytest.raises(ValueError, match=re.escape(message)):
    build.check_config(config)


@pytest.mark.parametrize(
  ('name', 'leaf', 'value'),
  [
    ('digits', 'masked', True),
    ('digits', 'condition_shape', (8, 8, 1)),
    ('gaussian_fields', 'embedding_size', 4),
  ],
)
def test_what_the_data_have_not_is_refused_by_its_leaf(name, leaf, value):
  with pytest.raises(
    ValueError, match=rf'config.data.{leaf}=.* has none; set --config.data.{leaf}='
  ):
    config = config_file.read_config(name, {f'data.{leaf}': value})
    data.load(config_file.settled(config).data, 'train')


def test_a_derived_condition_of_a_gaussian_field_has_no_exact_value():
  own = config_file.read_config('gaussian_fields:debug', {}).data
  assert 'exact_nats_per_dim' in data.load(own, 'eval').identity
  other = own.copy_and_resolve_references().unlock()
  shape = tuple(n // 2 for n in own.image_shape[:-1])
  other.update(derive='low_resolution', condition_shape=(*shape, own.image_shape[-1]))
  assert 'exact_nats_per_dim' not in data.load(other, 'eval').identity
