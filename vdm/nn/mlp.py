"""A residual perceptron for two-dimensional examples, and images if a U-Net is too expensive."""

import functools

import jax.numpy as jnp
from flax import linen as nn

from vdm.nn import checks, layers
from vdm.nn.conditioning import Conditioning


class MLP(nn.Module):
  """Applies residual swish blocks to vectors, or to images as vectors, conditioned as `VDMUNet`.

  It is ours, in the place of the plain perceptron in the 2D example of VDM's public code. To the
  output of the last layer it adds each element's own features, weighted by another: what an element
  says of its own noise need not pass through layers that are narrower than z.

  Attributes:
    width: units of every hidden layer; even.
    num_blocks: residual blocks of two layers.
    fourier_exponents: sin and cos of 2 pi 2^n z for each n are appended to z; may be empty.
    dropout: rate in each block.
    num_classes: 0 for a network without labels.
    embedding_size: E, for vectors [B, E]; see `Conditioning`. 0: the network takes none.
    dtype: of activations. Parameters and output are float32.
    residual: adds z to the output, as in `VDMUNet`.
  """

  width: int = 128
  num_blocks: int = 2
  fourier_exponents: tuple[int, ...] = ()
  dropout: float = 0.0
  num_classes: int = 0
  embedding_size: int = 0
  dtype: jnp.dtype = jnp.float32
  residual: bool = True

  @nn.compact
  def __call__(self, z, t, label=None, vector=None, field=None, flag=None, *, train):
    """Returns the raw output; the shapes are as in `VDMUNet`, but z, field and output are [B ...].

    The first layer reads the field, of any size, beside z.
    """
    checks.check_fields(self.width, self.num_blocks, self.dropout, self.num_classes)
    if z.ndim < 2:
      raise ValueError(f'mlp takes vectors [B, D] or images, but z has shape {z.shape}.')
    shape = z.shape
    z = z.reshape(shape[0], -1)
    zeros = nn.initializers.zeros
    cond = Conditioning(
      self.width, self.num_classes, embedding_size=self.embedding_size, name='conditioning'
    )(t, label, vector, flag)
    own = layers.fourier_features(z[..., None], self.fourier_exponents)  # [B, D, F] of each element
    h = own.reshape(len(z), -1)
    if field is not None:
      h = jnp.concatenate([h, jnp.asarray(field, jnp.float32).reshape(len(z), -1)], axis=-1)
    h = layers.read(functools.partial(layers.Dense, self.width, name='dense_in'), h, self.dtype)
    for i in range(self.num_blocks):
      u = nn.LayerNorm(dtype=self.dtype, name=f'norm_{i}')(h)
      u = layers.Dense(self.width, dtype=self.dtype, name=f'dense_{i}_0')(nn.swish(u))
      u += layers.Dense(
        self.width, use_bias=False, kernel_init=zeros, dtype=self.dtype, name=f'cond_{i}'
      )(cond)
      u = layers.Dropout(self.dropout)(nn.swish(u), train=train)
      h += layers.Dense(self.width, dtype=self.dtype, kernel_init=zeros, name=f'dense_{i}_1')(u)
    h = nn.swish(nn.LayerNorm(dtype=self.dtype, name='norm_out')(h))
    gate = layers.Dense(own[0].size, dtype=self.dtype, kernel_init=zeros, name='gate')(h)
    h = layers.Dense(z.shape[-1], dtype=self.dtype, kernel_init=zeros, name='dense_out')(h)
    h = h.astype(jnp.float32) + (own * gate.astype(jnp.float32).reshape(own.shape)).sum(axis=-1)
    return (h + z if self.residual else h).reshape(shape)
