"""Every file in configs/ is loaded, built and shape-evaluated; its :debug runs a step."""

import importlib
import pathlib

import jax
import numpy as np
import pytest

from vdm import build, configs, evaluate, parallel, sample, train

NAMES = sorted(path.stem for path in pathlib.Path(configs.__file__).parent.glob('[a-z]*.py'))


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def load(name, arg=''):
  return importlib.import_module(f'vdm.configs.{name}').get_config(arg)


def batch_of(config, size):
  shape = (size, *config.data.image_shape)
  image = np.random.default_rng(0).integers(0, config.data.num_values, shape).astype(np.uint8)
  return {
    'image': image,
    'label': np.zeros(size, np.int32),
    'index': np.arange(size, dtype=np.int32),
  }


@pytest.mark.parametrize('name', NAMES)
def test_full_size_builds_and_a_step_has_the_right_shapes(name):
  config = load(name)
  assert config.is_locked and config.name == name
  model, optimizer = build.model(config), build.optimizer(config)
  build.check_devices(config, 8)
  state = jax.eval_shape(build.init_state(config, model))
  step = train.make_train_step(config, model, optimizer)
  after, metrics = jax.eval_shape(step, state, batch_of(config, config.train.batch_size))
  assert jax.tree.structure(after) == jax.tree.structure(state)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), after, state)
  assert all(jax.tree.leaves(same))
  assert metrics['bits_per_dim'].shape == ()


@pytest.mark.parametrize('name', NAMES)
def test_debug_runs_a_step_an_evaluation_and_the_sampler(name):
  config = load(name, 'debug')
  assert config.name == f'{name}_debug'
  config.sample.num_steps = 1
  model, optimizer = build.model(config), build.optimizer(config)
  mesh = parallel.make_mesh()
  init = build.init_state(config, model)
  state = parallel.initial_state(mesh, init)
  runner = parallel.runner(
    'jit',
    train.make_train_step(config, model, optimizer),
    mesh,
    parallel.abstract_state(mesh, init),
  )
  batch = batch_of(config, config.train.batch_size)
  state, metrics = runner.step(state, runner.put_batch(batch))
  assert np.isfinite(metrics['bits_per_dim']) and np.isfinite(metrics['grad_norm'])
  result = evaluate.make_evaluator(config, model, mesh)(
    state.ema_params, [batch | {'mask': np.ones(len(batch['label']), np.float32)}]
  )
  assert np.isfinite(result.value)
  images = next(sample.make_sampler(config, model, mesh)(state.ema_params))
  assert images.shape == (config.sample.num_images, *config.data.image_shape)
  assert images.min() >= 0 and images.max() < config.data.num_values


def test_cifar10_has_the_published_number_of_parameters():
  """Public code: 30,578,181 with its 2 of the schedule and 512 of its augmentation flag."""
  config = load('cifar10')
  params = jax.eval_shape(build.model(config).init, jax.random.key(0))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == 30_578_181 - 4 * config.model.width
