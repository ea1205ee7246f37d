"""Times for the examples of one global batch, of an evaluation, and for the draws of each one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 256  # examples of an evaluation that share their strata, or up to twice as many


def stratified(
  key: Array, index: Int[Array, ' b'], batch_size: int | Int[Array, '']
) -> Float[Array, ' b']:
  """Returns t = (u + i / B) mod 1 with one u ~ U(0, 1) for the whole batch (VDM appendix I.1).

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


def block_of(
  index: Int[Array, ' b'], num_examples: int | Int[Array, '']
) -> tuple[Int[Array, ' b'], Int[Array, ' b'], Int[Array, ' b']]:
  """Returns the block of each example of an evaluation, its position there, and the block's size.

  Blocks are BLOCK consecutive examples each; the last one takes the rest, and has fewer than twice
  as many.
  """
  last = jnp.maximum(num_examples // BLOCK, 1) - 1
  number = jnp.minimum(index // BLOCK, last)
  return (
    number,
    index - BLOCK * number,
    jnp.where(number < last, BLOCK, num_examples - BLOCK * last),
  )


def stratified_in_blocks(
  key: Array, index: Int[Array, ' b'], num_examples: int | Int[Array, '']
) -> Float[Array, ' b']:
  """Returns times that are stratified over the examples of an evaluation, whatever its batches are.

  Blocks (`block_of`) are stratified each for itself, with a u of its own. So an example's time is a
  function of key, index and num_examples alone, each block is an independent estimate, and examples
  that are sorted, by class for instance, meet all times within a block of their like.

  Args:
    key: the same on every device.
    index: positions among all examples, integers in [0, num_examples), [B].
    num_examples: in the whole evaluation.

  Returns:
    t in [0, 1], [B] float32.
  """
  number, position, size = block_of(index, num_examples)

  def time_of(number, position, size):
    return stratified(jax.random.fold_in(key, number), position[None], size)[0]

  return jax.vmap(time_of)(number, position, size)


def in_own_strata(
  key: Array, index: Int[Array, ' b'], number: int | Int[Array, ''], count: int
) -> Float[Array, ' b']:
  """Returns the time of each example in stratum `number` of `count`, t = (number + u) / count.

  Each example has its own u ~ U(0, 1). Over the `count` strata its times are independent, and
  spread evenly over [0, 1]: a mean over them has less variance than one over as many free times.

  Args:
    key: of this stratum, the same on every device.
    index: numbers of the examples, [B].
    number: of the stratum, from 0.
    count: of all strata.

  Returns:
    t in [0, 1], [B] float32.
  """
  u = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)
  return (number + u) / count


def discretize(t: Float[Array, ' b'], num_timesteps: int) -> Float[Array, ' b']:
  """Returns the end of the step of length 1/T that holds t, (floor(tT) + 1) / T, in {1/T .. 1}."""
  return jnp.minimum(jnp.floor(t * num_timesteps) + 1, num_timesteps) / num_timesteps
