"""The train step as XLA gets it for a GPU, and needs none: types, layouts, donations."""

import functools
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from vdm.configs import default

from benchmarks import correctness
from benchmarks.train_step import random_batch
from vdm import build, nn
from vdm.nn import attention
from vdm.system import parallel, runners
from vdm.training.step import make_train_step

SHARD_MAP = {'SPMDFullToShardShape', 'SPMDShardToFullShape'}
CONFIGS = {'vdm_unet': 'cifar10', 'adm_unet': 'imagenet64', 'uvit': 'fashion_mnist_uvit'}


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def config_of(network):
  """A small config of a network, as it is on a GPU: bfloat16, and equal blocks in a loop."""
  if network == 'mlp':
    config = correctness.config_of('digits', {'model.name': 'mlp'}, 'bfloat16')
    return config.unlock()
  name = CONFIGS.get(network) or next(
    path.stem
    for path in sorted(pathlib.Path(default.__file__).parent.glob('*.py'))
    if f"name='{network}'" in path.read_text() and path.stem != 'default'
  )
  config = importlib.import_module(f'vdm.configs.{name}').get_config('debug').unlock()
  config.model = build.for_platform(config.model, 'gpu')
  if 'attention_resolutions' in config.model:
    config.model.attention_resolutions = (config.data.image_shape[0] // 2,)
  return config


@functools.cache
def lowered(network):
  """The StableHLO of a network's train step, and the number of arrays in its state."""
  config = config_of(network)
  model, mesh = build.model(config), parallel.make_mesh()
  abstract = parallel.abstract_state(mesh, build.init_state(config, model))
  runner = runners.runner('jit', make_train_step(config, model), mesh, abstract)
  traced = runner.program.trace(abstract, random_batch(config))
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  return text, len(jax.tree.leaves(abstract))


def operations(text, name):
  """(the line, [shape and type] of operands) of every operation of a name."""
  for line in re.findall(rf'stablehlo\.{name}\b.*', text):
    operands = line.rpartition(' : (')[2].partition(') -> ')[0]
    yield line, [t.rpartition('x') for t in re.findall(r'tensor<(.*?)>', operands)]


networks = pytest.mark.parametrize('network', nn.NETWORKS)


@networks
def test_a_step_has_no_float64_and_never_asks_the_host(network):
  text, _ = lowered(network)
  assert 'f64' not in text
  # shardings, and on some versions of JAX a kernel for random bits: none waits for Python
  calls = set(re.findall(r'custom_call @([\w.]+)', text))
  assert calls <= {'Sharding', 'cu_threefry2x32_ffi'} | SHARD_MAP
  assert not re.search(r'stablehlo\.(infeed|outfeed|send|recv)\b', text)


@networks
def test_the_whole_state_is_donated(network):
  text, leaves = lowered(network)
  main = text.partition('func.func public @main')[2].partition('\n')[0]
  assert len(re.findall(r'tf\.aliasing_output|jax\.buffer_donor', main)) == leaves


@networks
def test_convolutions_are_bfloat16_and_channels_last(network):
  found = list(operations(lowered(network)[0], 'convolution'))
  assert found or network in ('mlp', 'dit')
  # the first reads z in float32 (`layers.read`), as are its gradients by its kernel, and perhaps z
  exact = [line for line, operands in found if all(kind == 'f32' for *_, kind in operands)]
  assert len(exact) in ((2, 3) if found else (0,))
  for line, operands in found:
    assert line in exact or [kind for *_, kind in operands] == ['bf16', 'bf16'], line
    layout = re.search(r'dim_numbers = \[(.*?)\]x\[.*?\]->\[(.*?)\]', line)
    # the gradient of a kernel takes the batch for channels, both ends of the same memory
    assert layout[1].replace(', ', '') in ('b01f', 'f01b'), line
    assert layout[2].replace(', ', '') in ('b01f', '01bf'), line


@networks
def test_products_are_bfloat16_but_of_what_is_one_vector_per_image_and_of_z(network):
  found = list(operations(lowered(network)[0], 'dot_general'))
  of_space = lambda operands: any(shape.count('x') > 1 for shape, *_ in operands)
  exact = [line for line, o in found if of_space(o) and all(kind == 'f32' for *_, kind in o)]
  # the layer that reads z, and its gradients by its kernel and perhaps by z
  assert len(exact) in ((2, 3) if network == 'dit' else (0,))
  for line, operands in found:
    by_hand = 'lhs_precision_type = bf16, rhs_precision_type = bf16' in line
    low = all(kind == 'bf16' for *_, kind in operands)
    assert low or by_hand or line in exact or not of_space(operands), line


WITH_ATTENTION = (
  'cifar10',
  'imagenet64',
  'imagenet128',
  'imagenet256_jit',
  'fashion_mnist_full',
  'fashion_mnist_uvit',
)


@pytest.mark.parametrize('name', WITH_ATTENTION)
def test_attention_is_what_cudnn_takes(name, monkeypatch):
  """bfloat16, and heads of a multiple of 8 channels, 128 at most before Hopper."""
  config = importlib.import_module(f'vdm.configs.{name}').get_config()
  with config.unlocked():
    config.model = build.for_platform(config.model, 'gpu')
  found = []

  def note(q, k, v):
    found.extend([q, k, v])
    return v

  monkeypatch.setattr(attention, '_attention', note)
  model = build.model(config)
  z = jax.ShapeDtypeStruct((2, *model.image_shape), jnp.float32)

  def forward(key, z):
    return model.denoiser(model.init(key), {})(z, jnp.zeros(2)).eps

  jax.eval_shape(forward, jax.random.key(0), z)
  assert found
  for a in found:
    assert a.dtype == jnp.bfloat16 and a.shape[-1] % 8 == 0 and a.shape[-1] <= 128
