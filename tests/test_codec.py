"""Bits-back coding: lossless, as long as the bound, and never a wrong picture without an error."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('constriction')

from vdm import build, codec
from vdm.codec import chain, container, grid
from vdm.codec.message import LEAST, Message, keystream
from vdm.data.gaussian_field import GaussianField
from vdm.diffusion import decoders, gaussian, schedules
from vdm.system import files

FIELD = GaussianField((8, 8), exponent=-2.0, std=0.5)
NUM_VALUES = 17
SHAPE = (8, 8, 1)


LINEAR = schedules.linear(-5.0, 8.0)


def exact_model(schedule=LINEAR, decoder=None):
  """Returns the model of a Gaussian field, whose denoiser is exact; it has no parameters."""
  return build.Model(
    init=None,
    schedule=lambda params: schedule,
    denoiser=lambda params, conditions=None: FIELD.denoiser(0.0, 1.0),
    weighting=None,
    image_shape=SHAPE,
    decoder=decoder or decoders.discrete(NUM_VALUES),
  )


@functools.cache
def images(count):
  drawn, _ = FIELD.draw(np.random.RandomState(0), count)
  return np.asarray(decoders.from_grid(drawn, NUM_VALUES), np.uint8)


def sigmoid(a):
  return 1 / (1 + np.exp(-a))


def bound(u, num_timesteps):
  """Returns the discrete-time bound of these images in bits/dim, its expectations in closed form.

  Mode k of the image is m; z has alpha m + sigma eps, and x_hat = v z alpha with v = Q / (alpha^2 Q
  + sigma^2). So E |m - x_hat|^2 = (1 - alpha^2 v)^2 m^2 + alpha^2 v^2 sigma^2.
  """
  x = np.asarray(decoders.to_grid(u, NUM_VALUES), np.float64)[..., 0]
  square = np.abs(np.fft.fftn(x, axes=(1, 2), norm='ortho')) ** 2
  log_snr = np.asarray(LINEAR(jnp.arange(num_timesteps + 1) / num_timesteps))
  log_snr = log_snr.astype(np.float64)
  snr, nats = np.exp(log_snr), 0.0
  for s in range(num_timesteps):
    a2, s2 = sigmoid(log_snr[s + 1]), sigmoid(-log_snr[s + 1])
    v = FIELD.power / (a2 * FIELD.power + s2)
    error = (1 - a2 * v) ** 2 * square + a2 * v**2 * s2
    nats += (snr[s] - snr[s + 1]) / 2 * error.sum()
  a2, s2 = sigmoid(log_snr[-1]), sigmoid(-log_snr[-1])
  nats += 0.5 * (a2 * square + s2 - np.log(s2) - 1).sum()
  noise = np.random.RandomState(1).standard_normal((20, *u.shape)).astype(np.float32)
  loss = jax.jit(decoders.discrete(NUM_VALUES).loss)
  nats += np.mean([loss(u, eps, jnp.float32(8.0)).sum() for eps in noise])
  return nats / (u.size * math.log(2))


def excess(u, **settings):
  """Returns the net length over the bound, less 1, its deviation, and the file's header.

  The length of one coding is the bound and, at each step, noise of the deviation sqrt(2 KL).
  """
  settings = codec.Settings(**{'group_size': 64} | settings)
  header = container.read(codec.compress(exact_model(), {}, u, settings), 'it').header
  exact = bound(u, settings.num_timesteps)
  deviation = math.sqrt(2 / (exact * math.log(2) * u.size))
  return header['net_bits'] / u.size / exact - 1, deviation, header


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
  over, deviation, _ = excess(images(640), num_timesteps=num_timesteps)
  assert deviation < 0.005
  assert abs(over) < 3 * deviation


def one_grid(monkeypatch):
  monkeypatch.setattr(chain, 'WINDOW_Q', 1000.0)
  monkeypatch.setattr(chain, 'WINDOW_P', 1000.0)


def no_whitening(monkeypatch):
  monkeypatch.setattr(chain, 'whitening', lambda *names: np.zeros(names[-1], np.uint32))


def no_permutation(monkeypatch):
  monkeypatch.setattr(chain, 'permutation', lambda *names: np.arange(names[-1]))


def test_trap_a_wide_grid_gives_absurd_values(monkeypatch):
  one_grid(monkeypatch)
  over, _, _ = excess(images(128), num_timesteps=50)
  assert over > 1


@pytest.mark.slow
def test_trap_noise_is_copied_from_level_to_level(monkeypatch):
  """The order of dimensions is one cure, and whitening the better one: it needs both to be off."""
  u, found = images(100), {}
  for name, traps in (
    ('both', [no_whitening, no_permutation]),
    ('white', [no_whitening]),
    ('none', []),
  ):
    with monkeypatch.context() as patch:
      for trap in traps:
        trap(patch)
      found[name], deviation, _ = excess(u, num_timesteps=50, group_size=1)
  assert found['both'] > found['white'] + 0.03
  assert abs(found['none']) < 3 * deviation


def test_trap_the_shift_of_the_mean_is_passed_on(monkeypatch):
  no_whitening(monkeypatch)
  over, deviation, _ = excess(images(640), num_timesteps=50)
  assert over > 4 * deviation


def test_trap_narrow_cells_cost_initial_bits():
  """Two levels of a group are out at once: a cell of an eighth costs three bits of each, twice."""
  each = [excess(images(64), num_timesteps=20, cells=cells)[2] for cells in (2.0, 16.0)]
  few, many = (32 * header['initial_words'][0] / images(64).size for header in each)
  assert many - few == pytest.approx(6, abs=0.1)


def test_groups_come_before_their_damage_at_no_cost():
  """A prefix of the file is a prefix of the images, and all records are one message's words."""
  u, settings = images(60), codec.Settings(10, group_size=8, streams=2)
  blob = codec.compress(exact_model(), {}, u, settings)
  file = container.read(blob, 'it')
  words = sum(len(record.words) for record in file.records.values())
  spent = file.header['net_bits'] + 32 * sum(file.header['initial_words'])
  assert abs(32 * words - spent) < 64 * settings.streams
  for cut in np.linspace(blob.find(b'}\n') + 10, len(blob) - 1, 6).astype(int):
    with pytest.raises(codec.Incomplete, match=r'of its 60 images are recovered') as caught:
      codec.decompress(exact_model(), {}, blob[:cut])
    found = caught.value
    assert np.array_equal(found.index, np.arange(len(found.index)))
    assert np.array_equal(found.images, u[: len(found.index)])
