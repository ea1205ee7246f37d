"""Times for the examples of one global batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def stratified(
  key: Array, index: Int[Array, ' b'], batch_size: int | Int[Array, '']
) -> Float[Array, ' b']:
  """t = (u + i / B) mod 1 with one u ~ U(0, 1) for the whole batch (VDM appendix I.1).

  Each t is uniform, and one falls into each of the B strata, whatever part of the batch a device
  or a microbatch holds.

  Args:
    key: the same on every device.
    index: positions in the global batch, integers in [0, batch_size), [B].
    batch_size: B, of the global batch.

  Returns:
    t in [0, 1], [B] float32.
  """
  key_turn, key_offset = jax.random.split(key)
  # u in two parts, so that the strata are integers: a float-step grid loses or doubles some.
  turn = jax.random.randint(key_turn, (), 0, batch_size)
  stratum = (index + turn) % batch_size
  return (stratum + jax.random.uniform(key_offset)) / batch_size


def discretize(t: Float[Array, ' b'], num_timesteps: int) -> Float[Array, ' b']:
  """The end of the step of length 1/T that holds t: (floor(tT) + 1) / T, in {1/T .. 1}."""
  return jnp.minimum(jnp.floor(t * num_timesteps) + 1, num_timesteps) / num_timesteps
