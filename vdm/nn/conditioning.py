"""Noise level, label, vector and flag as one vector, and how it enters a network."""

import math

import jax.numpy as jnp
from flax import linen as nn

from vdm.nn.layers import Dense, spread


class ScaleShift(nn.Module):
  """Maps x [B, *space, C], cond [B, D] to x (1 + scale) + shift, both projections of cond.

  The gradients by scale and shift are sums over space (`layers.spread`).
  """

  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x, cond):
    dense = Dense(2 * x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name='dense')
    both = jnp.expand_dims(dense(cond), range(1, x.ndim - 1))
    scale, shift = (spread(a, x) for a in jnp.split(both, 2, axis=-1))
    return x * (1 + scale) + shift


def sinusoidal_embedding(t, size):
  """Returns sin, then cos, of 1000 t w_k, k = 0 .. size/2 - 1, for t [B] in [0, 1]: [B, size].

  w_k = 10000^(-k / (size/2 - 1)) falls from 1 to 1e-4.
  """
  k = jnp.arange(size // 2, dtype=jnp.float32)
  frequencies = jnp.exp(-math.log(10_000) / (size // 2 - 1) * k)
  angles = 1000 * t[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Conditioning(nn.Module):
  """Maps t, label and flag [B] and vector [B, E] to a conditioning vector [B, 4 width], float32.

  VDM's public code has a sinusoidal embedding of the noise level t, then twice Dense, swish. Our
  addition is what is added before the last swish. With `num_classes` it is the embedding of the
  label: labels -1 and `num_classes`, and no labels at all, are the null label, which has its own
  row in the table. With `embedding_size` E > 0 it is the projection of a vector of each example,
  such as another network's embedding: NaN, and no vectors at all, stand for its absence, for
  which a projection is learned. A network may have both.
  """

  width: int
  num_classes: int = 0
  augmentation_flag: bool = False
  embedding_size: int = 0

  @nn.compact
  def __call__(self, t, label=None, vector=None, flag=None):
    if label is not None and not self.num_classes:
      raise ValueError(
        'labels were given to a network with num_classes=0; set '
        'config.model.class_conditional=True, or pass label=None.'
      )
    if vector is not None and not self.embedding_size:
      raise ValueError(
        'vectors were given to a network with embedding_size=0; set config.data.embedding_size to '
        'their size, or pass vector=None.'
      )
    if flag is not None and not self.augmentation_flag:
      raise ValueError(
        'flag was given to a network with augmentation_flag=False; set '
        'config.model.augmentation_flag=True, or pass flag=None.'
      )
    t = jnp.asarray(t, jnp.float32)
    h = sinusoidal_embedding(t, self.width)
    if self.augmentation_flag:
      flag = jnp.zeros_like(t) if flag is None else jnp.asarray(flag, jnp.float32)
      h = jnp.concatenate([h, flag[:, None]], axis=-1)
    h = nn.swish(Dense(4 * self.width, name='dense_0')(h))
    h = Dense(4 * self.width, name='dense_1')(h)
    if self.num_classes:
      # The null label's row is the last, which is also where the index -1 leads.
      label = jnp.full(t.shape, -1) if label is None else label
      h += nn.Embed(
        self.num_classes + 1,
        4 * self.width,
        embedding_init=nn.initializers.normal(1.0),
        name='label',
      )(label)
    if self.embedding_size:
      vector = jnp.full((len(t), self.embedding_size), jnp.nan) if vector is None else vector
      if vector.shape != (len(t), self.embedding_size):
        raise ValueError(
          f'config.data.embedding_size={self.embedding_size} must be that of the embeddings, '
          f'whose shape is {vector.shape}.'
        )
      vector = jnp.asarray(vector, jnp.float32)
      null = self.param('null_embedding', nn.initializers.normal(1.0), (1, 4 * self.width))
      absent = jnp.isnan(vector).any(axis=-1, keepdims=True)
      vector = jnp.where(absent, 0, vector)  # before the product, whose gradient would be NaN
      projected = Dense(4 * self.width, use_bias=False, name='embedding')(vector)
      h += jnp.where(absent, null, projected)
    return nn.swish(h)
