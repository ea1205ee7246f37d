"""The second-order loss, and runs that start from another's averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vdm.configs import default, digits

import vdm
from vdm import build
from vdm.diffusion import elbo
from vdm.diffusion.gaussian import Prediction, alpha, expand_to, q_sample, sigma
from vdm.diffusion.schedules import linear
from vdm.nn import NETWORKS
from vdm.system import parallel
from vdm.training import loop
from vdm.training.step import loss, make_train_step, recipe
from vdm.workdir import release
from vdm.workdir.load import read_run

VARIANCE = np.array([4.0, 1.0, 0.25, 0.01], np.float32)
ENDS = dict(log_snr_min=-5.0, log_snr_max=5.0)


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def gain(log_snr):
  """Returns the G of eps_hat = G z that is exact for x ~ N(0, diag VARIANCE)."""
  log_snr = expand_to(log_snr, jnp.zeros((1, 4)))
  return sigma(log_snr) / (alpha(log_snr) ** 2 * VARIANCE + sigma(log_snr) ** 2)


def drawn(size, seed=0):
  """Returns x, eps, log_snr and signs of `size` examples."""
  keys = jax.random.split(jax.random.key(seed), 4)
  x, eps = (jax.random.normal(k, (size, 4)) for k in keys[:2])
  log_snr = jax.random.uniform(keys[2], (size,), minval=-5.0, maxval=5.0)
  return x * VARIANCE**0.5, eps, log_snr, jax.random.rademacher(keys[3], (size, 4), jnp.float32)


def test_the_loss_is_the_square_of_what_the_exact_trace_leaves():
  """eps_hat = G z has a diagonal Jacobian, whose trace one probe of signs gives exactly."""
  x, eps, log_snr, signs = drawn(64)
  z = q_sample(x, eps, log_snr)
  eps_hat, found = elbo.second_order(lambda z: gain(log_snr) * z, z, eps, log_snr, signs)
  error = ((gain(log_snr) * z - eps) ** 2).sum(axis=1)
  want = (4 - sigma(log_snr) * gain(log_snr).sum(axis=1) - error) ** 2 / 4
  np.testing.assert_allclose(eps_hat, gain(log_snr) * z, rtol=1e-6)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


def test_the_error_of_the_exact_denoiser_is_what_its_divergence_says():
  """E[|eps_hat - eps|^2] = D - sigma tr, level by level; and so the gradient there is zero.

  The loss is the square of something of mean 0 whose scale does not depend on the trace: by a
  factor on it, the mean over examples is least at 1.
  """
  x, eps, log_snr, signs = drawn(400_000)
  log_snr = jnp.round(log_snr / 2.5) * 2.5  # five levels
  z = q_sample(x, eps, log_snr)
  left = 4 - sigma(log_snr) * gain(log_snr).sum(axis=1)
  error = ((gain(log_snr) * z - eps) ** 2).sum(axis=1)
  for level in np.unique(log_snr):
    chosen = np.asarray(log_snr) == level
    gap = np.asarray(left - error)[chosen]
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(chosen.sum())

  def loss(factor):  # on the Jacobian alone: the prediction at z is what it was
    predict = lambda a: gain(log_snr) * (z + factor * (a - z))
    return elbo.second_order(predict, z, eps, log_snr, signs)[1]

  slopes = jax.jvp(loss, (1.0,), (1.0,))[1]
  assert abs(slopes.mean()) < 4 * slopes.std() / np.sqrt(len(slopes))
  assert loss(0.8).mean() > loss(1.0).mean() < loss(1.2).mean()


def test_it_moves_the_divergence_alone():
  """The error is a constant to it: an offset of eps_hat, without a divergence, has no gradient."""
  x, eps, log_snr, signs = drawn(16)
  z = q_sample(x, eps, log_snr)

  def loss(offset, factor):
    predict = lambda a: factor * gain(log_snr) * a + offset
    return elbo.second_order(predict, z, eps, log_snr, signs)[1].mean()

  by_offset, by_factor = jax.grad(loss, argnums=(0, 1))(0.1, 1.0)
  assert by_offset == 0.0 and abs(by_factor) > 0.01


def test_dimensions_that_are_not_valid_have_no_part_in_it():
  x, eps, log_snr, signs = drawn(16)
  valid = jnp.array([True, True, True, False])
  z = q_sample(x, eps, log_snr)
  mixed = jnp.eye(4).at[0, 3].set(9.0)  # what is not valid feeds the others

  def of(z, eps, signs, valid=None, by=mixed):
    return elbo.second_order(lambda z: z @ by.T, z, eps, log_snr, signs, valid)[1]

  found = of(z, eps, signs, jnp.broadcast_to(valid, z.shape))
  other = of(z, eps.at[:, 3].set(1e3), -signs, jnp.broadcast_to(valid, z.shape))
  np.testing.assert_allclose(found, other, rtol=1e-5)
  error = ((z @ mixed.T - eps)[:, :3] ** 2).sum(axis=1)
  np.testing.assert_allclose(found, (3 - 3 * sigma(log_snr) - error) ** 2 / 3, rtol=1e-4)


def test_the_bound_is_what_it_is_without():
  x, eps, log_snr, signs = drawn(32)
  denoiser = lambda z, log_snr: Prediction(z, 0.3 * z)
  t = (5 - log_snr) / 10
  args = denoiser, linear(**ENDS), lambda a: 2.0 * jnp.ones_like(a), x, t, eps
  plain, both = elbo.diffusion_loss(*args), elbo.diffusion_loss(*args, signs=signs)
  assert plain.second is None
  jax.tree.map(np.testing.assert_array_equal, plain, both._replace(second=None))
  z = q_sample(x, eps, linear(**ENDS)(t))
  gap = elbo.second_order(lambda z: 0.3 * z, z, eps, linear(**ENDS)(t), signs)[1]
  np.testing.assert_allclose(both.second, 0.5 * 2.0 * 10 * gap, rtol=1e-4)


def config_of(**leaves):
  config = digits.get_config('debug')
  with config.unlocked():
    config.update_from_flattened_dict({'optimizer.warmup_steps': 0, 'eval.max_images': 8} | leaves)
  return config


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_every_network_is_trained_by_it(name):
  """The gradient of a gradient, with dropout, is finite and is not zero."""
  leaves = dict(default.SMALL_NETWORKS[name], name=name)
  config = digits.get_config('debug')
  with config.unlocked():
    kept = ('output', 'class_conditional', 'condition_on', 'dtype')
    config.model = {leaf: config.model[leaf] for leaf in kept} | leaves
    config.data.image_shape = (16, 16, 1)  # dit's patches
    config.train.second_order = 0.1
  index = np.arange(8, dtype=np.int32)
  image = np.random.default_rng(0).integers(0, 17, (8, 16, 16, 1)).astype(np.uint8)
  batch = jax.tree.map(jnp.asarray, {'image': image, 'label': 0 * index, 'index': index})
  model = build.model(config)
  state = jax.jit(build.init_state(config, model))()
  settings = recipe(config, model)
  noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state.params))))
  # away from layers that start at zero, behind which there would be no gradient
  nudged = lambda a: a + 0.02 * jax.random.normal(next(noise), a.shape, a.dtype)
  params = jax.tree.map(nudged, state.params)
  zeros, (key, key_dropout) = jnp.zeros(8), jax.random.split(jax.random.key(2))

  def second(params):
    out = loss(settings, params, (zeros, zeros), state.adaptive, batch, key, key_dropout)
    return out[1][0].scalars['second_order']

  value, gradient = jax.jit(jax.value_and_grad(second))(params)
  norm = float(optax.tree.norm(gradient))
  assert 0 < value < np.inf and 0 < norm < np.inf


@pytest.mark.slow
def test_a_run_starts_from_the_averages_of_another_or_of_a_release(tmp_path):
  first = config_of()
  assert loop.train(first, tmp_path / 'first') == 0
  averages = read_run(first, tmp_path / 'first').state.averages['ema']
  leaves = {'train.second_order': 0.1, 'train.start_from': str(tmp_path / 'first')}
  again = config_of(**leaves, **{'model.dropout': 0.3, 'optimizer.learning_rate': 1e-9})
  start = vdm.Experiment(again).init()
  for tree in (start.params, start.averages['ema']):
    jax.tree.map(np.testing.assert_array_equal, tree, averages)
  assert int(start.step) == 0
  assert loop.train(again, tmp_path / 'again') == 0
  after = read_run(again, tmp_path / 'again').state
  assert int(after.step) == 4
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, averages)
  assert release.run(read_run(first, tmp_path / 'first'), out=tmp_path / 'released') == 0
  stacked = config_of(
    **leaves | {'train.start_from': str(tmp_path / 'released'), 'model.scan_blocks': 'on'}
  )
  params = vdm.Experiment(stacked).init().params['network']
  assert any('*' in name for name in params)
  kernel = averages['network']['down_0']['conv_0']['kernel']
  np.testing.assert_allclose(params['down_*']['conv_0']['kernel'][0], kernel, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('leaf', 'value'),
  [('model.output', 'v'), ('schedule.log_snr_max', 7.0), ('schedule.name', 'learned_endpoints')],
)
def test_a_run_of_another_meaning_is_no_start(leaf, value, tmp_path):
  assert loop.train(config_of(), tmp_path / 'first') == 0
  config = config_of(**{'train.start_from': str(tmp_path / 'first'), leaf: value})
  with pytest.raises(ValueError, match=rf"start_from='.*first' must be a run with config\.{leaf}="):
    loop.train(config, tmp_path / 'second')
  assert not (tmp_path / 'second').exists()


def test_a_run_of_other_parameters_beside_the_network_is_no_start(tmp_path):
  exp = vdm.Experiment('gaussian_fields:debug')
  exp.save(exp.init(), tmp_path)
  leaves = {'train.start_from': str(tmp_path), 'decoder.learned_std': True}
  with pytest.raises(ValueError, match=r'a run with config\.decoder\.learned_std=True, not'):
    vdm.Experiment('gaussian_fields:debug', leaves).init()


def test_microbatches_draw_the_same_signs():
  """A step that is taken by parts is the step in a piece."""
  states = {}
  for parts in (1, 2):
    config = config_of(
      **{'train.second_order': 0.1, 'train.microbatches': parts, 'model.dropout': 0.0}
    )
    model = build.model(config)
    index = np.arange(8, dtype=np.int32)
    image = np.random.default_rng(0).integers(0, 17, (8, 8, 8, 1)).astype(np.uint8)
    batch = {'image': image, 'label': index, 'index': index}
    state = parallel.initial_state(parallel.make_mesh(), build.init_state(config, model))
    states[parts] = jax.jit(make_train_step(config, model))(state, batch)[1].scalars
  for name in ('second_order', 'loss', 'grad_norm'):
    np.testing.assert_allclose(states[1][name], states[2][name], rtol=2e-3)
