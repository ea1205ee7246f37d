"""Decoders p(u | z_0): the likelihood of the data given the latent with the least noise.

A decoder is all that knows the data's units: u, as it is stored, and x, in which the network sees
it. Loss, likelihood, samplers and plots ask a `Decoder` and never which one it is.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Shaped

from vdm.diffusion.gaussian import (
  alpha,
  count_dims,
  expand_to,
  kl_to_standard_normal,
  sigma,
  sum_over_dims,
)

# The discrete decoder's softmax runs over this many grid values either side of the nearest one ...
RADIUS = 3
# ... while the values left out weigh less than e^-40 in all: ((RADIUS + 1/2)^2 - 1/4) d^2 / 2 > 40
WINDOW_SPACING = float(np.sqrt(80 / (RADIUS * (RADIUS + 1))))

# (keys [B], u [B ...], log_snr_max, valid=None) -> y = z_0 / alpha_0 drawn from q(y | u), and
# log q(y | u) [B] over the valid dimensions
Dequantization = Callable[..., tuple[Array, Array]]


class Decoder(NamedTuple):
  """Knows the units of the data, and p(u | z_0); a function such as `discrete` makes it.

  z_0 = alpha_0 x + sigma_0 eps is the latent at log_snr_max, which is a scalar or, for a
  multivariate schedule, an array that broadcasts against z_0. Likelihoods are in nats, summed over
  dimensions: all, or those that are `valid`, an array that broadcasts against u.
  """

  to_model: Callable[[Shaped[Array, '...']], Float[Array, '...']]  # u -> x, elementwise
  from_model: Callable[[Float[Array, '...']], Shaped[Array, '...']]  # x -> the nearest u
  # (u [B ...], z_0 [B ...], log_snr_max, valid=None) -> log p(u | z_0) [B]
  log_prob: Callable[..., Array]
  # (u [B ...], eps [B ...], log_snr_max, valid=None) -> -log p(u | z_0) [B] of the z_0 made with
  # eps, without the rounding of z_0
  loss: Callable[..., Array]
  # (keys [B], z_0 [B ...], log_snr_max) -> u drawn from p(u | z_0)
  sample: Callable[[Array, Array, Array], Array]
  dequantizations: Mapping[str, Dequantization]  # how a density in x becomes one of u, by name
  to_pixels: Callable[[np.ndarray], np.ndarray]  # u -> uint8, to look at; NumPy
  dtype: np.dtype  # in which u is stored
  units: str  # of the data, in words: '256 values'
  # the likelihood's: 'bits/dim' of probabilities, 'nats/dim' of densities per unit of the data
  unit: str = 'bits/dim'
  init: Callable[[], Any] = dict  # () -> parameters, {} for most
  # parameters -> the decoder that has them; None: it has none
  bind: Callable[[Any], 'Decoder'] | None = None

  def mode(self, z_0: Float[Array, 'b ...'], log_snr_max: Array) -> Shaped[Array, 'b ...']:
    """Returns the u of the greatest p(u | z_0)."""
    return self.from_model(z_0 / expand_to(alpha(log_snr_max), z_0))

  def with_params(self, params: Any) -> 'Decoder':
    """Returns the decoder that has the parameters of a model, {'network', 'schedule', ...}."""
    return self if self.bind is None else self.bind(params['decoder'])

  @property
  def metric(self) -> str:
    """Returns the name of the likelihood per dimension in logs, cards and TensorBoard."""
    return self.unit.replace('/', '_per_')

  @property
  def suffix(self) -> str:
    """Returns the end of the names of its terms: 'recon_bpd'."""
    return 'npd' if self.is_density else 'bpd'

  @property
  def is_density(self) -> bool:
    """Returns whether likelihoods are densities, which depend on the data's unit."""
    return self.unit == 'nats/dim'

  @property
  def nats_per_unit(self) -> float:
    """Returns the nats of one bit, or of one nat, as is the likelihood's unit."""
    return 1.0 if self.is_density else math.log(2)

  def per_dim(self, nats, num_dims):
    """Converts the nats of whole examples to the likelihood's unit."""
    return nats / num_dims if self.is_density else bits_per_dim(nats, num_dims)


def discrete(num_values: int) -> Decoder:
  """Returns the decoder of integers 0 .. K - 1, such as pixels (VDM eq. 12): a softmax over K.

  Each dimension has a softmax of its own, with x_k the centre of cell k of [-1, 1]:

    logit_k = -1/2 (z_0 / alpha_0 - x_k)^2 e^log_snr_max.

  Where the grid is wide against the noise the softmax runs over the few nearest values, which is
  the full one to float32 rounding; elsewhere it runs over all K.

  Args:
    num_values: K.
  """

  def centres(u):
    return to_grid(u, num_values)

  def log_prob(u, z_0, log_snr_max, valid=None):
    y = z_0 / expand_to(alpha(log_snr_max), z_0)
    offset = (y - centres(u)) * expand_to(jnp.exp(log_snr_max / 2), z_0)
    return _discrete_log_prob(u.astype(jnp.int32), offset, log_snr_max, num_values, valid)

  def loss(u, eps, log_snr_max, valid=None):
    return -_discrete_log_prob(u.astype(jnp.int32), eps, log_snr_max, num_values, valid)

  def sample(keys, z_0, log_snr_max):
    y = (z_0 / expand_to(alpha(log_snr_max), z_0))[..., None]
    scale = expand_to(jnp.exp(log_snr_max / 2), z_0)[..., None]
    values = jnp.arange(num_values).reshape((1,) * z_0.ndim + (-1,))
    logits = -0.5 * ((y - centres(values)) * scale) ** 2
    return jax.vmap(jax.random.categorical)(keys, logits)

  def from_model(x):
    return from_grid(x, num_values)

  dequantizations = {
    'uniform': functools.partial(uniform, num_values=num_values),
    'truncated_normal': functools.partial(truncated_normal, num_values=num_values),
  }
  return Decoder(
    to_model=centres,
    from_model=from_model,
    log_prob=log_prob,
    loss=loss,
    sample=sample,
    dequantizations=dequantizations,
    to_pixels=lambda u: np.round(u * (255 / (num_values - 1))).astype(np.uint8),
    dtype=np.min_scalar_type(num_values - 1),
    units=f'{num_values} values',
  )


def to_grid(u: Integer[Array | np.ndarray, '...'], num_values: int) -> Float[Array, '...']:
  """Maps integers 0 .. K - 1 to the centres of K equal cells of [-1, 1], 2 (u + 1/2) / K - 1."""
  return (2 * jnp.asarray(u, jnp.float32) + 1) / num_values - 1


def from_grid(x: Float[Array | np.ndarray, '...'], num_values: int) -> Int[Array, '...']:
  """Returns the nearest of the K integers, which is the mode of the decoder."""
  u = jnp.round(((x + 1) * num_values - 1) / 2)
  return jnp.clip(u, 0, num_values - 1).astype(jnp.int32)


def _discrete_log_prob(u, offset, log_snr_max, num_values, valid):
  """Returns log p(u | z_0), given how far z_0 / alpha_0 is from u, in units of its noise: eps."""
  spacing = 2 / num_values * expand_to(jnp.exp(log_snr_max / 2), offset)

  def log_softmax(steps):
    """Returns -offset^2 / 2 - log sum_k exp(-(offset - steps_k spacing)^2 / 2), elementwise."""
    logits = [-0.5 * (offset - step * spacing) ** 2 for step in steps]
    return -0.5 * offset**2 - _logsumexp(logits)

  def window():
    nearest = jnp.round(offset / spacing).astype(u.dtype)
    last = num_values - 1
    centre = jnp.clip(nearest + u, RADIUS, last - RADIUS) - u
    return log_softmax([jax.lax.stop_gradient(centre + k) for k in range(-RADIUS, RADIUS + 1)])

  @jax.checkpoint  # [B ..., K] is never kept: the compiler fuses it into its sum, in both passes
  def full():
    k = jax.lax.broadcasted_iota(u.dtype, (*u.shape, num_values), u.ndim) - u[..., None]
    logits = -0.5 * (offset[..., None] - k * spacing[..., None]) ** 2
    return -0.5 * offset**2 - jax.nn.logsumexp(logits, axis=-1)

  if num_values <= 2 * RADIUS + 1:
    return sum_over_dims(full(), valid)
  return sum_over_dims(jax.lax.cond(spacing.min() > WINDOW_SPACING, window, full), valid)


def _logsumexp(terms):
  largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, terms))
  return largest + jnp.log(sum(jnp.exp(term - largest) for term in terms))


def prior_loss(
  x: Float[Array, 'b ...'],
  log_snr_min: Float[Array, '...'],
  valid: Shaped[Array, 'b ...'] | None = None,
) -> Float[Array, ' b']:
  """Returns KL(q(z_1 | x) || N(0, I)) in nats, over `valid` dims (VDM eq. 11, first term)."""
  mean = expand_to(alpha(log_snr_min), x) * x
  return kl_to_standard_normal(mean, expand_to(sigma(log_snr_min) ** 2, x), valid)


def bits_per_dim(
  nats: Float[Array, '...'], num_dims: int | Float[Array, '...']
) -> Float[Array, '...']:
  """Converts the nats of a whole example to bits per dimension, nats / (D ln 2)."""
  return nats / (num_dims * np.log(2))


def uniform(
  keys: Array,
  u: Integer[Array, 'b ...'],
  log_snr_max: Float[Array, '...'],
  valid: Shaped[Array, 'b ...'] | None = None,
  *,
  num_values: int,
) -> tuple[Float[Array, 'b ...'], Float[Array, ' b']]:
  """Draws y uniformly in the cell of u, of width 2 / K; returns y and log q(y | u) [B] in nats."""
  noise = jax.vmap(lambda key: jax.random.uniform(key, u.shape[1:], minval=-1.0))(keys)
  log_q = count_dims(u.shape[1:], valid) * math.log(num_values / 2)
  return to_grid(u, num_values) + noise / num_values, jnp.full(len(u), log_q)


def truncated_normal(
  keys: Array,
  u: Integer[Array, 'b ...'],
  log_snr_max: Float[Array, '...'],
  valid: Shaped[Array, 'b ...'] | None = None,
  *,
  num_values: int,
) -> tuple[Float[Array, 'b ...'], Float[Array, ' b']]:
  """Draws y ~ N(centre, e^-log_snr_max) truncated to the cell of u; returns y and log q(y | u) [B].

  That is the noise that z_0 / alpha_0 has in training (Zheng et al. 2023, arXiv 2305.03935, section
  4.2), so that the model is asked about what it knows. Where it is wide against the cell this is
  uniform dequantisation. log q is in nats.
  """
  std = jnp.exp(-log_snr_max / 2)  # sigma_0 / alpha_0
  bound = 1 / (num_values * std)  # half a cell
  if bound.ndim:  # of a multivariate schedule
    bound = jnp.broadcast_to(bound, u.shape)
  draw = lambda key, bound: jax.random.truncated_normal(key, -bound, bound, u.shape[1:])
  eps = jax.vmap(draw, (0, 0 if bound.ndim else None))(keys, bound)
  log_mass = jnp.log(jax.scipy.special.erf(bound / math.sqrt(2)))
  log_q = -0.5 * eps**2 - 0.5 * math.log(2 * math.pi) - jnp.log(std) - log_mass
  return to_grid(u, num_values) + std * eps, sum_over_dims(log_q, valid)
