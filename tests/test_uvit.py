"""U-ViT: patches, its transformer against plain arithmetic, both kinds of skips, both layouts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm.nn import blocks, layers
from vdm.nn.uvit import TransformerBlock, UViT

SMALL = UViT(
  widths=(8, 12),
  num_blocks=2,
  transformer_width=16,
  transformer_depth=2,
  head_width=8,
  patch_size=2,
  conditioning_width=8,
  num_classes=3,
)


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def quick_jit(f):
  """Compilation is the dear part of these tests."""
  return jax.jit(f, compiler_options={'xla_backend_optimization_level': 0})


def shapes_of(network, *shape):
  z, t = jnp.zeros((1, *shape)), jnp.zeros(1)
  return jax.eval_shape(lambda: network.init(jax.random.key(0), z, t, train=False))


def random_parameters(shapes):
  """Parameters with nothing at zero: the layers that start there hide most of a network."""
  generator = np.random.default_rng(0)

  def draw(path, leaf):
    noise = generator.normal(size=leaf.shape).astype(np.float32)
    if leaf.ndim > 1:
      return noise / math.sqrt(math.prod(leaf.shape[:-1]))
    return 0.1 * noise + (path[-1].key == 'scale')

  return jax.tree.map_with_path(draw, shapes)


def count(network, *shape):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(network, *shape)))


def test_patches_round_trip():
  x = np.asarray(normal(0, 2, 6, 4, 3))
  patches = layers.space_to_depth(x, 2)
  assert patches.shape == (2, 3, 2, 12)
  for i, j in np.ndindex(3, 2):
    patch = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
    np.testing.assert_array_equal(patches[:, i, j], patch.reshape(2, 12))
  np.testing.assert_array_equal(layers.depth_to_space(patches, 2), x)
  np.testing.assert_array_equal(layers.space_to_depth(x, 1), x)


def test_transformer_block_against_its_equation(key):
  x, cond = normal(0, 2, 2, 3, 8), normal(1, 2, 5)
  block = TransformerBlock(head_width=4, dropout=0.0, dtype=jnp.float32, train=False)
  shapes = jax.eval_shape(lambda: block.init(key, x, None, cond))
  p = random_parameters(shapes)['params']
  out, y = jax.jit(lambda: block.apply({'params': p}, x, None, cond))()
  assert y is None

  def dense(x, p):
    return np.asarray(x, np.float64) @ p['kernel'] + p['bias']

  def norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    scale, shift = np.split(dense(cond, p['dense']), 2, axis=-1)
    return x * (1 + scale[:, None]) + shift[:, None]

  def rms(x, p):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p['scale']

  def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  h = np.asarray(x, np.float64).reshape(2, 6, 8)
  u = norm(h, p['cond_attention'])
  heads = []
  for columns in (slice(0, 4), slice(4, 8)):
    q, k, v = (dense(u, p[name])[..., columns] for name in ('query', 'key', 'value'))
    logits = rms(q, p['norm_query']) @ rms(k, p['norm_key']).swapaxes(1, 2) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heads.append(weights @ v)
  h = h + dense(np.concatenate(heads, -1), p['out'])
  h = h + dense(gelu(dense(norm(h, p['cond_mlp']), p['hidden'])), p['mlp_out'])
  np.testing.assert_allclose(out.reshape(h.shape), h, atol=1e-5)


def test_output_and_residual_branches_start_at_zero():
  network = SMALL.clone(dtype=jnp.bfloat16)
  z, t = jnp.zeros((1, 8, 8, 2)), jnp.zeros(1)
  init = lambda: network.init(jax.random.key(0), z, t, train=False)['params']
  # Only what is read is compiled.
  params = jax.jit(lambda: {k: init()[k] for k in ('conv_out', 'transformer_0')})()
  block = params['transformer_0']
  for branch in (params['conv_out'], block['out'], block['mlp_out'], block['cond_mlp']['dense']):
    assert not branch['kernel'].any() and not branch['bias'].any()
  assert block['hidden']['kernel'].any()
  out = jax.eval_shape(lambda: network.apply({'params': init()}, z, t, train=False))
  assert out.dtype == jnp.float32


@pytest.mark.parametrize(
  ('skip', 'widths', 'remat'), [('residual', (8, 12), False), ('concatenate', (8,), True)]
)
def test_conditions_and_both_layouts_agree(skip, widths, remat):
  """Noise level and label change the output; examples are independent; gradients are finite."""
  network = SMALL.clone(skip=skip, widths=widths)
  looped = network.clone(scan_blocks=True, remat=remat)
  z, t = jnp.tile(normal(0, 1, 16, 8, 1), (4, 1, 1, 1)), jnp.array([0.2, 0.2, 0.2, 0.8])
  label = jnp.array([0, 1, -1, -1])
  shapes = shapes_of(looped, *z.shape[1:])
  names = blocks.stacked_names(shapes['params'])
  levels = range(len(widths))
  assert names == {f'{side}_{i}_*' for side in ('down', 'up') for i in levels} | {'transformer_*'}
  stacked = random_parameters(shapes)
  parameters = blocks.unstack(stacked)
  expected = shapes_of(network, *z.shape[1:])
  assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(lambda a: a.shape, expected)

  def second(parameters, z):
    out = looped.apply(parameters, z, t, label, train=False)
    return (out[1] ** 2).sum(), out

  gradient = quick_jit(jax.grad(second, (0, 1), has_aux=True))
  (dparameters, dz), out = gradient(stacked, z)
  for i in range(4):
    for j in range(i):
      assert jnp.abs(out[i] - out[j]).max() > 1e-3
  np.testing.assert_array_equal(dz[jnp.array([0, 2, 3])], 0)
  assert jnp.abs(dz[1]).min() > 0
  for leaf in jax.tree.leaves(dparameters):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
  network = network.clone(residual=True)
  unrolled = quick_jit(lambda p: network.apply(p, z, t, label, train=False))(parameters)
  np.testing.assert_allclose(out + z, unrolled, atol=1e-5)


def test_skips_lead_past_the_transformer():
  """With a transformer whose output is lost on the way up, only the skips carry z."""
  z, t = normal(0, 2, 16, 8, 1), jnp.full(2, 0.5)
  parameters = random_parameters(shapes_of(SMALL, *z.shape[1:]))['params']
  for level in (0, 1):
    parameters[f'double_{level}'] = jax.tree.map(np.zeros_like, parameters[f'double_{level}'])
  run = quick_jit(lambda p: SMALL.apply({'params': p}, z, t, train=False))
  one = run(parameters)
  assert jnp.abs(one[0] - one[1]).max() > 0.1
  other = run(
    parameters | {'transformer_0': jax.tree.map(lambda a: -a, parameters['transformer_0'])}
  )
  np.testing.assert_array_equal(one, other)


def test_dropout_is_in_the_transformer_only(monkeypatch):
  z, t = jnp.zeros((1, 16, 8, 1)), jnp.zeros(1)
  rngs = {'dropout': jax.random.key(0)}
  run = lambda p: SMALL.clone(dropout=0.5).apply(p, z, t, train=True, rngs=rngs)
  shapes, draw = [], layers.random_words
  monkeypatch.setattr(layers, 'random_words', lambda key, s: shapes.append(s) or draw(key, s))
  jax.eval_shape(run, shapes_of(SMALL, 16, 8, 1))
  assert shapes == [(1, 2, 1, 4 * SMALL.transformer_width)] * SMALL.transformer_depth


def test_two_billion_parameters_for_512():
  """Nearly all in 36 blocks of width 2048: 12 w^2, 4 w c of the conditioning, and vectors."""
  big = UViT(
    patch_size=4,
    transformer_width=2048,
    transformer_depth=36,
    head_width=128,
    num_classes=1000,
    scan_blocks=True,
  )
  w, c = 2048, 1024
  block = 12 * w**2 + (4 + 4 + 1) * w + 2 * (2 * w * c + 2 * w) + 2 * 128
  shapes = shapes_of(big, 512, 512, 3)['params']
  assert shapes['position'].shape == (1, 16, 16, w)
  transformer = sum(math.prod(a.shape) for a in jax.tree.leaves(shapes['transformer_*']))
  assert transformer == 36 * block == 2_114_896_896
  assert count(big, 512, 512, 3) == 2_152_439_856


@pytest.mark.parametrize(
  ('fields', 'shape', 'message'),
  [
    ({}, (28, 28, 1), r'image_shape=\(28, 28, 1\) .* by 8 .*; try \(32, 32, 1\), or fewer'),
    (
      {'head_width': 7},
      (16, 16, 1),
      r'config\.model\.head_width=7 must be a divisor of the width 16',
    ),
    ({'skip': 'add'}, (16, 16, 1), r"skip='add' must be 'concatenate' or 'residual'; try"),
    ({'patch_size': 0}, (16, 16, 1), r'config\.model\.patch_size=0 must be at least 1; try 1'),
    ({'transformer_depth': 0}, (16, 16, 1), r'config\.model\.transformer_depth=0 must be at least'),
    ({'transformer_width': 0}, (16, 16, 1), r'config\.model\.transformer_width=0 must be at least'),
    ({'widths': ()}, (16, 16, 1), r'config\.model\.widths=\(\) must be positive integers'),
    ({'conditioning_width': 7}, (16, 16, 1), r'config\.model\.conditioning_width=7 must be even'),
    ({}, (16,), r'uvit takes \[B, \*space, C\] with one to three axes'),
  ],
)
def test_errors_name_the_field(fields, shape, message):
  with pytest.raises(ValueError, match=message):
    shapes_of(SMALL.clone(**fields), *shape)
