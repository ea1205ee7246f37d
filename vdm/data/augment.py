"""Random flips and turns of images, on devices."""

import functools

import jax
import jax.numpy as jnp


def augment(
  key_flip: jax.Array,
  key_rotate: jax.Array,
  pictures: dict[str, jax.Array],
  flip: bool,
  rotate: bool,
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Flips and turns arrays [B H W C] at random; returns them, and a flag [B], 1 for a changed one.

  All arrays of an example, such as an image and the field that it is conditioned on, are changed
  alike. `flip` mirrors left and right with probability one half; `rotate` then, with probability
  one half, turns by one, two or three quarters, each as likely (VDM's public code does both). Every
  example has one key of each kind.
  """
  flag = jnp.zeros(key_flip.shape, bool)
  if flip:
    flipped = jax.vmap(jax.random.bernoulli)(key_flip)
    mirror = lambda array: jnp.where(flipped[:, None, None, None], array[:, :, ::-1], array)
    pictures = jax.tree.map(mirror, pictures)
    flag |= flipped
  if rotate:
    sixth = jax.vmap(lambda key: jax.random.randint(key, (), 0, 6))(key_rotate)
    quarters = jnp.maximum(sixth - 2, 0)  # none three times in six
    turns = [functools.partial(jnp.rot90, k=k) for k in range(4)]
    turn = jax.vmap(lambda k, array: jax.lax.switch(k, turns, array))
    pictures = jax.tree.map(lambda array: turn(quarters, array), pictures)
    flag |= quarters > 0
  return pictures, flag
