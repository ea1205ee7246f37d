"""Networks in one, two and three spatial axes: padding, shifts, sizes that do not fit, fields."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from vdm.configs import default

from vdm import build
from vdm.nn import blocks, convolution, layers
from vdm.nn.adm_unet import ADMUNet
from vdm.nn.conditioning import Conditioning
from vdm.nn.dit import DiT
from vdm.nn.mlp import MLP
from vdm.nn.uvit import UViT
from vdm.nn.vdm_unet import VDMUNet

SMALL = {
  'vdm_unet': VDMUNet(width=8, num_blocks=1, fourier_exponents=(1,), residual=False),
  'adm_unet': ADMUNet(
    width=8, channel_multipliers=(1, 2), num_blocks=1, attention_resolutions=(3,), head_width=8
  ),
  'uvit': UViT(
    widths=(8,),
    num_blocks=1,
    transformer_width=16,
    transformer_depth=1,
    head_width=8,
    patch_size=2,
    conditioning_width=8,
  ),
  'dit': DiT(
    width=16, num_blocks=1, head_width=8, patch_size=2, bottleneck=0, conditioning_width=8
  ),
}
STRIDE = {'vdm_unet': 1, 'adm_unet': 2, 'uvit': 4, 'dit': 2}  # what a shift is a multiple of
AXES = (1, 2, 3)


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sizes_of(name, num_axes):
  return tuple(STRIDE[name] * n for n in (3, 2, 3)[:num_axes])


def shapes_of(network, *args, **kwargs):
  return jax.eval_shape(lambda: network.init(jax.random.key(0), *args, **kwargs, train=False))


def random_parameters(shapes):
  """Parameters with nothing at zero: the layers that start there hide most of a network."""
  generator = np.random.default_rng(0)

  def draw(path, leaf):
    noise = generator.normal(size=leaf.shape).astype(np.float32)
    if path[-1].key == 'kernel':
      return noise / math.sqrt(math.prod(leaf.shape[:-1]))
    return noise if path[-1].key == 'position' else 0.1 * noise + (path[-1].key == 'scale')

  return jax.tree.map_with_path(draw, shapes)


def outputs(network, parameters, *args, **kwargs):
  """What the network says, compiled with little effort: that is most of the time of a test."""
  run = jax.jit(
    lambda p, args, kwargs: network.apply(p, *args, **kwargs, train=False),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  return run(parameters, args, kwargs)


def distance(expected, actual):
  expected, actual = np.asarray(expected), np.asarray(actual)
  assert expected.shape == actual.shape
  return np.abs(expected - actual).max() / np.abs(expected).max()


def padded_conv(x, kernel, kinds):
  """JAX's convolution, with each axis padded by hand."""
  for axis, kind in enumerate(kinds, 1):
    first, last = (lax.slice_in_dim(x, at, at + 1, axis=axis) for at in (0, x.shape[axis] - 1))
    before, after = (last, first) if kind == 'periodic' else 2 * [jnp.zeros_like(first)]
    x = jnp.concatenate([before, x, after], axis=axis)
  space = 'XYZ'[: len(kinds)]
  layout = (f'N{space}C', f'{space}IO', f'N{space}C')
  return lax.conv_general_dilated(x, kernel, [1] * len(kinds), 'VALID', dimension_numbers=layout)


@pytest.mark.parametrize(
  'kinds', [kinds for n in AXES for kinds in itertools.product(('zero', 'periodic'), repeat=n)]
)
def test_convolution_and_its_gradient_are_those_of_jax(kinds):
  num_axes = len(kinds)
  x, kernel = normal(0, 2, *(4, 1, 3)[:num_axes], 3), normal(1, *[3] * num_axes, 3, 5)
  g = normal(2, *x.shape[:-1], 5)

  @jax.jit
  def both(x, kernel):
    value, vjp = jax.vjp(lambda *args: convolution.conv3(*args, ','.join(kinds)), x, kernel)
    expected, expected_vjp = jax.vjp(lambda *args: padded_conv(*args, kinds), x, kernel)
    return (expected, *expected_vjp(g)), (value, *vjp(g))

  for expected, actual in zip(*both(x, kernel), strict=True):
    assert distance(expected, actual) < 1e-5


@pytest.mark.parametrize('num_axes', AXES)
@pytest.mark.parametrize('pad', [0, 1])
def test_both_gradients_of_the_convolution_agree(num_axes, pad):
  """That of CPUs and that of all others, padded or not along the first axis."""
  pads = ((pad, pad), (1, 1), (0, 0))[:num_axes]
  x, kernel = normal(0, 2, *(4, 2, 5)[:num_axes], 3), normal(1, *[3] * num_axes, 3, 5)
  g = normal(2, *(2, 2 + 2 * pad, 2, 3)[: num_axes + 1], 5)

  @jax.jit
  def both():
    return [
      f(pads, x, kernel, g) for f in (convolution._conv_vjp_native, convolution._conv_vjp_plain)
    ]

  for expected, actual in zip(*both(), strict=True):
    assert distance(expected, actual) < 1e-5


@pytest.mark.parametrize('num_axes', AXES)
def test_resampling_round_trips(num_axes):
  x = normal(0, 2, *(2, 4, 6)[:num_axes], 3)
  halved, patches = layers.halve(x), layers.space_to_depth(x, 2)
  assert halved.shape == (2, *(1, 2, 3)[:num_axes], 3)
  assert patches.shape == (*halved.shape[:-1], 3 * 2**num_axes)
  np.testing.assert_allclose(halved, patches.reshape(*halved.shape[:-1], -1, 3).mean(-2), atol=1e-6)
  np.testing.assert_allclose(layers.halve(layers.double(halved)), halved, atol=1e-6)
  np.testing.assert_array_equal(layers.depth_to_space(patches, 2), x)
  corner = x[:, *[slice(2)] * num_axes]
  np.testing.assert_array_equal(patches[:, *[0] * num_axes], corner.reshape(2, -1))


@pytest.mark.parametrize('name', ['vdm_unet', 'adm_unet', 'uvit'])
def test_shapes_and_numbers_of_parameters(name):
  """The kernels of n axes have 3^n positions; all else but U-ViT's positions is as in images."""
  network = SMALL[name].clone(**{'patch_size': 1} if name == 'uvit' else {})
  counts = []
  for num_axes in AXES:
    z, t = jnp.zeros((2, *sizes_of(name, num_axes), 2)), jnp.zeros(2)
    init = functools.partial(network.init_with_output, train=False)
    out, variables = jax.eval_shape(init, jax.random.key(0), z, t)
    assert out.shape == z.shape and out.dtype == jnp.float32
    parameters = dict(variables['params'])
    if name == 'uvit':
      told = tuple(n // 2 for n in z.shape[1:-1])
      assert parameters.pop('position').shape == (1, *told, 16)
    counts.append(sum(leaf.size for leaf in jax.tree.leaves(parameters)))
    kernels = [leaf for leaf in jax.tree.leaves(parameters) if leaf.shape[:-2] == (3,) * num_axes]
    assert len(kernels) == 2 + 2 * sum('norm_1' in part for part in parameters.values())
  (positions,) = {leaf.size // math.prod(leaf.shape[-2:]) for leaf in kernels}
  products = sum(leaf.size for leaf in kernels) // positions
  assert np.diff(counts).tolist() == [6 * products, 18 * products]


def test_patches_of_three_axes_become_channels():
  z, t = jnp.zeros((1, 4, 8, 4, 2)), jnp.zeros(1)
  parameters = shapes_of(SMALL['uvit'], z, t)['params']
  assert parameters['conv_in']['kernel'].shape == (3, 3, 3, 8 * 2, 8)
  assert parameters['conv_out']['kernel'].shape == (3, 3, 3, 8, 8 * 2)
  parameters = shapes_of(SMALL['dit'], z, t)['params']
  assert parameters['dense_in']['kernel'].shape == (8 * 2, 16)
  assert parameters['dense_out']['kernel'].shape == (16, 8 * 2)
  assert parameters['position'].shape == (1, 2, 4, 2, 16)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize(
  'padding',
  [
    'zero',
    'periodic',
    'zero,zero',
    'periodic,periodic',
    'zero,periodic',
    pytest.param('periodic,zero,periodic', marks=pytest.mark.slow),
  ],
)
def test_periodic_padding_commutes_with_shifts_and_zeros_do_not(name, padding):
  """By the total stride, along each axis, of z and field together."""
  kinds = padding.split(',')
  z, step = normal(0, 1, *sizes_of(name, len(kinds)), 2), STRIDE[name]
  field = normal(1, *z.shape[:-1], 1)
  axes = range(1, len(kinds) + 1)
  each = lambda a: np.concatenate([a, *(np.roll(a, step, axis) for axis in axes)])
  t = np.full(1 + len(kinds), 0.4, np.float32)
  alike = len(set(kinds)) == 1
  network = SMALL[name].clone(padding=kinds[0] if alike else padding)
  shapes = shapes_of(network, each(z), t, field=each(field))
  out = outputs(network, random_parameters(shapes), each(z), t, field=each(field))
  out, *moved = np.asarray(out)
  for axis, (kind, found) in enumerate(zip(kinds, moved, strict=True)):
    assert distance(out, np.roll(out, step, axis)) > 0.01
    error = distance(np.roll(out, step, axis), found)
    assert error < 1e-5 if kind == 'periodic' else error > 1e-3


@pytest.mark.parametrize('num_axes', [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['vdm_unet', 'uvit', 'dit'])
def test_both_layouts_agree_with_a_field(name, num_axes):
  z, t = normal(0, 1, *sizes_of(name, num_axes), 2), np.float32([0.4])
  field = normal(1, *z.shape[:-1], 3)
  network = SMALL[name].clone(num_blocks=2, padding='periodic')
  looped = network.clone(scan_blocks=True)
  stacked = random_parameters(shapes_of(looped, z, t, field=field))
  expected = outputs(network, blocks.unstack(stacked), z, t, field=field)
  assert distance(expected, outputs(looped, stacked, z, t, field=field)) < 1e-5


@pytest.mark.parametrize('name', ['adm_unet', 'uvit', 'dit'])
@pytest.mark.parametrize('padding', ['zero', 'zero,periodic'])
def test_fit_size_is_zeros_at_the_end_that_the_output_lacks(name, padding):
  """Along axes that are padded with zeros; z and field of the full size say the same."""
  height, width = sizes_of(name, 2)
  z, t = normal(0, 1, height - 1, width - (padding == 'zero'), 2), np.float32([0.4])
  field = normal(1, *z.shape[:-1], 1)
  network = SMALL[name].clone(padding=padding)
  full = lambda a: np.pad(a, [(0, 0), (0, 1), (0, width - z.shape[2]), (0, 0)])
  assert full(z).shape[1:3] == (height, width)
  parameters = random_parameters(shapes_of(network, full(z), t, field=full(field)))
  expected = outputs(network, parameters, full(z), t, field=full(field))
  found = outputs(network.clone(fit_size=True, residual=True), parameters, z, t, field=field)
  np.testing.assert_allclose(found, z + expected[:, : z.shape[1], : z.shape[2]], atol=1e-6)


@pytest.mark.parametrize('name', SMALL)
def test_a_coarser_field_is_a_repeated_one(name):
  """By another factor along each axis; the field has an effect, and no field has no parameters."""
  height, width = sizes_of(name, 2)
  z, t = np.tile(normal(0, 1, 2 * height, width, 2), (2, 1, 1, 1)), np.full(2, 0.4, np.float32)
  coarse = normal(1, 2, height, 1, 3)
  repeated = np.repeat(np.repeat(coarse, 2, axis=1), width, axis=2)
  attention = dict(attention_resolutions=(height,)) if name == 'adm_unet' else {}
  network = SMALL[name].clone(**attention)
  shapes = shapes_of(network, z, t, field=repeated)
  parameters = random_parameters(shapes)
  expected, found = (outputs(network, parameters, z, t, field=a) for a in (repeated, coarse))
  assert distance(expected, found) < 1e-6 and distance(expected[0], expected[1]) > 0.01
  without, patch = shapes_of(network, z, t)['params'], getattr(network, 'patch_size', 1)
  first = 'dense_in' if name == 'dit' else 'conv_in'
  *size, channels, features = without[first]['kernel'].shape
  more = (*size, channels + 3 * patch**2, features)
  changed = {'kernel': jax.ShapeDtypeStruct(more, jnp.float32)}
  assert shapes['params'] == without | {first: without[first] | changed}


def test_perceptron_reads_a_field_of_any_size():
  z, t, field = jnp.ones((2, 3, 1)), jnp.full(2, 0.4), normal(0, 2, 4, 5)
  network = MLP(width=8, embedding_size=2, num_classes=3)
  given = dict(label=jnp.zeros(2, jnp.int32), vector=jnp.ones((2, 2)))
  parameters = random_parameters(shapes_of(network, z, t, **given, field=field))
  assert parameters['params']['dense_in']['kernel'].shape == (3 + 20, 8)
  out = outputs(network, parameters, z, t, **given, field=field)
  assert out.shape == z.shape and distance(out[0], out[1]) > 0.01
  np.testing.assert_array_equal(
    outputs(network, parameters, z, t, **given, field=field.reshape(2, 20)), out
  )


def test_label_and_vector_add_to_each_other():
  """Each changes the condition, whatever the other; each is the null if it is absent."""
  module, t = Conditioning(8, num_classes=3, embedding_size=5), np.full(6, 0.5, np.float32)
  label = np.array([0, 1, -1, 0, 1, -1])
  vector = np.concatenate([np.tile(normal(0, 1, 5), (3, 1)), np.full((3, 5), np.nan)])
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), t, label, vector))
  parameters = random_parameters(shapes)
  out = module.apply(parameters, t, label, vector)
  for i, j in itertools.combinations(range(6), 2):
    assert np.abs(out[i] - out[j]).max() > 1e-3
  np.testing.assert_array_equal(module.apply(parameters, t, vector=vector)[0], out[2])
  np.testing.assert_array_equal(module.apply(parameters, t, label)[:3], out[3:])
  p = parameters['params']
  silent = {
    'embedding': {'kernel': 0 * p['embedding']['kernel']},
    'null_embedding': np.zeros((1, 32)),
  }
  alone = {k: p[k] for k in p.keys() - silent.keys()}
  np.testing.assert_array_equal(
    module.apply({'params': p | silent}, t, label, vector),
    Conditioning(8, num_classes=3).apply({'params': alone}, t, label),
  )


@pytest.mark.parametrize(
  ('name', 'fields', 'shape', 'message'),
  [
    (
      'adm_unet',
      {},
      (6, 5, 1),
      r'image_shape=\(6, 5, 1\) must have sizes divisible by 2 for this adm_unet; try \(6, 6, 1\), '
      r'or fewer config\.model\.channel_multipliers, or config\.model\.fit_size=True\.',
    ),
    ('adm_unet', {}, (5, 1), r'image_shape=\(5, 1\) .* try \(6, 1\),'),
    (
      'uvit',
      {'padding': 'zero,periodic,zero', 'fit_size': True},
      (3, 5, 4, 2),
      r'image_shape=\(3, 5, 4, 2\) must have sizes divisible by 4 along its periodic axes for this '
      r'uvit; try \(3, 8, 4, 2\), or fewer config\.model\.widths or a smaller '
      r'config\.model\.patch_size\.\n',
    ),
    ('uvit', {'padding': 'periodic'}, (4, 5, 1), r'try \(4, 8, 1\), or .*\.patch_size\.\n'),
    ('dit', {}, (4, 5, 1), r'by 2 for this dit; try \(4, 6, 1\), or .*patch_size, or .*fit_size=T'),
    (
      'vdm_unet',
      {'padding': 'zero,periodic'},
      (4, 4, 4, 1),
      r"config\.model\.padding='zero,periodic' must be 'zero', 'periodic', or a list of these with "
      r"one for each of the 3 spatial axes; try 'zero,periodic,periodic'\.",
    ),
    ('adm_unet', {'padding': 'wrap'}, (4, 1), r"padding='wrap' must .* 1 spatial axes; try 'zero'"),
    ('uvit', {'padding': ('zero', 'zero')}, (4, 4, 1), r"padding=\('zero', 'zero'\) must be"),
    *[(name, {}, (4, 4, 4, 4, 1), rf'{name} takes \[B, \*space, C\]') for name in SMALL],
    *[(name, {}, (1,), rf'{name} takes \[B, \*space, C\]') for name in SMALL],
  ],
)
def test_sizes_and_paddings_that_do_not_fit_are_refused(name, fields, shape, message):
  with pytest.raises(ValueError, match=message):
    shapes_of(SMALL[name].clone(**fields), jnp.zeros((1, *shape)), jnp.zeros(1))


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('shape', [(2, 8, 3, 1), (2, 8, 1), (1, 8, 8, 1), (2, 16, 8, 1)])
def test_fields_that_do_not_fit_are_refused(name, shape):
  found = ', '.join(map(str, shape))
  message = rf'field=\({found}\) must be \[2, \*space, C\] with space \(8, 8\), or whole fractions'
  with pytest.raises(ValueError, match=message):
    shapes_of(SMALL[name], jnp.zeros((2, 8, 8, 2)), jnp.zeros(2), field=jnp.zeros(shape))


def config_of(shape, **data):
  config = default.get_config('debug')
  with config.unlocked():
    config.data.update(image_shape=shape, **data)
  return config


@pytest.mark.parametrize('shape', [(6, 2), (6, 4, 2), (4, 2, 3, 1)])
def test_a_config_may_have_one_two_or_three_axes(shape):
  model = build.model(config_of(shape))

  def predict(key):
    return model.denoiser(model.init(key))(jnp.zeros((2, *shape)), jnp.zeros(2))

  assert jax.eval_shape(predict, jax.random.key(0)).x.shape == (2, *shape)


@pytest.mark.parametrize(
  ('shape', 'data', 'message'),
  [
    ((8,), {}, r'image_shape=\(8,\) must be one to three spatial sizes, then channels; .* to four'),
    ((2, 2, 2, 2, 1), {}, r'image_shape=\(2, 2, 2, 2, 1\) must be one to three spatial sizes'),
    ((8, 1), {'flip': True}, r'data\.flip=True must be False for examples that are not images, .*'),
    ((4, 4, 4, 1), {'flip': True}, r'data\.flip=True must be False .*=\(4, 4, 4, 1\); only height'),
    ((4, 4, 4, 1), {'rotate': True}, r'data\.rotate=True must be False for images .* not square'),
  ],
)
def test_a_config_of_other_axes_is_refused(shape, data, message):
  with pytest.raises(ValueError, match=message):
    build.model(config_of(shape, **data))
