"""What the public VDM code, google-research/vdm, gets wrong, and ours must not: one test for each.

What other files test at length is here in a line or two.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from vdm.configs import default

from vdm import build
from vdm.build.optimizer import kernels
from vdm.diffusion import decoders, gaussian, times
from vdm.diffusion.elbo import variational_bound
from vdm.diffusion.schedules import SCHEDULES
from vdm.diffusion.weightings import WEIGHTINGS
from vdm.nn import NETWORKS

ENDS = dict(log_snr_min=-5.0, log_snr_max=13.3)


def bound(schedule, num_timesteps):
  """The bound of the denoiser that sees no data, on random images [3, 4, 4, 1] of 5 values."""
  u = jax.random.randint(jax.random.key(0), (3, 4, 4, 1), 0, 5)
  eps_recon, eps = jax.random.normal(jax.random.key(1), (2, *u.shape))
  denoiser = lambda z, log_snr: gaussian.Prediction(jnp.zeros_like(z), z)
  elbo = WEIGHTINGS['elbo']()
  t = jnp.array([0.0, 0.4, 0.9])
  return variational_bound(
    denoiser, schedule, decoders.discrete(5), elbo, u, t, eps_recon, eps, num_timesteps
  )


@pytest.mark.parametrize('num_timesteps', [0, 10])
def test_fixed_schedule_runs(num_timesteps):
  """Public: TypeError, gamma(0.) of the fixed schedule being a Python float."""
  terms = jax.tree.leaves(jax.jit(lambda: bound(SCHEDULES['linear'](**ENDS), num_timesteps))())
  assert all(np.isfinite(term).all() for term in terms)


def test_no_discrete_step_begins_before_zero():
  """Public: t = 0 makes s = -1/T, which is outside of the schedule."""
  assert times.discretize(jnp.zeros(1), 10) == jnp.float32(0.1)


@pytest.mark.parametrize('size', [49, 98, 103, 107, 196, 197])
def test_stratified_times_have_b_values_for_every_b(size):
  """Public: the float-step grid has one value too many, and the shapes clash."""
  t = times.stratified(jax.random.key(0), jnp.arange(size), size)
  np.testing.assert_array_equal(np.sort(np.floor(np.asarray(t) * size)), np.arange(size))


def test_times_are_stratified_over_all_devices():
  """Public: each device draws its own grid."""
  parts = [times.stratified(jax.random.key(0), jnp.arange(32)[i::8], 32) for i in range(8)]
  np.testing.assert_allclose(np.diff(np.sort(np.concatenate(parts))), 1 / 32, atol=1e-6)


def test_one_channel_images_count_once():
  """Public: the decoder repeats grey images to three channels, tripling the reconstruction loss."""
  u = jax.random.randint(jax.random.key(0), (2, 6, 6, 1), 0, 256)
  eps = jax.random.normal(jax.random.key(1), u.shape)

  def loss(channels):
    copies = (1, 1, 1, channels)
    noise = jnp.tile(eps, copies)
    return decoders.discrete(256).loss(jnp.tile(u, copies), noise, jnp.float32(9.0))

  one, three = jax.jit(lambda: (loss(1), loss(3)))()
  np.testing.assert_allclose(3 * one, three, rtol=1e-5)


def test_decoder_keeps_no_value_per_vocabulary_entry():
  """Public: one-hot codes and log-probabilities of all 256 values, in float32."""
  u = jnp.zeros((8, 32, 32, 3), jnp.int32)
  loss = lambda log_snr: decoders.discrete(256).loss(u, jnp.float32(u), log_snr).sum()
  kept = jax.eval_shape(lambda log_snr: jax.vjp(loss, log_snr)[1], jnp.float32(13.3))
  assert sum(a.size for a in jax.tree.leaves(kept)) < 64 * u.size


@pytest.mark.parametrize('name', ['learned_endpoints', 'learned_net'])
def test_weight_decay_spares_schedule_and_norms(name):
  """Public: all but biases decays, the learned end points and the scales of GroupNorm with it."""
  config = default.get_config('debug')
  config.schedule.name = name
  params = jax.eval_shape(build.model(config).init, jax.random.key(0))
  mask = jax.tree_util.tree_leaves_with_path(kernels(params))
  decayed = {jax.tree_util.keystr(path, simple=True, separator='/') for path, on in mask if on}
  assert 'network/conv_in/kernel' in decayed
  assert all(path.startswith('network/') and path.endswith('/kernel') for path in decayed)


class Echo(nn.Module):
  """A network that gives back the noise level it is told."""

  num_classes: int = 0
  dtype: jnp.dtype = jnp.float32
  residual: bool = False

  @nn.compact
  def __call__(self, z, t, label=None, *, train):
    return jnp.zeros_like(z) + gaussian.expand_to(t, z)


@pytest.mark.parametrize('condition_on', ['live', 'configured'])
def test_noise_level_that_the_network_sees_stays_in_0_1(condition_on, monkeypatch):
  """Public: normalised by the configured end points, which the learned ones leave behind."""
  monkeypatch.setitem(NETWORKS, 'echo', Echo)
  config = default.get_config()
  with config.unlocked():
    config.model = dict(
      name='echo', output='eps', class_conditional=False, dtype='float32', condition_on=condition_on
    )
  model = build.model(config)
  slope = 2 * (config.schedule.log_snr_max - config.schedule.log_snr_min)
  params = {'network': {}, 'schedule': {'log_snr_max': jnp.float32(10.0), 'slope': slope}}
  t = jnp.array([0.0, 0.5, 1.0])
  log_snr = model.schedule(params)(t)
  level = model.denoiser(params)(jnp.zeros((3, *model.image_shape)), log_snr).eps[:, 0, 0, 0]
  if condition_on == 'live':
    np.testing.assert_allclose(level, t, atol=1e-6)
  else:  # as the public code does, for its checkpoints
    ends = config.schedule.log_snr_max, config.schedule.log_snr_min
    np.testing.assert_allclose(
      level, (ends[0] - log_snr) / (ends[0] - ends[1]), rtol=1e-5, atol=1e-6
    )
    assert level[2] > 1.5


def test_learned_net_keeps_its_end_points():
  """Public: its ends move by 2.1 where its kernels are 1000 and 300 times what they start as."""
  learned = SCHEDULES['learned_net'](**ENDS, num_hidden=64)
  params = learned.init()
  params['interior'] |= {'a': params['interior']['a'] + 300, 'b': params['interior']['b'] + 1000}
  ends = jax.jit(learned.as_schedule(params))(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(ends, [13.3, -5.0], rtol=1e-6)
