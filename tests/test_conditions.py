"""Class, vector, field and mask, together and in any network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vdm.configs import default

import vdm
from vdm import build
from vdm.data.derive import block_means, derived
from vdm.data.source import Source, of_arrays
from vdm.diffusion import ode
from vdm.diffusion.gaussian import Prediction, alpha, expand_to, sigma
from vdm.diffusion.guidance import without
from vdm.evaluation.bound import make_evaluator
from vdm.evaluation.study import batches
from vdm.system import parallel
from vdm.training.step import loss, recipe

SHAPE, COARSE = (8, 6, 2), (4, 6, 3)


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  """Flax adds biases of one axis."""


def config_of(network='vdm_unet', **data):
  config = default.get_config('debug')
  kept = ('output', 'class_conditional', 'condition_on', 'dtype')
  with config.unlocked():
    block = dict(
      vdm_unet=dict(width=8, num_blocks=1, fourier_exponents=()),
      adm_unet=dict(
        width=8, num_blocks=1, channel_multipliers=(1, 1), attention_resolutions=(), head_width=8
      ),
      uvit=dict(
        widths=(8,),
        num_blocks=1,
        transformer_width=16,
        transformer_depth=1,
        head_width=8,
        conditioning_width=8,
      ),
      dit=dict(width=16, num_blocks=1, head_width=8, patch_size=2, conditioning_width=8),
      mlp=dict(width=8, num_blocks=1),
    )[network]
    config.model = {name: config.model[name] for name in kept} | dict(name=network, **block)
    config.model.class_conditional, config.model.dtype = True, 'float32'
    config.decoder.name = 'normal'
    given = dict(image_shape=SHAPE, num_values=0, num_classes=3, embedding_size=4)
    given |= dict(condition_shape=COARSE, masked=True, shift=(1.0, -2.0), scale=(2.0, 0.5))
    given |= dict(condition_shift=(5.0, 0.0, 0.0), condition_scale=(2.0, 1.0, 1.0))
    config.data.update(given | data)
  return config


def batch_of(count=4, seed=0):
  rng = np.random.RandomState(seed)
  return {
    'image': rng.normal(size=(count, *SHAPE)).astype(np.float32),
    'label': (np.arange(count) % 3).astype(np.int32),
    'vector': rng.normal(size=(count, 4)).astype(np.float32),
    'condition': rng.normal(size=(count, *COARSE)).astype(np.float32),
    'valid': rng.rand(count, *SHAPE[:2], 1) < 0.6,
    'index': np.arange(count, dtype=np.int32),
  }


def model_of(config, key=0):
  """The model, and parameters of which none is zero."""
  model = build.model(config)
  params = model.init(jax.random.key(key))
  leaves, tree = jax.tree.flatten(params['network'])
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
  return model, params | {'network': jax.tree.unflatten(tree, leaves)}


@pytest.mark.slow
@pytest.mark.parametrize('network', ['vdm_unet', 'adm_unet', 'uvit', 'dit', 'mlp'])
def test_each_condition_has_its_effect_and_its_absence(network):
  model, params = model_of(config_of(network))
  batch = batch_of()
  given = {k: jnp.asarray(batch[k]) for k in ('label', 'vector', 'condition', 'valid')}
  z, log_snr = jax.random.normal(jax.random.key(2), (4, *SHAPE)), jnp.linspace(-2, 3, 4)
  run = jax.jit(lambda given: model.denoiser(params, given)(z, log_snr).eps)
  full, absent = run(given), run(without(given))
  for name in ('label', 'vector', 'condition'):
    rest = {k: v for k, v in given.items() if k != name}
    assert np.abs(run(rest) - full).max() > 1e-4  # it is told of it
    np.testing.assert_array_equal(run(rest), run(given | {name: without(given)[name]}))
  np.testing.assert_array_equal(run({'valid': given['valid']}), absent)
  zero = given | {'vector': jnp.zeros((4, 4)), 'condition': jnp.zeros((4, *COARSE))}
  assert np.abs(run(zero) - run({k: given[k] for k in ('label', 'valid')})).max() > 1e-4
  assert np.isfinite(full).all() and np.isfinite(absent).all()


@pytest.mark.parametrize('network', ['vdm_unet', 'mlp'])
def test_what_is_masked_changes_neither_loss_nor_gradient(network):
  config = config_of(network)
  model, params = model_of(config)
  batch = batch_of()
  zeros = jnp.zeros(4)

  @jax.jit
  def of(batch):
    run = lambda params: loss(
      recipe(config, model),
      params,
      (zeros, zeros),
      {},
      batch,
      jax.random.key(3),
      jax.random.key(4),
    )[0]
    return jax.value_and_grad(run)(params)

  found = of(batch)
  for value in (7.0, 1e6, np.nan):
    other = batch | {'image': np.where(batch['valid'], batch['image'], np.float32(value))}
    for a, b in zip(jax.tree.leaves(of(other)), jax.tree.leaves(found), strict=True):
      np.testing.assert_array_equal(a, b)
  other = batch | {'image': batch['image'] + np.float32(0.1)}
  assert of(other)[0] != found[0]  # what is not masked does


def white(mean, std):
  """The exact denoiser of independent normal values, in the units of shift 1, -2, scale 2, .5."""
  mean = (jnp.float32(mean) - jnp.array([1.0, -2.0])) / jnp.array([2.0, 0.5])
  var = (jnp.float32(std) / jnp.array([2.0, 0.5])) ** 2

  def denoiser(params, given=None, *args, **kwargs):
    valid = given['valid']

    def denoise(z, log_snr):
      a, s = expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z)
      m, v = mean.reshape(1, 1, 1, 2), var.reshape(1, 1, 1, 2)
      x = m + v * a / (v * a**2 + s**2) * (z - a * m)
      return Prediction(*(jnp.where(valid, part, 0) for part in (x, (z - a * x) / s)))

    return denoise

  return denoiser


def test_bound_and_ode_count_what_is_not_masked_alone():
  """Of independent normal values the exact likelihood of any of them is known."""
  mean, std = np.array([0.5, -1.5]), np.array([1.5, 0.8])
  config = config_of('mlp')
  with config.unlocked():
    config.schedule.update(name='linear', log_snr_min=-12.0, log_snr_max=11.0)
    config.eval.update(draws=32, batch_size=64, max_images=0)
    config.eval.ode.update(dequantization='none', rtol=1e-5, atol=1e-5, trace='exact')
  model = build.model(config)._replace(denoiser=white(mean, std))
  rng = np.random.RandomState(0)
  u = rng.normal(mean, std, (64, *SHAPE)).astype(np.float32)
  valid = rng.rand(64, *SHAPE[:2], 1) < rng.rand(64, 1, 1, 1)
  valid[:, 0, 0] = True
  each = 0.5 * ((u - mean) / std) ** 2 + np.log(std) + 0.5 * np.log(2 * np.pi)
  exact = np.where(valid, each, 0).reshape(64, -1).sum(axis=1)
  dims = 2.0 * valid.reshape(64, -1).sum(axis=1)
  source = of_arrays(np.where(valid, u, np.float32(np.nan)), valid=valid)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  params = {'network': {}, 'schedule': {}}
  result = make_evaluator(model, mesh, config.eval)(params, batches(source, config.eval), 64)
  assert result.unit == 'nats/dim'
  assert result.value == pytest.approx((exact / dims).mean(), abs=max(4 * result.stderr, 2e-3))
  batch = {k: jnp.asarray(v) for k, v in source.fetch(np.arange(8)).items()}
  probes = ode.exact_probes(8, SHAPE)
  ends = jnp.float32(11.0), jnp.float32(-12.0)
  solution = jax.jit(
    lambda batch: ode.data_log_prob(
      model.denoiser(params, batch),
      batch['image'],
      jax.random.split(jax.random.key(0), 8),
      *ends,
      model.decoder.dequantizations['none'],
      1,
      probes,
      1e-5,
      1e-5,
      1000,
      batch['valid'],
    )
  )(batch)
  np.testing.assert_allclose(-solution.log_prob / dims[:8], exact[:8] / dims[:8], atol=3e-3)


@pytest.mark.slow
def test_the_python_door_takes_them_all(tmp_path):
  config = config_of('vdm_unet')
  batch = batch_of(8)
  arrays = {k: batch[k] for k in ('label', 'vector', 'condition')}
  np.savez(tmp_path / 'a.npz', x=batch['image'], mask=batch['valid'], **arrays)
  with config.unlocked():
    config.data.update(name='arrays', path=str(tmp_path / 'a.npz'), as_found=True)
    config.data.update(train_split='[:4]', eval_split='[4:]', shift=(), scale=())
    config.train.label_dropout = 0.3
    config.sample.update(num_images=8, batch_size=8, num_steps=2)
    config.train.batch_size = 8
  exp = vdm.Experiment(config)
  state = exp.init()
  steps = list(exp.fit(state, steps=2))
  assert all(np.isfinite(metrics['loss']) for _, metrics in steps)
  state = steps[-1][0]
  assert exp.bits_per_dim(state).unit == 'nats/dim'
  given = dict(arrays, mask=batch['valid'])
  nats = exp.log_prob(state, batch['image'], draws=2, **given)
  assert nats.value.shape == (8,) and np.isfinite(nats.value).all()
  images = exp.sample(state, 8, guidance=1.5, **given)
  assert images.shape == (8, *SHAPE) and images.dtype == np.float32
  fill = np.broadcast_to(np.float32(exp.config.data.shift), images.shape)
  outside = ~np.broadcast_to(batch['valid'], images.shape)
  np.testing.assert_allclose(images[outside], fill[outside], rtol=1e-6)
  assert exp.sample(state, 3).shape == (3, *SHAPE)  # by those of the evaluation split
  with pytest.raises(ValueError, match=r'condition=\(8, 8, 6, 3\) must be an array \[8, 4, 6, 3\]'):
    exp.sample(state, 8, condition=np.zeros((8, 8, 6, 3)))
  with pytest.raises(ValueError, match=r'vector=\(2, 4\) must be an array \[8, 4\]'):
    exp.log_prob(state, batch['image'], vector=np.zeros((2, 4)))
  swapped = batch['image'].astype('>f8')
  again = exp.log_prob(state, swapped, draws=2, **given)
  np.testing.assert_allclose(again.value, nats.value, rtol=1e-5)
  in_jit = jax.jit(lambda c: exp.denoiser(state, condition=c)(jnp.zeros((8, *SHAPE)), jnp.zeros(8)))
  assert np.isfinite(in_jit(arrays['condition']).eps).all()
  one_nan = arrays['vector'].copy()
  one_nan[3, 1] = np.nan
  nothing = np.zeros_like(given['mask'])
  images = batch['image']
  for refused, call in {
    r'images=\(8, 7, 6, 2\) must be': lambda: exp.log_prob(state, images[:, :7], **given),
    r'images=\(8, 1, 1, 2\) must be': lambda: exp.log_prob(state, images[:, :1, :1], **given),
    r"images=dtype\('complex": lambda: exp.log_prob(state, images * 1j, **given),
    r'images=.nan or inf. must be': lambda: exp.log_prob(state, images * np.nan, **given),
    r'vector\[\[3\]\]=.* must be finite': lambda: exp.sample(state, 8, vector=one_nan),
    r'mask\[\[0\]\]=0 must be nonzero': lambda: exp.sample(state, 8, mask=nothing),
    r'label=\(8, 1\) must be': lambda: exp.sample(state, 8, label=np.zeros((8, 1), int)),
    r'label=3 must be classes, 0': lambda: exp.sample(state, 8, label=3),
    r'condition=\(8, 2, 6, 3\) must': lambda: exp.denoiser(state, condition=np.zeros((8, 2, 6, 3))),
    r'source=.vector. must be with': lambda: exp.bits_per_dim(state, split=of_arrays(images)),
    r'images=\(1, 4, 6, 2\) must': lambda: next(exp.fit(state, 1, of_arrays(images[:, :4]))),
    r"bound='ode' must|dequantization='trunc": lambda: exp.log_prob(
      state, images, bound='ode', **given
    ),
  }.items():
    with pytest.raises(ValueError, match=refused):
      call()


def test_networks_that_take_other_conditions_guide_no_one():
  takes = build.model(config_of()).takes
  assert not list(takes.differences(takes._replace(vector_size=0)))
  other = takes._replace(vector_size=5, condition_shape=(8, 6, 3))
  assert [name for name, *_ in takes.differences(other)] == ['vector_size', 'condition_shape']


def data_of(kind, **changes):
  config = default.get_config()
  with config.unlocked():
    config.data.update(dict(derive=kind) | changes)
  return config.data


def test_conditions_that_are_made_of_the_image():
  images = np.random.RandomState(0).randint(0, 17, (5, 8, 8, 1)).astype(np.uint8)
  fetch = of_arrays(images).fetch
  coarse = derived(data_of('low_resolution', condition_shape=(4, 2, 1)), fetch)(np.arange(5))
  by_hand = images.reshape(5, 4, 2, 2, 4, 1).mean(axis=(2, 4))
  np.testing.assert_allclose(coarse['condition'], by_hand)
  np.testing.assert_allclose(block_means(images, (8, 8)), images)
  hole = derived(data_of('inpainting', condition_shape=(8, 8, 1), masked=True), fetch)(np.arange(5))
  assert hole['valid'].sum() == 5 * 16 and hole['valid'][:, 2:6, 2:6].all()
  assert not hole['condition'][:, 2:6, 2:6].any()
  outside = ~hole['valid']
  np.testing.assert_array_equal(hole['condition'][outside], images[outside])


@pytest.mark.parametrize(
  ('kind', 'changes', 'message'),
  [
    ('blur', {}, r"derive='blur' must be '' or one of low_resolution, inpainting"),
    ('low_resolution', dict(condition_shape=(3, 4, 1)), r'condition_shape=\(3, 4, 1\) must be so'),
    ('low_resolution', {}, r'condition_shape=\(\) must be so many blocks'),
    ('inpainting', dict(condition_shape=(8, 8, 1)), r'must be the shape of the images'),
  ],
)
def test_conditions_that_cannot_be_made(kind, changes, message):
  with pytest.raises(ValueError, match=message):
    derived(data_of(kind, **changes), None)


def test_a_source_hands_on_all_that_it_has():
  batch = batch_of(3)
  source = of_arrays(batch['image'], label=batch['label'], condition=batch['condition'])
  assert set(source[1]) == {'image', 'label', 'condition'}
  assert isinstance(dataclasses.replace(source), Source)
  with pytest.raises(ValueError, match=r'condition=\(3, .* must be 2 rows'):
    of_arrays(batch['image'][:2], condition=batch['condition'])
