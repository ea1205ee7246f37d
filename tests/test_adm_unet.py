"""ADM's U-Net: its published size, its resampling, what it reads; and networks from configs."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from vdm.configs import default

from vdm import build
from vdm.nn import NETWORKS, layers
from vdm.nn.adm_unet import ADMUNet, Block
from vdm.nn.conditioning import Conditioning
from vdm.nn.vdm_unet import VDMUNet

SMALL = {
  'width': 16,
  'channel_multipliers': (1, 2),
  'num_blocks': 1,
  'attention_resolutions': (4,),
  'head_width': 8,
}


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def random_parameters(network, *args, **kwargs):
  """Parameters with nothing at zero: the layers that start there hide most of a network."""
  generator = np.random.default_rng(0)

  def draw(path, leaf):
    noise = generator.normal(size=leaf.shape).astype(np.float32)
    if leaf.ndim > 1:
      return noise / math.sqrt(math.prod(leaf.shape[:-1]))
    return 0.1 * noise + (path[-1].key == 'scale')

  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *args, **kwargs))
  return jax.tree.map_with_path(draw, shapes)


def count(network, *shape):
  z, t = jnp.zeros((1, *shape)), jnp.zeros(1)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), z, t, train=False))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def adm_count(width, multipliers, blocks, attended, num_classes, outputs):
  """ADM's parameters, as arXiv 2105.05233 and its successor EDM (2206.00364) describe them."""
  conv = lambda i, o, kernel: kernel**2 * i * o + o
  norm = lambda c: 2 * c

  def block(i, o, attention=False):
    total = norm(i) + conv(i, o, 3) + conv(4 * width, 2 * o, 1) + norm(o) + conv(o, o, 3)
    total += conv(i, o, 1) if i != o else 0
    return total + (norm(o) + conv(o, 3 * o, 1) + conv(o, o, 1) if attention else 0)

  total = conv(width, 4 * width, 1) + conv(4 * width, 4 * width, 1) + 4 * width * num_classes
  c = width * multipliers[0]
  total += conv(3, c, 3)
  skips = [c]
  for level, multiplier in enumerate(multipliers):
    if level:
      total += block(c, c)
      skips.append(c)
    for _ in range(blocks):
      total += block(c, width * multiplier, level in attended)
      c = width * multiplier
      skips.append(c)
  total += block(c, c, True) + block(c, c)
  for level, multiplier in reversed(list(enumerate(multipliers))):
    for _ in range(blocks + 1):
      total += block(c + skips.pop(), width * multiplier, level in attended)
      c = width * multiplier
    if level:
      total += block(c, c)
  return total + norm(c) + conv(c, outputs, 3)


def test_imagenet64_has_the_published_number_of_parameters():
  """296 M in ADM's and EDM's tables; ours is EDM's with a row more, the null label's."""
  edm = adm_count(192, (1, 2, 3, 4), 3, (1, 2, 3), 1000, outputs=3)
  adm = adm_count(192, (1, 2, 3, 4), 3, (1, 2, 3), 1000, outputs=6)  # with a variance
  assert round(adm / 1e6) == round(edm / 1e6) == 296
  assert adm - edm == 5_187
  assert count(ADMUNet(num_classes=1000), 64, 64, 3) == edm + 768 == 295_900_035


def test_resampling():
  x = np.asarray(normal(0, 2, 4, 6, 3))
  halved, doubled = layers.halve(x), layers.double(x)
  assert halved.shape == (2, 2, 3, 3) and doubled.shape == (2, 8, 12, 3)
  for i, j in np.ndindex(2, 3):
    np.testing.assert_allclose(
      halved[:, i, j], x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)), atol=1e-6
    )
  for i, j in np.ndindex(8, 12):
    np.testing.assert_array_equal(doubled[:, i, j], x[:, i // 2, j // 2])
  np.testing.assert_allclose(layers.halve(doubled), x, atol=1e-6)


def test_block_against_its_equation(key):
  """A block that halves the image, written out with nothing of ours."""
  x, cond = normal(0, 2, 4, 6, 8), normal(1, 2, 12)
  block = Block(16, 0.0, jnp.float32, False, resample=layers.halve)
  shapes = jax.eval_shape(lambda: block.init(key, x, None, cond))
  p = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), shapes)['params']
  out, skip = jax.jit(lambda: block.apply({'params': p}, x, None, cond))()
  np.testing.assert_array_equal(out, skip)

  def group_norm(x, groups, p):
    parts = np.split(np.asarray(x, np.float64), groups, axis=-1)
    parts = [
      (a - a.mean((1, 2, 3), keepdims=True)) / np.sqrt(a.var((1, 2, 3), keepdims=True) + 1e-6)
      for a in parts
    ]
    return np.concatenate(parts, axis=-1) * p['scale'] + p['bias']

  def swish(x):
    return x / (1 + np.exp(-x))

  def conv(x, p):
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return p['bias'] + sum(
      padded[:, i : i + height, j : j + width] @ p['kernel'][i, j] for i, j in np.ndindex(3, 3)
    )

  def pool(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

  h = conv(pool(swish(group_norm(x, 2, p['norm_0']))), p['conv_0'])
  scale, shift = np.split(cond @ p['cond']['dense']['kernel'] + p['cond']['dense']['bias'], 2, 1)
  h = group_norm(h, 4, p['norm_1']) * (1 + scale[:, None, None]) + shift[:, None, None]
  h = conv(swish(h), p['conv_1'])
  shortcut = pool(x) @ p['shortcut']['kernel'] + p['shortcut']['bias']
  np.testing.assert_allclose(out, h + shortcut, rtol=0, atol=1e-5 * np.abs(h).max())


def quick_jit(f):
  """Compilation is the dear part of these tests."""
  return jax.jit(f, compiler_options={'xla_backend_optimization_level': 0})


def test_output_and_residual_branches_start_at_zero():
  network = ADMUNet(**SMALL, dtype=jnp.bfloat16)
  z, t = jnp.zeros((1, 4, 4, 2)), jnp.zeros(1)
  init = lambda: network.init(jax.random.key(0), z, t, train=False)['params']
  # Only what is read is compiled.
  params = jax.jit(lambda: {k: init()[k] for k in ('conv_out', 'mid_0')})()
  block = params['mid_0']
  for branch in (params['conv_out'], block['conv_1'], block['attention']['out']):
    assert not branch['kernel'].any() and not branch['bias'].any()
  assert block['conv_0']['kernel'].any()
  out = jax.eval_shape(lambda: network.apply({'params': init()}, z, t, train=False))
  assert out.dtype == jnp.float32


@pytest.mark.slow
def test_conditions_and_gradients(key):
  """Noise level and label change the output, examples are independent; slopes are right."""
  network = ADMUNet(**SMALL, num_classes=3, residual=True, remat=True)
  z, t = jnp.tile(normal(0, 1, 8, 4, 1), (4, 1, 1, 1)), jnp.array([0.2, 0.2, 0.2, 0.8])
  label = jnp.array([0, 1, -1, -1])
  parameters = random_parameters(network, z, t, train=False)

  def second(parameters, z):
    rngs = {'dropout': key}
    out = network.apply(parameters, z, t, label, train=True, rngs=rngs)
    return (out[1] ** 2).sum(), out

  gradient = quick_jit(jax.value_and_grad(second, (0, 1), has_aux=True))
  (_, out), (dparameters, dz) = gradient(parameters, z)
  for i in range(4):
    for j in range(i):
      assert jnp.abs(out[i] - out[j]).max() > 1e-3
  np.testing.assert_array_equal(dz[jnp.array([0, 2, 3])], 0)
  assert jnp.abs(dz[1]).min() > 0
  for leaf in jax.tree.leaves(dparameters):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0

  def moved(size):
    """The value a step in a fixed direction away."""
    step = lambda a, d: (a + size * d).astype(np.float32)
    return gradient(jax.tree.map(step, parameters, direction), z)[0][0]

  draw = lambda a: np.random.default_rng(a.size).normal(size=a.shape)
  direction = jax.tree.map(draw, parameters)
  slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), dparameters, direction)))
  np.testing.assert_allclose((moved(1e-3) - moved(-1e-3)) / 2e-3, slope, rtol=0.01)

  params = parameters['params']
  zero = {'conv_out': jax.tree.map(jnp.zeros_like, params['conv_out'])}
  (_, out), _ = gradient({'params': params | zero}, z)
  np.testing.assert_array_equal(out, z)


def test_embedding_conditions():
  """A vector per image: NaN, and none at all, are the learned null; zeros are a vector."""
  module = Conditioning(8, embedding_size=5)
  t, vector = jnp.full(3, 0.5), normal(0, 3, 5).at[1].set(jnp.nan)
  parameters = random_parameters(module, t, None, vector)
  apply = jax.jit(module.apply)
  out, absent = apply(parameters, t, None, vector), apply(parameters, t)
  np.testing.assert_array_equal(out[1], absent[1])
  assert jnp.abs(out[0] - out[2]).max() > 0.1 and jnp.abs(out[0] - out[1]).max() > 0.1
  moved = {'params': parameters['params'] | {'null_embedding': jnp.ones((1, 32))}}
  changed = jnp.abs(apply(moved, t, None, vector) - out).max(1) > 0
  np.testing.assert_array_equal(changed, [False, True, False])
  assert jnp.abs(apply(parameters, t, None, jnp.zeros((3, 5))) - absent).max() > 0.1
  with pytest.raises(ValueError, match=r'config\.data\.embedding_size=5 must be that of the'):
    module.init(jax.random.key(0), t, None, vector[:, :4])


@pytest.mark.parametrize(
  ('fields', 'shape', 'message'),
  [
    ({}, (28, 28, 1), r'image_shape=\(28, 28, 1\) .* by 8 .*; try \(32, 32, 1\), or fewer'),
    (
      {'head_width': 40},
      (64, 64, 3),
      r'config\.model\.head_width=40 must be a divisor of the width',
    ),
    ({'channel_multipliers': ()}, (8, 8, 1), r'channel_multipliers=\(\) must be positive'),
    ({'width': 31}, (8, 8, 1), r'config\.model\.width=31 must be even'),
    ({}, (64,), r'adm_unet takes \[B, \*space, C\] with one to three axes'),
  ],
)
def test_errors_name_the_field(fields, shape, message):
  with pytest.raises(ValueError, match=message):
    count(ADMUNet(**fields), *shape)


def config_of(name, **fields):
  """The default config with another network: what a config file writes."""
  config = default.get_config()
  network_fields = inspect.signature(VDMUNet).parameters
  kept = {k: v for k, v in config.model.items() if k not in network_fields or k == 'dtype'}
  with config.unlocked():
    config.model = ConfigDict(kept | {'name': name, 'dropout': 0.1} | fields)
  return config


@pytest.mark.parametrize('name', ['adm_unet', 'uvit', 'dit'])
def test_builds_from_a_config_and_shrinks(name, key):
  config = config_of(name, class_conditional=True)
  with config.unlocked():
    config.data.image_shape = (64, 64, 3)
  full = jax.eval_shape(build.model(config).init, key)
  with config.unlocked():
    default.debug(config)
  small = jax.eval_shape(build.model(config).init, key)
  sizes = [sum(a.size for a in jax.tree.leaves(params)) for params in (full, small)]
  assert sizes[0] > 1e8 and sizes[1] < 1e6
  assert full['network']['conditioning']['label']['embedding'].shape[0] == 11

  def predict(params, z):
    return build.model(config).denoiser(params, {'label': jnp.zeros(2, jnp.int32)}, key)(
      z, jnp.zeros(2)
    )

  z = jnp.zeros((2, 64, 64, 3))
  assert jax.eval_shape(predict, small, z).x.shape == z.shape
  with pytest.raises(ValueError, match=rf"config\.model\.name='{name}' does not take attention"):
    build.model(config_of(name, attention=True))
  assert name in NETWORKS
