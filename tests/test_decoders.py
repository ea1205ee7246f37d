import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm.diffusion import decoders
from vdm.diffusion.gaussian import alpha, sigma


def exact_log_prob(u, z_0, log_snr_max, num_values):
  """The softmax over all K values in float64, one sub-pixel at a time."""
  grid = 2 * (np.arange(num_values) + 0.5) / num_values - 1
  x_hat = np.float64(z_0) * np.sqrt(1 + np.exp(-log_snr_max))
  logits = -0.5 * (x_hat[..., None] - grid) ** 2 * np.exp(log_snr_max)
  logits -= logits.max(axis=-1, keepdims=True)
  log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  picked = np.take_along_axis(log_probs, np.asarray(u)[..., None], axis=-1)[..., 0]
  return picked.reshape(len(u), -1).sum(axis=1)


def noisy(key, shape, log_snr_max, num_values):
  key_u, key_eps = jax.random.split(key)
  u = jax.random.randint(key_u, shape, 0, num_values)
  eps = jax.random.normal(key_eps, shape)
  z_0 = alpha(log_snr_max) * decoders.to_grid(u, num_values) + sigma(log_snr_max) * eps
  return u, z_0


@pytest.mark.parametrize('num_values', [2, 17, 32, 256])
@pytest.mark.parametrize('log_snr_max', [-3.0, 2.0, 6.0, 8.0, 10.0, 11.5, 13.3])
def test_decoder_equals_the_full_softmax(num_values, log_snr_max, key):
  """Windowed or not, on both sides of the switch: within 1e-6 bits/dim."""
  shape = (4, 5, 3, 2)
  u, z_0 = noisy(key, shape, jnp.float32(log_snr_max), num_values)
  got = jax.jit(decoders.discrete(num_values).log_prob)(u, z_0, jnp.float32(log_snr_max))
  exact = exact_log_prob(u, z_0, log_snr_max, num_values)
  # float32 rounding of z_0 itself, times its leverage, is what remains
  leverage = 3e-7 * np.exp(log_snr_max / 2) * 4 * 30
  np.testing.assert_allclose(got, exact, atol=leverage + 1e-4, rtol=1e-5)


@pytest.mark.parametrize('shape', [(28, 20, 1), (9, 7, 4), (1, 1, 3), (5,)])
@pytest.mark.parametrize('num_values', [4, 17, 256])
@pytest.mark.parametrize('log_snr_max', [3.0, 13.3])
def test_probabilities_of_a_sub_pixel_sum_to_one(shape, num_values, log_snr_max, key):
  """Any channels and non-square images: no sub-pixel is counted twice (or three times)."""
  _, z_0 = noisy(key, (1, *shape), jnp.float32(log_snr_max), num_values)
  every = jnp.broadcast_to(
    jnp.arange(num_values).reshape(-1, *(1 for _ in shape)), (num_values, *shape)
  )
  log_prob, level = decoders.discrete(num_values).log_prob, jnp.float32(log_snr_max)
  each_pixel = jax.vmap(
    lambda u, z: jax.vmap(lambda v: log_prob(v[None, None], z[None, None], level)[0])(u),
    (1, 0),
  )(every.reshape(num_values, -1), z_0.reshape(-1))
  np.testing.assert_allclose(np.exp(each_pixel).sum(axis=1), 1, rtol=2e-3)
  whole = log_prob(every[:1], z_0, level)
  np.testing.assert_allclose(whole[0], each_pixel[:, 0].sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', [(28, 20, 1), (9, 7, 4)])
@pytest.mark.parametrize('num_values', [17, 32])
def test_no_information_costs_log2_of_the_number_of_values(shape, num_values, key):
  u = jax.random.randint(key, (2, *shape), 0, num_values)
  eps = jax.random.normal(key, u.shape)
  nats = decoders.discrete(num_values).loss(u, eps, jnp.float32(-80.0))
  bits = decoders.bits_per_dim(nats, int(np.prod(shape)))
  np.testing.assert_allclose(bits, np.log2(num_values), rtol=1e-6)


@pytest.mark.parametrize('log_snr_max', [6.0, 13.3])
def test_gradient_at_the_end_point_is_the_derivative(log_snr_max, key):
  """A learned end point gets the right gradient through either branch."""
  u = jax.random.randint(key, (2, 6, 6, 3), 0, 256)
  eps = jax.random.normal(key, u.shape)

  def loss(log_snr):
    return decoders.discrete(256).loss(u, eps, log_snr).sum()

  def exact(log_snr):
    a, s = 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))
    z_0 = a * (2 * (np.float64(u) + 0.5) / 256 - 1) + s * np.float64(eps)
    return -exact_log_prob(u, z_0, log_snr, 256).sum()

  slope = (exact(log_snr_max + 1e-5) - exact(log_snr_max - 1e-5)) / 2e-5
  np.testing.assert_allclose(jax.grad(loss)(jnp.float32(log_snr_max)), slope, rtol=1e-3)


def test_reconstruction_at_the_published_end_point(key):
  """0.0099 to 0.0106 bits/dim at log_snr 13.3: half the spacing of the grid is 3.02 sigma."""
  u = jax.random.randint(key, (16, 32, 32, 3), 0, 256)
  nats = decoders.discrete(256).loss(u, jax.random.normal(key, u.shape), jnp.float32(13.3))
  assert 0.0098 < decoders.bits_per_dim(nats, 3072).mean() < 0.0108


@pytest.mark.parametrize('num_values', [2, 17, 256])
def test_grid_round_trip_and_extent(num_values):
  u = jnp.arange(num_values)
  x = decoders.to_grid(u, num_values)
  np.testing.assert_array_equal(decoders.from_grid(x, num_values), u)
  np.testing.assert_allclose([x[0], x[-1]], [1 / num_values - 1, 1 - 1 / num_values], rtol=1e-6)
  np.testing.assert_array_equal(
    decoders.from_grid(jnp.array([-3.0, 3.0]), num_values), [0, num_values - 1]
  )


def test_prior_term_vanishes_with_the_signal():
  x = jnp.ones((2, 3, 3, 1))
  np.testing.assert_allclose(decoders.prior_loss(x, jnp.float32(-40.0)), 0, atol=1e-5)
  # alpha^2 = sigma^2 = 1/2: 1/2 sum(1/2 x^2 + 1/2 - log 1/2 - 1)
  np.testing.assert_allclose(decoders.prior_loss(x, jnp.float32(0.0)), 9 * np.log(2) / 2, rtol=1e-6)


def test_samples_of_the_decoder_have_its_probabilities_and_its_mode(key):
  """At two levels: where several values are likely, and where one is."""
  decoder = decoders.discrete(5)
  z_0 = jnp.broadcast_to(jnp.array([[-0.7, 0.1, 0.75]]), (4000, 3))
  for level in (jnp.float32(2.0), jnp.float32(12.0)):
    u = decoder.sample(jax.random.split(key, 4000), z_0, level)
    every = jnp.arange(5)[:, None]
    for column in range(3):
      probs = np.exp(decoder.log_prob(every, jnp.full((5, 1), z_0[0, column]), level))
      found = np.bincount(u[:, column], minlength=5) / 4000
      np.testing.assert_allclose(found, probs, atol=4 * 0.5 / np.sqrt(4000))
      assert decoder.mode(z_0, level)[0, column] == probs.argmax()


def test_what_is_shown_and_stored_of_integers():
  decoder = decoders.discrete(17)
  np.testing.assert_array_equal(decoder.to_pixels(np.array([0, 8, 16])), [0, 128, 255])
  assert decoder.dtype == np.uint8 and decoders.discrete(300).dtype == np.uint16


def test_a_level_for_each_dimension_is_that_of_each_alone(key):
  """Of a multivariate schedule the end point is [1 ...]: each dimension has its own level."""
  decoder, levels = decoders.discrete(17), jnp.array([[2.0, 6.0, 9.0, 12.0]])
  u = jax.random.randint(key, (3, 4), 0, 17)
  eps = jax.random.normal(key, u.shape)
  alone = [decoder.loss(u[:, i : i + 1], eps[:, i : i + 1], levels[0, i]) for i in range(4)]
  np.testing.assert_allclose(decoder.loss(u, eps, levels), sum(alone), rtol=1e-5)
