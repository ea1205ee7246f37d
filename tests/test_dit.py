"""DiT: its block against plain arithmetic, rotations in one to three axes, published sizes."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vdm.configs import default

from vdm.nn import blocks, layers
from vdm.nn.dit import Block, DiT, rotate, rotations
from vdm.system import parallel

SMALL = DiT(
  width=16,
  num_blocks=2,
  head_width=8,
  patch_size=4,
  bottleneck=6,
  conditioning_width=8,
  num_classes=3,
)


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


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
    if path[-1].key == 'kernel':
      return noise / math.sqrt(math.prod(leaf.shape[-2:-1]))
    return 0.1 * noise + (path[-1].key == 'scale')

  return jax.tree.map_with_path(draw, shapes)


def count(network, *shape):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(network, *shape)))


def test_block_against_its_equation():
  """Pairs are complex numbers, turned by a factor of modulus one; all in float64."""
  x, cond = normal(0, 2, 2, 3, 12), normal(1, 2, 5)
  angles = normal(2, 6, 3)
  turns = jnp.stack([jnp.sin(angles), jnp.cos(angles)])
  block = Block(head_width=6, dropout=0.0, dtype=jnp.float32, train=False)
  shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, None, cond, turns))
  p = random_parameters(shapes)['params']
  out, y = jax.jit(lambda: block.apply({'params': p}, x, None, cond, turns))()
  assert y is None and p['hidden']['kernel'].shape == p['gate']['kernel'].shape == (12, 32)

  def dense(x, p):
    return np.asarray(x, np.float64) @ p['kernel'] + p['bias']

  def rms(x, scale=1.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

  def turned(x, scale):
    x = rms(x, scale)
    return (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles.astype(np.float64))

  parts = dense(cond, p['cond'])[:, None].reshape(2, 1, 6, 12).transpose(2, 0, 1, 3)
  h = np.asarray(x, np.float64).reshape(2, 6, 12)
  u = rms(h) * (1 + parts[0]) + parts[1]
  heads = []
  for columns in (slice(0, 6), slice(6, 12)):
    q, k, v = (dense(u, p[name])[..., columns] for name in ('query', 'key', 'value'))
    q, k = turned(q, p['norm_query']['scale']), turned(k, p['norm_key']['scale'])
    logits = (q @ k.conj().swapaxes(1, 2)).real / np.sqrt(6)
    heads.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) @ v)
  h = h + parts[2] * dense(np.concatenate(heads, -1), p['out'])
  u = rms(h) * (1 + parts[3]) + parts[4]
  gate = dense(u, p['gate'])
  h = h + parts[5] * dense(gate / (1 + np.exp(-gate)) * dense(u, p['hidden']), p['mlp_out'])
  np.testing.assert_allclose(out.reshape(h.shape), h, atol=2e-5)


def logits_of(sizes, kinds, pairs):
  """q . k of one query and one key, at every two positions: [*sizes, *sizes]."""
  turns = jnp.asarray(rotations(sizes, kinds, pairs))
  q, k = (np.tile(normal(seed, 2 * pairs), (1, math.prod(sizes), 1, 1)) for seed in (0, 1))
  q, k = (np.asarray(rotate(x, turns))[0, :, 0] for x in (q, k))
  return (q @ k.T).reshape(*sizes, *sizes)


@pytest.mark.parametrize('pairs', [3, 4, 8])
@pytest.mark.parametrize(
  'kinds', [kinds for n in (1, 2, 3) for kinds in itertools.product(('zero', 'periodic'), repeat=n)]
)
def test_rotations_tell_where_positions_are_to_each_other(kinds, pairs):
  """And nothing else: a shift of both changes nothing, round a periodic axis or along another."""
  sizes = (5, 4, 3)[: len(kinds)]
  logits = logits_of(sizes, kinds, pairs)
  for axis, (n, kind) in enumerate(zip(sizes, kinds, strict=True)):
    both = np.roll(logits, 1, (axis, axis + len(sizes)))
    if kind == 'zero':  # what came from the other end is another distance
      inside = functools.partial(np.take, indices=range(1, n))
      logits_in, both_in = (
        inside(inside(a, axis=axis), axis=axis + len(sizes)) for a in (logits, both)
      )
      np.testing.assert_allclose(both_in, logits_in, atol=1e-4)
    else:
      np.testing.assert_allclose(both, logits, atol=1e-4)
    # of the first position to each along this axis: all distances differ
    row = logits[(0,) * len(sizes)]
    row = row[tuple(slice(None) if i == axis else 0 for i in range(len(sizes)))]
    assert np.abs(row[:, None] - row)[~np.eye(n, dtype=bool)].min() > 1e-3


def test_rotations_are_those_of_the_paper_where_an_axis_has_ends():
  angles = np.arange(7)[:, None] * 10_000.0 ** -np.array([0, 1 / 3, 2 / 3])
  still = np.zeros((7, 2, 1))
  sin, cos = rotations((7,), ('zero',), 3)
  np.testing.assert_allclose(sin + 0 * cos, np.sin(angles), atol=1e-6)
  np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
  grid = rotations((7, 2), ('zero', 'periodic'), 7).reshape(2, 7, 2, 7)
  np.testing.assert_array_equal(grid[0, ..., :3], np.repeat(sin[:, None], 2, axis=1))
  np.testing.assert_allclose(grid[1, ..., 3:6], np.tile([[[1.0], [-1.0]]], (7, 1, 3)), atol=1e-6)
  np.testing.assert_array_equal(grid[0, ..., 6:], still)


def test_turns_round_a_periodic_axis_are_whole():
  """From one to half as many as positions; exact to float32 at the other end, too."""
  n, turns = 4096, np.round(2048 ** (np.arange(8) / 7))
  assert turns.tolist() == [1, 3, 9, 26, 78, 232, 689, 2048]
  cycles = np.outer(np.arange(n), turns) / n
  angles = 2 * np.pi * (cycles - np.round(cycles))
  found = rotations((n,), ('periodic',), 8)
  np.testing.assert_allclose(found, [np.sin(angles), np.cos(angles)], atol=1e-7)


def test_blocks_start_as_the_identity_and_the_output_at_zero():
  z, t = normal(0, 2, 8, 8, 2), np.float32([0.1, 0.9])
  network = SMALL.clone(dtype=jnp.bfloat16)
  run = lambda: network.init_with_output(jax.random.key(0), z, t, train=False)
  out, variables = quick_jit(run)()
  assert out.dtype == jnp.float32 and out.shape == z.shape and not np.any(out)
  p = variables['params']
  for zero in (p['block_0']['cond'], p['block_1']['cond'], p['cond_out']['dense'], p['dense_out']):
    assert not zero['kernel'].any() and not zero['bias'].any()
  assert p['block_0']['out']['kernel'].any() and p['block_0']['mlp_out']['kernel'].any()
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


def test_bfloat16_is_close():
  z, t = normal(0, 2, 8, 8, 2), np.float32([0.1, 0.9])
  parameters = random_parameters(shapes_of(SMALL, 8, 8, 2))
  low, high = (
    quick_jit(lambda p, d=d: SMALL.clone(dtype=d).apply(p, z, t, train=False))(parameters)
    for d in (jnp.bfloat16, jnp.float32)
  )
  assert 1e-5 < np.linalg.norm(low - high) / np.linalg.norm(high) < 0.05


@pytest.mark.parametrize('remat', [False, True])
def test_conditions_and_both_layouts_agree(remat):
  """Noise level and label change the output; examples are independent; gradients are finite."""
  network, looped = SMALL, SMALL.clone(scan_blocks=True, remat=remat)
  z, t = np.tile(normal(0, 1, 16, 8, 1), (4, 1, 1, 1)), jnp.array([0.2, 0.2, 0.2, 0.8])
  label = jnp.array([0, 1, -1, -1])
  shapes = shapes_of(looped, *z.shape[1:])
  assert blocks.stacked_names(shapes['params']) == {'block_*'}
  stacked = random_parameters(shapes)
  parameters = blocks.unstack(stacked)
  expected = shapes_of(network, *z.shape[1:])
  assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(lambda a: a.shape, expected)

  def second(network, parameters, z):
    out = network.apply(parameters, z, t, label, train=False)
    return (out[1] ** 2).sum(), out

  gradient = lambda n: quick_jit(jax.grad(functools.partial(second, n), (0, 1), has_aux=True))
  (dparameters, dz), out = gradient(looped)(stacked, z)
  for i, j in itertools.combinations(range(4), 2):
    assert jnp.abs(out[i] - out[j]).max() > 1e-3
  np.testing.assert_array_equal(dz[jnp.array([0, 2, 3])], 0)
  assert jnp.abs(dz[1]).min() > 0
  for leaf in jax.tree.leaves(dparameters):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
  (dunrolled, _), same = gradient(network.clone(residual=True, remat=remat))(parameters, z)
  np.testing.assert_allclose(out + z, same, atol=1e-5)
  assert jax.tree.structure(dunrolled) == jax.tree.structure(parameters)


def test_eight_devices_say_what_one_does():
  """Forward and backward; and no device is given what another's examples are."""
  z, t = normal(0, 8, 8, 8, 1), np.linspace(0, 1, 8, dtype=np.float32)
  network = SMALL.clone(scan_blocks=True)
  parameters = random_parameters(shapes_of(network, 8, 8, 1))

  def loss(parameters, z, t):
    out = network.apply(parameters, z, t, train=False)
    return (out**2).mean(), out

  gradient = jax.value_and_grad(loss, has_aux=True)
  (_, out), expected = quick_jit(gradient)(parameters, z, t)
  mesh = parallel.make_mesh()
  placed = [jax.device_put(a, parallel.batch_sharding(mesh)) for a in (z, t)]
  (_, found), grads = parallel.jit(gradient, mesh)(parameters, *placed)
  np.testing.assert_allclose(found, out, atol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_a_bottleneck_is_the_rank_of_what_is_read():
  """Two patches that the narrow map does not tell apart are one to the network."""
  z, t = normal(0, 1, 8, 8, 1), np.float32([0.4])
  parameters = random_parameters(shapes_of(SMALL, 8, 8, 1))
  kernel = parameters['params']['bottleneck']['kernel']
  assert kernel.shape == (16, 6)
  unseen = np.linalg.svd(kernel.T)[2][6:].sum(axis=0).reshape(4, 4)
  moved = z + np.tile(unseen, (2, 2))[None, :, :, None]
  run = quick_jit(lambda z: SMALL.apply(parameters, z, t, train=False))
  np.testing.assert_allclose(run(moved), run(z), atol=1e-5)
  assert np.abs(run(moved + unseen.max()) - run(z)).max() > 1e-3
  full = shapes_of(SMALL.clone(bottleneck=0), 8, 8, 1)['params']
  assert 'bottleneck' not in full and full['dense_in']['kernel'].shape == (16, 16)


def test_dropout_is_on_the_hidden_units(monkeypatch):
  z, t = jnp.zeros((1, 16, 8, 1)), jnp.zeros(1)
  rngs = {'dropout': jax.random.key(0)}
  run = lambda p: SMALL.clone(dropout=0.5).apply(p, z, t, train=True, rngs=rngs)
  shapes, draw = [], layers.random_words
  monkeypatch.setattr(layers, 'random_words', lambda key, s: shapes.append(s) or draw(key, s))
  jax.eval_shape(run, shapes_of(SMALL, 16, 8, 1))
  assert shapes == [(1, 4, 2, 8 * SMALL.width // 3)] * SMALL.num_blocks


# width, blocks, bottleneck, width of a head, millions of parameters in the paper's table
JIT = [(768, 12, 128, 64, 131), (1024, 24, 128, 64, 459), (1280, 32, 256, 80, 953)]


@pytest.mark.parametrize(('width', 'num_blocks', 'bottleneck', 'head_width', 'millions'), JIT)
def test_sizes_are_those_that_jit_publishes(width, num_blocks, bottleneck, head_width, millions):
  """JiT-B, L and H on 16 x 16 patches of 256 x 256 images, to the million; and layer by layer."""
  network = DiT(
    width=width,
    num_blocks=num_blocks,
    bottleneck=bottleneck,
    head_width=head_width,
    conditioning_width=width // 4,
    num_classes=1000,
    scan_blocks=True,
  )
  hidden, affine = 8 * width // 3, lambda i, o: i * o + o
  block = affine(width, 6 * width) + 4 * affine(width, width) + 2 * head_width
  block += 2 * affine(width, hidden) + affine(hidden, width)
  total = num_blocks * block + 256 * width  # positions
  total += affine(width // 4, width) + affine(width, width) + 1001 * width  # conditioning
  total += 768 * bottleneck + affine(bottleneck, width)
  total += affine(width, 2 * width) + affine(width, 768)
  assert count(network, 256, 256, 3) == total
  assert round(total / 1e6) == millions


def test_debug_has_a_network_for_a_laptop():
  assert count(DiT(**default.SMALL_NETWORKS['dit']), 32, 32, 3) < 200_000


@pytest.mark.parametrize(
  ('fields', 'shape', 'message'),
  [
    ({}, (30, 28, 1), r'image_shape=\(30, 28, 1\) .* by 4 for this dit; try \(32, 28, 1\), or few'),
    ({'head_width': 7}, (16, 16, 1), r'head_width=7 must be a divisor of the width 16'),
    ({'head_width': 5, 'width': 15}, (8, 8, 1), r'head_width=5 must be even, and at least 4 for'),
    ({'head_width': 4}, (8, 8, 8, 1), r'config\.model\.head_width=4 must be even, and at least 6'),
    ({'patch_size': 0}, (16, 16, 1), r'config\.model\.patch_size=0 must be at least 1; try 1'),
    ({'bottleneck': -1}, (16, 16, 1), r'config\.model\.bottleneck=-1 must be at least 0; try 0'),
    ({'width': 0}, (16, 16, 1), r'config\.model\.width=0 must be at least 1; try 1'),
    ({'num_blocks': 0}, (16, 16, 1), r'config\.model\.num_blocks=0 must be at least 1; try 1'),
    ({'conditioning_width': 7}, (16, 16, 1), r'config\.model\.conditioning_width=7 must be even'),
    ({}, (16,), r'dit takes \[B, \*space, C\] with one to three axes'),
  ],
)
def test_errors_name_the_field(fields, shape, message):
  with pytest.raises(ValueError, match=message):
    shapes_of(SMALL.clone(**fields), *shape)
