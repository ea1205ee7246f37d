"""Equal blocks in a loop: the same function as unrolled, and parameters that convert both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from vdm.configs import digits

from vdm import build
from vdm.nn import blocks, layers
from vdm.nn.vdm_unet import VDMUNet
from vdm.system import parallel
from vdm.training.step import make_train_step
from vdm.workdir import checkpoint, config_file


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


@pytest.fixture
def quick_compilation():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def assert_same_bits(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_close(one, other, tolerance):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


def filled(shapes, seed=0):
  """Random numbers, nothing at zero: the layers that start there hide most of a network."""
  rng = np.random.default_rng(seed)

  def fill(a):
    scale = max(1, np.prod(a.shape[:-1])) ** -0.5
    return (scale * np.abs(rng.normal(size=a.shape))).astype(a.dtype)  # a second moment is positive

  return jax.tree.map(fill, shapes)


def test_both_layouts_are_the_same_function_with_the_same_gradient(key, quick_compilation):
  network = VDMUNet(width=16, num_blocks=2, attention=True, fourier_exponents=(3,), num_classes=3)
  z, t, label = jax.random.normal(key, (2, 8, 8, 1)), jnp.array([0.2, 0.7]), jnp.array([2, 0])

  def shapes(network):
    return jax.eval_shape(lambda: network.init(key, z, t, label, train=False))

  def gradients_and_value(network, params):
    def loss(params, z):
      out = network.apply(params, z, t, label, train=False)
      return (out**2).mean(), out

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, z)

  # centred: of numbers with a mean far above their spread a norm shows the rounding
  params = jax.tree.map(lambda a: a - a.mean(), filled(shapes(network)))
  stacked = blocks.stack(params, {'down_*', 'down_*_attention', 'up_*', 'up_*_attention'})
  other = network.clone(scan_blocks=True)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda a: a.shape, shapes(other))
  got, expected = gradients_and_value(other, stacked), gradients_and_value(network, params)
  assert_close(blocks.unstack(got), expected, 1e-5)


def test_a_loop_keeps_products_for_the_gradient_and_nothing_else(key):
  """Of each block, in activations: what comes in, and the first convolution; no mask."""
  num_blocks, width, size = 3, 16, 8
  z, t = jnp.ones((2, size, size, 1)), jnp.array([0.2, 0.7])

  def kept(remat):
    network = VDMUNet(width, num_blocks, fourier_exponents=(), scan_blocks=True, remat=remat)
    params = jax.eval_shape(lambda: network.init(key, z, t, train=False))
    out = lambda params: network.apply(params, z, t, train=True, rngs={'dropout': key})
    arrays = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(out, params)[1], params))
    stacks = [a for a in arrays if a.shape[:4] == (num_blocks, 2, size, size)]  # on the way in
    return sum(a.size * a.dtype.itemsize for a in stacks) / num_blocks / (4 * 2 * size**2 * width)

  # the output of the second convolution is not read by the gradient, those of the blocks are skips
  assert kept(remat=False) <= 1 + 1
  assert kept(remat=True) <= 1


class Link(nn.Module):
  @nn.compact
  def __call__(self, h, x, c):
    scale = self.param('scale', nn.initializers.ones, ())
    mask = layers.Dropout(0.5)(jnp.ones((1, 64)), train=True)[0]
    return jnp.tanh(scale * h) + x + c, (h, mask)


class Chain(nn.Module):
  scan: bool
  remat: bool

  @nn.compact
  def __call__(self, h, xs, c):
    make = lambda name: Link(name=name)
    return blocks.chain(make, 'link_*', 3, h, xs, c, scan=self.scan, remat=self.remat)


@pytest.mark.parametrize('scan', [False, True])
def test_chain_by_hand(scan, key):
  """h and x meet in block i and no other; every block has dropout of its own; remat is exact."""
  scales = {f'link_{i}': {'scale': jnp.float32(s)} for i, s in enumerate((0.2, 0.3, 0.5))}
  xs = jnp.array([1.0, 2.0, 3.0])

  def run(scales, remat=False):
    params = {'params': blocks.stack(scales, {'link_*'}) if scan else scales}
    arguments = jnp.float32(1), xs if scan else list(xs), jnp.float32(4)
    h, ys = Chain(scan, remat).apply(params, *arguments, rngs={'dropout': key})
    return h, ys if scan else zip(*ys, strict=True)

  h, (inputs, masks) = run(scales)
  by_hand = [1.0]
  for scale, x in zip((0.2, 0.3, 0.5), xs, strict=True):
    by_hand.append(np.tanh(scale * by_hand[-1]) + x + 4)
  np.testing.assert_allclose([*inputs, h], by_hand, rtol=1e-6)
  assert len({np.asarray(mask).tobytes() for mask in masks}) == 3
  last_first = blocks.last_first(jnp.float32(0), inputs if scan else list(inputs))
  np.testing.assert_allclose(last_first, [*by_hand[2::-1], 0], rtol=1e-6)

  of = lambda remat: jax.grad(lambda scales: run(scales, remat)[0])
  assert_close(of(True)(scales), of(False)(scales), 1e-6)
  assert 'policy=None' in str(jax.make_jaxpr(of(True))(scales))  # nothing is kept
  assert 'policy=None' not in str(jax.make_jaxpr(of(False))(scales))


def test_conversion_round_trips_bit_for_bit_and_leaves_the_rest_alone():
  odd = jnp.array([np.nan, -0.0, np.inf, 1e-42])
  group = {f'block_{i}': {'a': {'kernel': odd * (i + 1)}, 'b': jnp.int32(i)} for i in range(11)}
  named = {f'block_{i}_out': jnp.full(3, i, jnp.bfloat16) for i in range(11)}
  tree = [{'params': {**group, **named, 'other_0': odd}, 'block_0': jnp.ones(2)}, (None, odd)]
  stacked = blocks.stack(tree, {'block_*', 'block_*_out'})
  inner = stacked[0]['params']
  assert inner.keys() == {'block_*', 'block_*_out', 'other_0'}
  assert inner['block_*']['a']['kernel'].shape == (11, 4)
  np.testing.assert_array_equal(inner['block_*']['b'], np.arange(11))  # 10 comes after 9
  assert_same_bits(blocks.unstack(stacked), tree)
  assert_same_bits(blocks.stack(tree, {'absent_*'}), tree)
  assert_same_bits(blocks.stack(tree, ()), tree)


def config_of(scan, kind='adamw'):
  config = digits.get_config('debug')
  with config.unlocked():
    config.model.update(num_blocks=1, scan_blocks=scan)
    config.optimizer.update(warmup_steps=0, kind=kind)
  return config


def test_initial_parameters_do_not_depend_on_the_layout(key, quick_compilation):
  unrolled, stacked = (jax.jit(build.model(config_of(scan)).init)(key) for scan in ('off', 'on'))
  assert 'down_0' in unrolled['network'] and 'down_*' in stacked['network']
  assert_same_bits(blocks.unstack(stacked), unrolled)


def test_a_loop_is_for_accelerators(monkeypatch):
  for backend, expected in (('cpu', False), ('tpu', True), ('gpu', True)):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    assert build.scan_blocks(config_of('auto').model) is expected
  with pytest.raises(ValueError, match=r"config\.model\.scan_blocks='yes' must be 'auto', 'on' or"):
    build.model(config_of('yes'))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_a_checkpoint_restores_in_the_other_layout(tmp_path, quick_compilation, kind):
  """Sharded, bit for bit, either way; and training goes on from it."""
  mesh = parallel.make_mesh(fsdp=2)

  def abstract_of(config):
    return parallel.abstract_state(mesh, build.init_state(config, build.model(config)))

  shardings = lambda tree: jax.tree.map(lambda a: a.sharding, tree)
  config, other_config = config_of('off', kind), config_of('on', kind)
  abstract, other_abstract = abstract_of(config), abstract_of(other_config)
  state = jax.device_put(filled(abstract), shardings(abstract))

  config_file.open_workdir(tmp_path, config)
  with checkpoint.manager(tmp_path, 2) as manager:
    checkpoint.save(manager, 3, state)
    config_file.open_workdir(tmp_path, other_config)  # the same run
    other_state, number = checkpoint.restore(manager, other_abstract)
    assert number == 3 and shardings(other_state) == shardings(other_abstract)
    assert_same_bits(blocks.unstack(other_state), state)
    checkpoint.save(manager, 4, other_state)
    back, _ = checkpoint.restore(manager, abstract, 4)
    assert shardings(back) == shardings(state)
    assert_same_bits(back, state)

  model = build.model(other_config)
  step = make_train_step(other_config, model)
  image = np.random.default_rng(0).integers(0, 17, (8, 8, 8, 1)).astype(np.uint8)
  index = np.arange(8, dtype=np.int32)
  batch = {'image': image, 'label': 0 * index, 'index': index}
  restored = jax.device_put(other_state, jax.devices()[0])  # half the compilation
  after, metrics = jax.jit(step)(restored, batch)
  assert after.step == restored.step + 1 and np.isfinite(metrics.scalars['grad_norm'])
  kernels = (s.params['network']['down_*']['conv_0']['kernel'] for s in (after, restored))
  assert (np.abs(np.subtract(*kernels)).max(axis=(1, 2, 3, 4)) > 0).all()


def test_another_model_in_the_other_layout_is_named(tmp_path):
  params = blocks.stack({f'block_{i}': {'a': jnp.ones(4)} for i in range(3)}, {'block_*'})
  with checkpoint.manager(tmp_path, 1) as manager:
    checkpoint.save(manager, 1, params)
  sharding = params['block_*']['a'].sharding
  leaf = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)
  reader = checkpoint.manager(tmp_path)
  wanted = {f'block_{i}': {'a': leaf} for i in range(2)}
  with pytest.raises(ValueError, match=r'holds block_\*\.a float32\[3, 4\], not float32\[2, 4\]'):
    checkpoint.restore(reader, wanted)
  with pytest.raises(ValueError, match=r'of another model: it holds no other float32\[4\]'):
    checkpoint.restore(reader, {'other': leaf})
