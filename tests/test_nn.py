import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice
from vdm.configs import default

from vdm.nn import NETWORKS, attention, convolution, layers
from vdm.nn.conditioning import Conditioning, ScaleShift, sinusoidal_embedding
from vdm.nn.mlp import MLP
from vdm.nn.vdm_unet import VDMUNet
from vdm.system import parallel

SMALL = {'width': 16, 'num_blocks': 1, 'fourier_exponents': (3, 4)}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def random_parameters(module, *args, **kwargs):
  """Parameters with nothing at zero: the layers that start there hide most of a network."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
  generator = np.random.default_rng(0)

  def draw(path, leaf):
    noise = generator.normal(size=leaf.shape).astype(np.float32)
    if leaf.ndim > 1:
      return noise / math.sqrt(math.prod(leaf.shape[:-1]))
    return 0.1 * noise + (path[-1].key == 'scale')

  return jax.tree.map_with_path(draw, shapes)


def apply(network, parameters, *args):
  return jax.jit(lambda parameters: network.apply(parameters, *args, train=False))(parameters)


# The public code's counts, less the parameters of its schedule: 2 end points, or 3074 of a network.
@pytest.mark.parametrize(
  ('width', 'num_blocks', 'attention', 'expected'),
  [
    (128, 32, False, 30_578_181 - 2),
    (256, 32, False, 122_137_605 - 2),
    (256, 32, True, 139_279_877 - 3074),
    (256, 64, False, 237_603_845 - 2),
    (64, 4, False, 1_331_717 - 2),
  ],
)
def test_parameter_counts_are_those_published(width, num_blocks, attention, expected):
  def count(num_blocks):
    network = VDMUNet(width, num_blocks, attention, augmentation_flag=True)
    variables = jax.eval_shape(
      lambda key: network.init(key, jnp.zeros((1, 2, 2, 3)), jnp.zeros(1), train=False),
      jax.random.key(0),
    )
    return sum(math.prod(a.shape) for a in jax.tree.leaves(variables))

  # Each block more, in and out, adds as much as the last: no need to trace 64 of them.
  assert count(1) + (num_blocks - 1) * (count(2) - count(1)) == expected


@pytest.mark.parametrize(
  ('name', 'shape', 'fields'),
  [
    ('vdm_unet', (2, 28, 20, 1), {'fourier_exponents': (), 'augmentation_flag': True}),
    ('vdm_unet', (3, 9, 7, 4), {'num_classes': 5, 'attention': True, 'num_heads': 2}),
    ('vdm_unet', (1, 2, 2, 1), {'residual': False}),
    ('mlp', (4, 3), {'num_classes': 3}),
    ('mlp', (4, 3), {'residual': False}),
  ],
)
def test_starts_as_the_identity_or_as_zero(name, shape, fields):
  z, t = normal(0, *shape), jnp.linspace(0, 1, shape[0])
  label = jnp.arange(shape[0]) if fields.get('num_classes') else None
  network = NETWORKS[name](**SMALL | fields)
  keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  run = lambda: network.init_with_output(keys, z, t, label, train=True)[0]
  # Most of the time would go into optimising the initialisation.
  out = jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})()
  np.testing.assert_array_equal(out, z if network.residual else jnp.zeros_like(z))


@pytest.mark.parametrize('network', [VDMUNet(**SMALL, num_classes=3), MLP(**SMALL, num_classes=3)])
def test_noise_level_and_label_condition(network):
  z = normal(0, 1, 4, 4, 1) if isinstance(network, VDMUNet) else normal(0, 1, 2)
  z, t = jnp.tile(z, (4, *[1] * (z.ndim - 1))), jnp.array([0.2, 0.2, 0.2, 0.8])
  parameters = random_parameters(network, z, t, train=False)
  out = apply(network, parameters, z, t, jnp.array([0, 1, -1, -1]))
  for i in range(4):
    for j in range(i):
      assert jnp.abs(out[i] - out[j]).max() > 1e-3


def test_every_null_label_is_the_same_row():
  t = jnp.full(4, 0.5)
  module = Conditioning(8, num_classes=3)
  parameters = random_parameters(module, t)
  out = module.apply(parameters, t, jnp.array([-1, 3, 2, 0]))
  np.testing.assert_array_equal(out[0], out[1])
  assert jnp.abs(out[0] - out[2]).max() > 0.1
  np.testing.assert_array_equal(module.apply(parameters, t)[0], out[0])
  table = parameters['params']['label']['embedding']
  assert table.shape == (4, 32)
  table[3] = table[2]
  np.testing.assert_array_equal(*module.apply(parameters, t, jnp.array([-1, 2, 2, 2]))[:2])


def test_flag_conditions():
  t = jnp.full(2, 0.5)
  module = Conditioning(8, augmentation_flag=True)
  parameters = random_parameters(module, t)
  out = module.apply(parameters, t, flag=jnp.array([0, 1]))
  assert jnp.abs(out[0] - out[1]).max() > 0.1
  np.testing.assert_array_equal(module.apply(parameters, t)[1], out[0])


@pytest.mark.parametrize('network', [VDMUNet(**SMALL), MLP(**SMALL)])
def test_examples_are_independent(network):
  z = normal(0, 3, 2, 2, 2) if isinstance(network, VDMUNet) else normal(0, 3, 2)
  t = jnp.array([0.1, 0.5, 0.9])
  parameters = random_parameters(network, z, t, train=False)
  second = lambda z, t: network.apply(parameters, z, t, train=False)[1].sum()
  for grad in jax.jit(jax.grad(second, argnums=(0, 1)))(z, t):
    assert jnp.abs(grad[1]).min() > 0
    np.testing.assert_array_equal(grad[0], 0)
    np.testing.assert_array_equal(grad[2], 0)


@pytest.mark.parametrize('network', [VDMUNet(**SMALL), MLP(**SMALL)])
def test_bfloat16_is_close_and_only_inside(network):
  z = normal(0, 2, 4, 4, 3) if isinstance(network, VDMUNet) else normal(0, 2, 3)
  t = jnp.array([0.3, 0.7])
  network = network.clone(residual=False)
  low = network.clone(dtype=jnp.bfloat16)
  parameters = random_parameters(low, z, t, train=False)
  shapes = jax.eval_shape(lambda: low.init(jax.random.key(0), z, t, train=False))
  assert {a.dtype for a in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
  out, expected = apply(low, parameters, z, t), apply(network, parameters, z, t)
  assert out.dtype == expected.dtype == jnp.float32
  error = jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)
  assert 1e-5 < error < 0.05


def test_fourier_features():
  z = normal(0, 2, 3, 3, 2)
  features = np.asarray(layers.fourier_features(z, (6, 7)))
  assert features.shape == (2, 3, 3, 10) and features.dtype == np.float32
  exact = np.asarray(z, np.float64)
  np.testing.assert_array_equal(features[..., :2], z)
  for channel in range(2):
    for i, n in enumerate((6, 7)):
      angle = 2 * np.pi * 2**n * exact[..., channel]
      index = 2 + 2 * channel + i
      np.testing.assert_allclose(features[..., index], np.sin(angle), atol=1e-6)
      np.testing.assert_allclose(features[..., index + 4], np.cos(angle), atol=1e-6)


def test_fourier_features_separate_neighbours_and_show_the_noise():
  grid = (2 * (jnp.arange(256) + 0.5) / 256 - 1)[:, None]
  _, sin_6, sin_7, *_ = layers.fourier_features(grid, (6, 7)).T
  np.testing.assert_allclose(sin_6[1:], -sin_6[:-1], atol=1e-6)
  assert jnp.abs(sin_6).min() > 0.99
  # n = 7 has the same value at every grid point, so it shows the distance from the grid alone.
  np.testing.assert_allclose(sin_7, 0, atol=1e-6)
  noise = 1e-3 * normal(0, 256, 1)
  sin_7 = layers.fourier_features(grid + noise, (7,))[:, 1]
  np.testing.assert_allclose(sin_7, -jnp.sin(2 * jnp.pi * 128 * noise[:, 0]), atol=1e-4)


def test_sinusoidal_embedding():
  t, size = np.linspace(0, 1, 5), 8
  embedding = sinusoidal_embedding(jnp.asarray(t, jnp.float32), size)
  for k in range(4):
    angle = 1000 * t * 10_000 ** (-k / 3)
    np.testing.assert_allclose(embedding[:, k], np.sin(angle), atol=2e-4)
    np.testing.assert_allclose(embedding[:, k + 4], np.cos(angle), atol=2e-4)


@pytest.mark.parametrize(('rate', 'channels'), [(0.1, 64), (0.5, 3), (0.05, 6), (0.999, 4)])
def test_dropout_is_unbiased(rate, channels):
  x = jnp.ones((64, 32, 32, channels))
  drop = lambda seed: layers.Dropout(rate).apply(
    {}, x, train=True, rngs={'dropout': jax.random.key(seed)}
  )
  y = drop(0)
  zero, kept = np.unique(y)
  assert zero == 0
  np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-6)
  deviation = 5 * math.sqrt(rate * (1 - rate) / x.size)
  assert abs(jnp.mean(y == 0) - rate) < deviation
  assert abs(jnp.mean(y) - 1) < deviation / (1 - rate)
  np.testing.assert_array_equal(y, drop(0))
  assert (y != drop(1)).any()


def test_masks_are_as_good_as_random():
  """No mask resembles itself shifted, nor another's: all cyclic correlations are below 1%."""
  rate, shape = 0.1, (16, 32, 32, 64)
  keys = jax.random.split(jax.random.key(0), 6)
  words = jax.vmap(lambda key: layers.random_words(key, shape))(keys).reshape(6, -1)
  masks = (np.asarray(words) < rate * 2**32) - rate
  variance = rate * (1 - rate) * masks.shape[1]
  assert (abs(masks.sum(axis=1)) < 4 * math.sqrt(variance)).all()
  spectra = np.fft.rfft(masks)
  for spectrum, other in zip(spectra, np.roll(spectra, 1, axis=0), strict=True):
    assert abs(np.fft.irfft(spectrum * other.conj())).max() < 0.01 * variance
    assert abs(np.fft.irfft(abs(spectrum) ** 2)[1:]).max() < 0.01 * variance


@pytest.mark.parametrize(
  ('shape', 'axes'),
  [((512, 4096), 1), ((2048, 1024), 1), ((16, 32, 4096), 2), ((16, 32, 32, 128), 2)],
)
def test_no_rows_or_columns_of_a_mask_resemble_each_other(shape, axes):
  """The hash mixes a word of the row with one of the column: all pairs are as of random bits."""
  words = layers.random_words(jax.random.key(1), shape)
  rate, size = 0.1, math.prod(shape)
  dropped = np.asarray(words < rate * 2**32, np.float32).reshape(math.prod(shape[:axes]), -1)
  z = (dropped - rate) / math.sqrt(rate * (1 - rate))
  for rows in (z, z.T):
    products = rows @ rows.T / math.sqrt(rows.shape[1])
    np.fill_diagonal(products, 0)
    # the greatest of N normal numbers is about sqrt(2 log N); products of skew ones go further
    assert abs(products).max() < 1.4 * math.sqrt(2 * math.log(size * len(rows)))
    np.testing.assert_allclose(products.std(), 1, atol=0.02)


@pytest.mark.parametrize(
  'shape', [(), (5,), (2, 3), (7, 1), (2, 3, 5), (1, 1, 1, 1), (2, 3, 4, 5, 6)]
)
def test_masks_of_any_shape(shape):
  words = layers.random_words(jax.random.key(0), shape)
  assert words.shape == shape
  assert len(np.unique(words)) == words.size


def test_dropout_needs_no_key_when_it_does_nothing():
  x = normal(0, 2, 5)
  np.testing.assert_array_equal(layers.Dropout(0.5).apply({}, x, train=False), x)
  np.testing.assert_array_equal(layers.Dropout(0.0).apply({}, x, train=True), x)


def value_and_gradients(f, *args):
  """f's value, and the gradients of all its arguments for a fixed cotangent."""
  out, vjp = jax.vjp(f, *args)
  return out, *vjp(normal(99, *out.shape).astype(out.dtype))


def assert_close(actual, expected, tolerance):
  for a, b in zip(actual, expected, strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
  ('channels', 'num_groups'),
  [(128, 32), (256, 32), (320, 32), (64, 16), (32, 8), (16, 4), (62, 2), (2, 1)],
)
def test_groups_are_large_enough_and_the_public_codes_where_they_can_be(channels, num_groups):
  norm = layers.group_norm(channels, jnp.float32, None)
  assert norm.num_groups == num_groups
  # As the public code's wherever that leaves four channels per group.
  if channels % 128 == 0:
    assert (norm.num_groups, norm.epsilon) == (nn.GroupNorm.num_groups, nn.GroupNorm.epsilon)


@pytest.mark.parametrize('name', ['vdm_unet', 'adm_unet', 'uvit'])
@pytest.mark.parametrize('norm_groups', [0, 8])
def test_every_norm_has_the_groups_of_the_leaf(name, norm_groups):
  network, seen = NETWORKS[name](**default.SMALL_NETWORKS[name], norm_groups=norm_groups), []

  def note(call, args, kwargs, context):
    if isinstance(context.module, layers.GroupNorm) and context.method_name == '__call__':
      channels = args[0].shape[-1]
      seen.append(context.module.num_groups == (norm_groups or layers.auto_groups(channels)))
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(
      lambda: network.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), jnp.zeros(1), train=False)
    )
  assert len(seen) > 5 and all(seen)


@pytest.mark.parametrize('shape', [(3, 5, 4, 24), (2, 7, 16)])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_group_norm_is_that_of_flax(shape, dtype, tolerance):
  """In value, and in the gradients of input and parameters; with means far from zero."""
  x = 2 + 3 * normal(0, *shape) + normal(1, 1, *shape[1:])
  ours = layers.group_norm(shape[-1], dtype, None)
  theirs = nn.GroupNorm(ours.num_groups, epsilon=1e-6, dtype=dtype)
  parameters = random_parameters(ours, x)
  run = lambda norm: value_and_gradients(norm.apply, parameters, x.astype(dtype))
  (y, grads, dx), (y_flax, grads_flax, dx_flax) = run(ours), run(theirs)
  assert_close([y, dx], [y_flax, dx_flax], tolerance)
  assert_close(jax.tree.leaves(grads), jax.tree.leaves(grads_flax), tolerance)


def test_conditioning_survives_the_norm():
  # Channels shifted by a constant: what conditioning does just before a norm.
  x, shift = normal(0, 1, 5, 4, 16), normal(1, 1, 1, 1, 16)
  norm = layers.group_norm(16, jnp.float32, None)
  parameters = random_parameters(norm, x)
  difference = norm.apply(parameters, x + shift) - norm.apply(parameters, x)
  assert jnp.std(difference) > 0.1


def plain_conv(x, kernel):
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def in_scan(f):
  """f as the body of a loop of one step."""
  return lambda *args: jax.tree.map(
    lambda a: a[0], lax.scan(lambda _, args: (None, f(*args)), None, [a[None] for a in args])[1]
  )


def naive_attention(q, k, v):
  logits = jnp.einsum('bqnd,bknd->bnqk', q, k) / math.sqrt(q.shape[-1])
  return jnp.einsum('bnqk,bknd->bqnd', jax.nn.softmax(logits, axis=-1), v)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('shape', [(2, 8, 6), (3, 1, 5)])
def test_conv_gradients(dtype, tolerance, shape):
  ours = lambda *args: value_and_gradients(convolution.conv3, *args)

  @jax.jit
  def run(x, kernel):
    stacked = jax.vmap(ours, in_axes=(0, None))(jnp.stack([x, 2 * x]), kernel)
    # Other platforms take the native gradient, which this one can run too.
    native = convolution._conv_vjp_native(
      ((1, 1), (1, 1)), x, kernel, normal(99, *shape, 4).astype(dtype)
    )
    expected = value_and_gradients(plain_conv, x, kernel)
    return expected, ours(x, kernel), in_scan(ours)(x, kernel), [a[0] for a in stacked], native

  x, kernel = normal(0, *shape, 5).astype(dtype), normal(1, 3, 3, 5, 4).astype(dtype)
  expected, *actual, native = run(x, kernel)
  for a in actual:
    assert_close(a, expected, tolerance)
  assert_close(native, expected[1:], tolerance)


def test_conv_gradient_is_not_slow_in_a_loop():
  x, kernel = normal(0, 8, 16, 16, 32), normal(1, 3, 3, 32, 32)
  straight = lambda *args: value_and_gradients(convolution.conv3, *args)
  runs = [jax.jit(f).lower(x, kernel).compile() for f in (straight, in_scan(straight))]
  seconds = [[], []]
  for _ in range(12):
    for run, times in zip(runs, seconds, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(run(x, kernel))
      times.append(time.perf_counter() - start)
  straight, looped = (min(times[2:]) for times in seconds)
  assert looped < 5 * straight


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_attention_is_softmax_attention(dtype, tolerance):
  q, k, v = (normal(i, 2, 12, 3, 8) for i in range(3))

  @jax.jit
  def run(*args):
    low = [a.astype(dtype) for a in args]
    native = attention._attention_vjp_native(*low, normal(99, *args[0].shape).astype(dtype))
    expected = [a.astype(dtype) for a in value_and_gradients(naive_attention, *args)]
    return expected, value_and_gradients(attention.softmax_attention, *low), native

  expected, actual, native = run(q, k, v)
  assert_close(actual, expected, tolerance)
  assert_close(native, expected[1:], tolerance)
  # Logits beyond the range of exp.
  if dtype == jnp.float32:
    assert all(jnp.isfinite(a).all() for a in run(100 * q, 100 * k, v)[1])


@pytest.mark.parametrize('width', [64, 128])
def test_attention_on_tpu_is_softmax_attention(width, monkeypatch):
  """The kernel, interpreted, over two blocks of positions; and that a mesh of TPUs chooses it."""
  monkeypatch.setattr(attention, 'FLASH_BLOCK', 128)
  args = [normal(i, 1, 256, 2, width) for i in range(3)]
  with pltpu.force_tpu_interpret_mode():
    actual = value_and_gradients(attention._flash, *args)
  assert_close(actual, value_and_gradients(naive_attention, *args), 1e-5)

  device = AbstractDevice(device_kind='TPU v5 lite', num_cores=1, platform='tpu')
  mesh = parallel.abstract_mesh(4, 2, device)
  shapes = [jax.ShapeDtypeStruct((8, 1024, 2, width), a.dtype) for a in args]
  traced = lambda: str(jax.make_jaxpr(lambda *args: attention.softmax_attention(*args))(*shapes))
  with jax.sharding.use_abstract_mesh(mesh):
    assert 'shard_map' in traced() and 'pallas_call' in traced()
    shapes = [jax.ShapeDtypeStruct((4, *a.shape[1:]), a.dtype) for a in shapes]
    assert 'pallas_call' not in traced()  # four examples are not for eight devices
  assert 'pallas_call' not in traced()


def test_attention_on_tpu_has_a_second_gradient_where_one_is_asked_for():
  device = AbstractDevice(device_kind='TPU v5 lite', num_cores=1, platform='tpu')
  x = jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.float32)

  def twice(x):
    y, pull_back = jax.vjp(lambda x: attention.softmax_attention(x, x, x), x)
    return (pull_back(y)[0] ** 2).sum()

  with jax.sharding.use_abstract_mesh(parallel.abstract_mesh(1, 1, device)):
    with pytest.raises(NotImplementedError):
      jax.eval_shape(jax.grad(twice), x)
    with attention.differentiated_twice():
      assert jax.eval_shape(jax.grad(twice), x).shape == x.shape


# A sum of so many equal numbers in bfloat16 ends at 256 times the number on XLA:CPU.
MANY = (2, 64, 64)


@pytest.mark.parametrize(
  'layer',
  [
    layers.Dense(3, dtype=jnp.bfloat16),
    convolution.Conv3(3, jnp.bfloat16),
  ],
  ids=['dense', 'conv'],
)
def test_gradients_by_biases_are_sums_in_float32(layer, rank_promotion_allowed):
  x = jnp.zeros((*MANY, 2))
  variables = layer.init(jax.random.key(0), x)
  total = lambda variables: layer.apply(variables, x).astype(jnp.float32).sum()
  gradient = jax.jit(jax.grad(total))(variables)['params']['bias']
  np.testing.assert_allclose(gradient, math.prod(MANY), rtol=1e-6)


def test_gradients_by_scales_and_shifts_are_sums_in_float32(rank_promotion_allowed):
  layer, cond = ScaleShift(jnp.bfloat16), jnp.ones((MANY[0], 1))
  x = jnp.ones((*MANY, 2), jnp.bfloat16)
  variables = layer.init(jax.random.key(0), x, cond)
  total = lambda variables: layer.apply(variables, x, cond).astype(jnp.float32).sum()
  gradient = jax.jit(jax.grad(total))(variables)['params']['dense']
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_allclose(leaf, math.prod(MANY), rtol=1e-2)


@pytest.mark.parametrize('shape', [(3,), (1, 1, 1, 3), (2, 1, 1, 3), (2, 4, 1, 3)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_what_is_spread_has_the_gradient_of_a_broadcast(shape, dtype, rank_promotion_allowed):
  a, like = normal(0, *shape), jnp.zeros((2, 4, 5, 3), dtype)
  g = normal(1, *like.shape).astype(dtype)
  ours = lambda a: layers.spread(a, like)
  theirs = lambda a: jnp.broadcast_to(a.astype(dtype), like.shape)
  (value, pull_back), expected = jax.vjp(ours, a), jax.vjp(theirs, a)
  np.testing.assert_array_equal(value, expected[0])
  exact = jax.vjp(lambda a: jnp.broadcast_to(a, like.shape), a)[1](g.astype(jnp.float32))
  np.testing.assert_allclose(*pull_back(g), *exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['vdm_unet', 'dit'])
def test_gradients_by_conditions_are_sums_in_float32(name, rank_promotion_allowed):
  """Beside the network in float32, with far more positions than bfloat16 can add up."""
  fields = DETAILED[name] | (dict(conditioning_width=16) if name == 'dit' else {})
  network = NETWORKS[name](**fields)
  z, t = normal(0, 1, 64, 64, 1), jnp.full(1, 0.3)
  parameters = random_parameters(network, z, t, train=False)

  def gradient(network):
    total = lambda parameters: network.apply(parameters, z, t, train=False).sum()
    found = jax.jit(jax.grad(total))(parameters)['params']['conditioning']['dense_1']
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

  exact, low = gradient(network), gradient(network.clone(dtype=jnp.bfloat16))
  assert np.linalg.norm(low - exact) < 0.1 * np.linalg.norm(exact)


def test_dense_is_that_of_flax(rank_promotion_allowed):
  x = normal(0, 2, 5, 7)
  ours, theirs = layers.Dense(3), nn.Dense(3)
  variables = ours.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
  parameters = random_parameters(ours, x)
  np.testing.assert_allclose(ours.apply(parameters, x), theirs.apply(parameters, x), rtol=1e-6)


DETAILED = {
  'vdm_unet': dict(width=16, num_blocks=1, fourier_exponents=(), residual=False),
  'adm_unet': dict(width=16, num_blocks=1, channel_multipliers=(1,), attention_resolutions=()),
  'uvit': dict(widths=(16,), num_blocks=1, transformer_width=16, transformer_depth=1),
  'dit': dict(width=16, num_blocks=1, head_width=8, patch_size=2, bottleneck=0),
  'mlp': dict(width=16, num_blocks=1, residual=False),
}
HEADS = {'adm_unet': dict(head_width=16), 'uvit': dict(head_width=8, conditioning_width=16)}


@pytest.mark.parametrize('name', DETAILED)
def test_details_of_z_below_the_digits_of_bfloat16_reach_the_first_layer(
  name, rank_promotion_allowed
):
  """Two z that are equal in bfloat16; what their difference makes of the first layer's output."""
  fields = DETAILED[name] | HEADS.get(name, {}) | {'dtype': jnp.bfloat16}
  fields |= dict(conditioning_width=16) if name == 'dit' else {}
  network = NETWORKS[name](**fields)
  z, t = jnp.full((1, 4, 4, 1), 1.0), jnp.zeros(1)
  near = z + 2.0**-10 * normal(1, *z.shape).clip(-1, 1)
  np.testing.assert_array_equal(near.astype(jnp.bfloat16), z.astype(jnp.bfloat16))
  parameters = random_parameters(network, z, t, train=False)
  if name == 'mlp':  # by which z goes round the layers
    parameters['params']['gate'] = jax.tree.map(jnp.zeros_like, parameters['params']['gate'])
  first = parameters['params']['dense_in' if name in ('dit', 'mlp') else 'conv_in']
  # a layer whose channels are differences of neighbours
  first['kernel'] = first['kernel'] - first['kernel'].mean(
    axis=tuple(range(first['kernel'].ndim - 1))
  )
  found = [apply(network, parameters, z, t) for z in (z, near)]
  assert float(jnp.abs(found[0] - found[1]).max()) > 1e-5


@pytest.mark.parametrize(
  ('network', 'message'),
  [
    (
      VDMUNet(width=128, num_heads=3),
      r'config\.model\.num_heads=3 must be a divisor .* try 2 or 4\.',
    ),
    (VDMUNet(width=31), r'config\.model\.width=31 must be even and at least 4; try 32\.'),
    (VDMUNet(dropout=1.0), r'config\.model\.dropout=1\.0 must be in \[0, 1\)'),
    (VDMUNet(num_blocks=0), r'config\.model\.num_blocks=0 must be at least 1'),
    (
      VDMUNet(norm_groups=24),
      r'norm_groups=24 must be 0 or a divisor of the 128 channels .*; try 0',
    ),
    (VDMUNet(norm_groups=-1), r'config\.model\.norm_groups=-1 must be 0 or a divisor of the 128'),
    (VDMUNet(num_classes=-1), r'config\.model\.num_classes=-1 must be zero or more'),
  ],
)
def test_errors_name_the_field(network, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      lambda: network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), train=False)
    )


def test_inputs_that_the_network_has_no_use_for_are_refused():
  t = jnp.zeros(1)
  with pytest.raises(ValueError, match='class_conditional'):
    Conditioning(8).init(jax.random.key(0), t, jnp.zeros(1, jnp.int32))
  with pytest.raises(ValueError, match='embedding_size=0'):
    Conditioning(8).init(jax.random.key(0), t, vector=jnp.zeros((1, 2)))
  with pytest.raises(ValueError, match='augmentation_flag'):
    Conditioning(8).init(jax.random.key(0), t, flag=t)
  with pytest.raises(ValueError, match=r'vdm_unet takes \[B, \*space, C\]'):
    VDMUNet().init(jax.random.key(0), jnp.zeros((1, 4)), t, train=False)


def test_mlp_reads_images_as_vectors(key):
  z, t = jax.random.normal(key, (3, 4, 2, 1)), jnp.array([0.1, 0.5, 0.9])
  network = MLP(width=16, num_blocks=1, fourier_exponents=(2,))
  params = network.init(key, z, t, train=False)
  params = jax.tree.map(lambda a: a + 0.1, params)  # what starts at zero says something
  image = network.apply(params, z, t, train=False)
  vector = network.apply(params, z.reshape(3, 8), t, train=False)
  np.testing.assert_array_equal(image, vector.reshape(z.shape))
  assert np.abs(image - z).max() > 0.1
