"""Samplers: one step from z_t to z_s, and one scan of it over a grid of log_snr."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm.gaussian import (
  Denoiser,
  Prediction,
  Schedule,
  expand_to,
  fold_in,
  posterior,
  standard_normal,
)

Step = Callable[[Array, Array, Prediction, Array, Array], Array]


def ancestral(
  keys: Array,
  z_t: Float[Array, 'b ...'],
  prediction: Prediction,
  log_snr_t: Float[Array, ' b'],
  log_snr_s: Float[Array, ' b'],
) -> Float[Array, 'b ...']:
  """z_s ~ q(z_s | z_t, x = x_hat) (VDM eq. 33): the model's own generative step."""
  mean, variance = posterior(z_t, prediction.x, log_snr_t, log_snr_s)
  noise = standard_normal(keys, z_t.shape[1:])
  return mean + expand_to(jnp.sqrt(variance), z_t) * noise


def time_grid(schedule: Schedule, num_steps: int) -> Float[Array, ' n']:
  """log_snr at t = 1, 1 - 1/n, ..., 0: the n + 1 ends of n equal steps, from noise to data."""
  return schedule((num_steps - jnp.arange(num_steps + 1)) / num_steps)


def sample(
  keys: Array,
  step: Step,
  denoiser: Denoiser,
  log_snrs: Float[Array, ' n'],
  shape: tuple[int, ...],
) -> Float[Array, 'b ...']:
  """Draws z_0 at the last of `log_snrs`, starting from N(0, I) at the first.

  Args:
    keys: one per example, [B]: an example depends on its own key alone.
    step: e.g. `ancestral`.
    denoiser: (z, log_snr) -> Prediction.
    log_snrs: increasing grid, noise to data.
    shape: of one example.

  Returns:
    z_0 [B, *shape]; z_0 / alpha_0 estimates x.
  """
  batch = keys.shape[0]
  key_start, key_steps = jax.vmap(jax.random.split, out_axes=1)(keys)

  def body(z, inputs):
    number, log_snr_t, log_snr_s = inputs
    log_snr_t, log_snr_s = (jnp.full((batch,), a) for a in (log_snr_t, log_snr_s))
    step_keys = fold_in(key_steps, jnp.full((batch,), number))
    return step(step_keys, z, denoiser(z, log_snr_t), log_snr_t, log_snr_s), None

  grid = (jnp.arange(len(log_snrs) - 1), log_snrs[:-1], log_snrs[1:])
  return jax.lax.scan(body, standard_normal(key_start, shape), grid)[0]
