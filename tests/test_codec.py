"""Bits-back coding: lossless, as long as the bound, and never a wrong picture without an error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('constriction')

from vdm import codec
from vdm.codec import chain, container, grid
from vdm.codec.message import LEAST, Message, keystream
from vdm.diffusion import elbo, gaussian, schedules, times
from vdm.system import files

exact = pytest.importorskip('benchmarks.codec')  # the model of a Gaussian field, in a checkout
exact_model, images, excess = exact.exact_model, exact.images, exact.excess
NUM_VALUES = exact.NUM_VALUES


def sigmoid(a):
  return 1 / (1 + np.exp(-a))


def test_the_grid_has_the_moments_of_the_chain():
  log_snr = np.array([8.0, 7.5, 2.0, -5.0])
  levels = grid.make(log_snr, 2.0)
  assert levels.ratio[0] ** 2 == pytest.approx(sigmoid(8.0))
  assert levels.std_q[0] ** 2 == pytest.approx(sigmoid(-8.0))
  for t in (1, 2, 3):
    s = t - 1
    assert np.prod(levels.ratio[: t + 1]) ** 2 == pytest.approx(sigmoid(log_snr[t]))
    variance = levels.ratio[t] ** 2 * sigmoid(-log_snr[s]) + levels.std_q[t] ** 2
    assert variance == pytest.approx(sigmoid(-log_snr[t]))  # of z_t given x
    z, x = jnp.array([[0.3]]), jnp.array([[-0.7]])
    ends = jnp.float32(log_snr[t])[None], jnp.float32(log_snr[s])[None]
    mean, variance = gaussian.posterior(z, x, *ends)
    assert levels.keep[t] * 0.3 - levels.gain[t] * 0.7 == pytest.approx(float(mean[0, 0]), rel=1e-5)
    assert levels.std_p[s] ** 2 == pytest.approx(float(variance[0]), rel=1e-5)
  assert levels.std_p[3] == 1
  assert np.allclose(np.minimum(levels.std_q, levels.std_p) / levels.cell, 2)


def initial(count):
  words = keystream(5, count=count)
  words[:1] |= np.uint32(2**31)
  return words


def test_a_message_is_a_stack():
  message = Message(initial)
  before, means, stds = message.bits, np.linspace(-0.5, 0.5, 300), np.full(300, 2.5)
  message.whiten(keystream(6, count=50))
  symbols = message.pop(13, means, stds)
  assert symbols.std() == pytest.approx(2.5, rel=0.2)
  wide = np.array([0, 14, -14, 15, -(10**6), 4 * 10**9] + [1] * 294)  # some beyond the window
  message.push_any(wide, 13, means, stds)
  probabilities = np.full((300, 4), 0.25, np.float32)
  message.push_values(np.arange(300) % 4, probabilities)
  message.settle()
  length = message.bits
  receiver = Message()
  receiver.put_below(message.words())
  assert (receiver.pop_values(probabilities) == np.arange(300) % 4).all()
  assert (receiver.pop_any(13, means, stds) == wide).all()
  receiver.push(symbols, 13, means, stds)
  receiver.whiten(keystream(6, count=50))
  words = receiver.words()
  assert (words[::-1] == initial(len(words))).all()
  assert length - before > 600  # two bits of each value
  entropy = 300 * (math.log2(2.5) + chain.GAUSSIAN_BITS)
  popped = Message(initial)
  popped.reach(60)
  popped.pop(13, means, stds)
  assert before - popped.bits == pytest.approx(entropy, rel=0.05)
  with pytest.raises(files.Damaged, match='none was drawn'):
    receiver.push(np.full(300, 14), 13, means, stds)
  short = Message()
  short.put_below(np.ones(LEAST, np.uint32))
  with pytest.raises(files.Damaged, match='ends before'):
    short.pop(13, means, stds)


@pytest.mark.parametrize('name', schedules.SCHEDULES)
def test_round_trip_under_every_schedule(name):
  extra = {'shifted_cosine': dict(image_size=32), 'learned_net': dict(num_hidden=8)}
  made = schedules.SCHEDULES[name](log_snr_min=-5.0, log_snr_max=6.0, **extra.get(name, {}))
  if isinstance(made, schedules.Learned):
    made = made.as_schedule(made.init())
  model, u = exact_model(made), images(11)
  blob = codec.compress(model, {}, u, codec.Settings(12, group_size=4, streams=2))
  decoded = codec.decompress(model, {}, blob)
  assert decoded.dtype == u.dtype and np.array_equal(decoded, u)


@pytest.mark.parametrize(
  'settings', [(1, 1), (7, 11, 1, 4.0), (7, 16, 1, 3.0, 9), (30, 2, 6)], ids=str
)
def test_round_trip_in_groups_and_streams(settings):
  settings, told = codec.Settings(*settings), []
  blob = codec.compress(exact_model(), {}, images(11), settings, tell=lambda *at: told.append(at))
  total = settings.num_timesteps * -(-11 // settings.group_size)
  assert told == [(done, total) for done in range(1, total + 1)]
  assert np.array_equal(codec.decompress(exact_model(), {}, blob), images(11))
  header = container.read(blob, 'it').header
  assert len(header['initial_words']) == settings.streams


def test_images_that_the_model_thinks_impossible_come_back(monkeypatch):
  u = images(4).copy()
  u[0], u[1], u[2] = 0, NUM_VALUES - 1, np.indices((8, 8)).sum(axis=0)[..., None] % 2 * 16
  for window in (chain.WINDOW_P, 0.5):  # and where most latents lie outside theirs
    monkeypatch.setattr(chain, 'WINDOW_P', window)
    blob = codec.compress(exact_model(), {}, u, codec.Settings(20, group_size=4))
    assert np.array_equal(codec.decompress(exact_model(), {}, blob), u)


def test_a_multivariate_schedule():
  shift = jnp.linspace(0, 1, 8).reshape(1, 8, 1, 1)

  def schedule(t):
    return (8 - 13 * t).reshape(-1, 1, 1, 1) - shift

  made = exact_model(schedule)
  model = made._replace(
    denoiser=lambda params, conditions=None: (
      lambda z, log_snr: gaussian.Prediction(0.1 * z * gaussian.alpha(log_snr), z)
    )
  )
  blob = codec.compress(model, {}, images(5), codec.Settings(10, group_size=3))
  assert np.array_equal(codec.decompress(model, {}, blob), images(5))


@pytest.mark.parametrize('num_timesteps', [50, pytest.param(200, marks=pytest.mark.slow)])
def test_the_net_length_is_the_bound(num_timesteps):
  over, deviation, _ = excess(640, num_timesteps=num_timesteps)
  assert deviation < 0.005
  assert abs(over) < 3 * deviation


def test_the_bound_is_that_of_the_model():
  """The closed form of this benchmark against the bound that training minimises."""
  u, steps = jnp.asarray(images(256)), 20
  model = exact_model()

  @jax.jit
  def of_draw(key):
    keys = jax.random.split(key, 3)
    t = times.stratified(keys[0], jnp.arange(len(u)), len(u))
    noise = [jax.random.normal(key, u.shape) for key in keys[1:]]
    terms = elbo.variational_bound(
      model.denoiser({}), exact.LINEAR, model.decoder, model.weighting, u, t, *noise, steps
    )
    return (terms.recon + terms.prior + terms.diffusion.elbo).mean() / (64 * math.log(2))

  draws = jax.lax.map(of_draw, jax.random.split(jax.random.key(0), 200))
  error = float(draws.std()) / math.sqrt(len(draws))
  assert float(draws.mean()) == pytest.approx(exact.bound(256, steps), abs=4 * error)
  assert error < 0.003 * exact.bound(256, steps)


def test_trap_a_wide_grid_gives_absurd_values():
  with exact.trapped('one wide grid'):
    over, _, _ = excess(128, num_timesteps=50)
  assert over > 1


@pytest.mark.slow
def test_trap_noise_is_copied_from_level_to_level():
  """The order of dimensions is one cure, and whitening the better one: it needs both to be off."""
  found = {}
  for names in ((), ('no whitening',), ('no whitening', 'no permutation')):
    with exact.trapped(*names):
      found[names], deviation, _ = excess(100, num_timesteps=50, group_size=1)
  assert found['no whitening', 'no permutation'] > found['no whitening',] + 0.03
  assert abs(found[()]) < 3 * deviation


def test_trap_the_shift_of_the_mean_is_passed_on():
  with exact.trapped('no whitening'):
    over, deviation, _ = excess(640, num_timesteps=50)
  assert over > 4 * deviation


def test_trap_narrow_cells_cost_initial_bits():
  """Two levels of a group are out at once: a cell of an eighth costs three bits of each, twice."""
  few, many = (excess(64, num_timesteps=20, cells=cells)[2] for cells in (2.0, 16.0))
  assert many - few == pytest.approx(6, abs=0.1)


def test_groups_come_before_their_damage_at_no_cost():
  """A prefix of the file is a prefix of the images, and all records are one message's words."""
  u, settings = images(60), codec.Settings(10, group_size=8, streams=2)
  blob = codec.compress(exact_model(), {}, u, settings)
  file = container.read(blob, 'it')
  words = sum(len(record.words) for record in file.records.values())
  spent = file.header['net_bits'] + 32 * sum(file.header['initial_words'])
  assert abs(32 * words - spent) < 64 * settings.streams
  counts = []
  for cut in np.linspace(blob.find(b'}\n') + 10, len(blob) - 1, 6).astype(int):
    with pytest.raises(codec.Incomplete, match=r'of its 60 images are recovered') as caught:
      codec.decompress(exact_model(), {}, blob[:cut])
    found = caught.value
    assert np.array_equal(found.index, np.arange(len(found.index)))
    assert np.array_equal(found.images, u[: len(found.index)])
    counts.append(len(found.index))
  assert len(set(counts)) > 4 and counts[2] >= 16  # of 32 in the first stream
