"""Random flips and turns of images, on devices."""

import functools

import jax
import jax.numpy as jnp


def augment(
  key_flip: jax.Array, key_rotate: jax.Array, images: jax.Array, flip: bool, rotate: bool
) -> tuple[jax.Array, jax.Array]:
  """Flips and turns images [B H W C] at random; returns them, and a flag [B], 1 for a changed one.

  `flip` mirrors left and right with probability one half; `rotate` then, with probability one half,
  turns by one, two or three quarters, each as likely (VDM's public code does both). Every example
  has one key of each kind.
  """
  flag = jnp.zeros(len(images), bool)
  if flip:
    flipped = jax.vmap(jax.random.bernoulli)(key_flip)
    images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    flag |= flipped
  if rotate:
    sixth = jax.vmap(lambda key: jax.random.randint(key, (), 0, 6))(key_rotate)
    quarters = jnp.maximum(sixth - 2, 0)  # none three times in six
    turns = [functools.partial(jnp.rot90, k=k) for k in range(4)]
    images = jax.vmap(lambda k, image: jax.lax.switch(k, turns, image))(quarters, images)
    flag |= quarters > 0
  return images, flag
