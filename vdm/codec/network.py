"""The network's part of the codec: one compiled program, the same bits on both sides."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdm import build
from vdm.diffusion.decoders import Decoder
from vdm.errors import confirm

FAR = 1e6  # of the network's units: the nearest value is the last one


class Network(NamedTuple):
  """Holds what a model says at T + 1 levels, for NumPy on the host.

  Attributes:
    log_snr: float64 [T + 1 ...], of float32 values; trailing axes broadcast against an image.
    predict: (z float32 [G *shape], level, conditions) -> x_hat float32 [G *shape].
    probabilities: z_0 float32 [*shape] of one image -> p(u | z_0) float32 [D K].
    values: the K values of the data in the network's units, float64 [K].
    shape: of an image.
    dtype: in which images are stored.
    nothing: conditions of a group that stand for none.
    given: conditions of a group -> the network at its own levels [T + 1 G ...]; None: all groups
      have the same.
  """

  log_snr: np.ndarray
  predict: Callable[[np.ndarray, int, Mapping[str, np.ndarray]], np.ndarray]
  probabilities: Callable[[np.ndarray], np.ndarray]
  values: np.ndarray
  shape: tuple[int, ...]
  dtype: np.dtype
  nothing: dict[str, np.ndarray]
  given: Callable[[Mapping[str, np.ndarray]], 'Network'] | None = None


def count_values(decoder: Decoder) -> int:
  """Returns K, where a decoder is of integers 0 .. K - 1."""
  return int(decoder.from_model(jnp.float32(FAR))) + 1


def of_model(model: build.Model, params: Any, num_timesteps: int, group_size: int) -> Network:
  """Returns a model at T + 1 levels, for groups of one size; it runs on one device.

  Raises:
    ValueError: its decoder is not one of integers.
  """
  decoder, shape = model.decoder_of(params), tuple(model.image_shape)
  fact, remedy = 'has densities and no probabilities', 'only discrete values can be coded'
  confirm(not decoder.is_density, 'config.decoder', decoder.units, fact, remedy)
  params = jax.device_put(params, jax.devices()[0])
  times = jnp.arange(num_timesteps + 1) / num_timesteps
  num_values = count_values(decoder)

  @jax.jit
  def predict(params, z, log_snr, conditions):
    if log_snr.ndim < z.ndim:  # that of all images
      log_snr = jnp.broadcast_to(log_snr, (len(z), *log_snr.shape))
    return model.denoiser(params, conditions)(z, log_snr).x

  @jax.jit
  def probabilities(params, z_0, log_snr):
    # each dimension as an example of its own: the decoder sums over dimensions
    rows = lambda a: jnp.broadcast_to(a, shape).reshape(-1, 1)
    z, level = rows(z_0), rows(log_snr) if log_snr.ndim else log_snr
    given = model.decoder_of(params)
    of_value = lambda value: given.log_prob(jnp.full(z.shape, value), z, level)
    return jnp.exp(jax.lax.map(of_value, jnp.arange(num_values))).T

  @jax.jit
  def levels_given(params, conditions):
    schedule = model.schedule(params, conditions)
    return jax.lax.map(lambda t: schedule(jnp.full(group_size, t)), times)

  nothing = model.takes.nothing(group_size, shape)

  def at(levels, of=None):
    end = levels[0, 0] if model.conditional_schedule else levels[0]  # that of all conditions

    def finite_predict(z, level, conditions):
      x_hat = np.asarray(predict(params, z, levels[level], dict(conditions)))
      if not np.isfinite(x_hat).all():
        raise FloatingPointError(f'x_hat at level {level} of {num_timesteps} is not finite')
      return x_hat

    return Network(
      log_snr=np.asarray(levels, np.float64),
      predict=finite_predict,
      probabilities=lambda z_0: np.asarray(probabilities(params, z_0, end)),
      values=np.asarray(decoder.to_model(jnp.arange(num_values)), np.float64),
      shape=shape,
      dtype=np.dtype(decoder.dtype),
      nothing={name: np.asarray(value) for name, value in nothing.items()},
      given=of,
    )

  if model.conditional_schedule:
    given = lambda conditions: at(levels_given(params, dict(conditions)))
    return at(levels_given(params, nothing), given)
  return at(jax.jit(lambda params: model.schedule(params)(times))(params))
