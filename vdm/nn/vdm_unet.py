"""VDM's network: a U-Net with no down-sampling (arXiv 2107.00630, appendix B; public code)."""

import functools
import math

import jax.numpy as jnp
from flax import linen as nn

from vdm.nn import blocks, checks, convolution, layers
from vdm.nn.conditioning import Conditioning

MOST_POSITIONS = 2**14  # whose attention takes 1 GiB per example and head, several times


class ResBlock(nn.Module):
  """Applies a residual block: x [B, *space, C], cond [B, D] -> [B, *space, features].

  GroupNorm, swish, conv; + projection of cond; GroupNorm, swish, dropout, conv. The projection and
  the second convolution start at zero, so that the block starts as its shortcut.
  """

  features: int
  dropout: float
  dtype: jnp.dtype
  norm_groups: int = 0
  padding: str = 'zero'

  @nn.compact
  def __call__(self, x, cond, *, train):
    zeros = nn.initializers.zeros
    h = nn.swish(layers.group_norm(x.shape[-1], self.dtype, 'norm_0', self.norm_groups)(x))
    conv = functools.partial(convolution.Conv3, self.features, self.dtype, padding=self.padding)
    h = conv(name='conv_0')(h)
    shift = layers.Dense(
      self.features, use_bias=False, kernel_init=zeros, dtype=self.dtype, name='cond'
    )(cond)
    h += layers.spread(jnp.expand_dims(shift, range(1, h.ndim - 1)), h)
    h = nn.swish(layers.group_norm(self.features, self.dtype, 'norm_1', self.norm_groups)(h))
    h = layers.Dropout(self.dropout)(h, train=train)
    h = conv(kernel_init=zeros, name='conv_1')(h)
    if x.shape[-1] != self.features:
      x = layers.Dense(self.features, dtype=self.dtype, name='shortcut')(x)
    return x + h


class Block(nn.Module):
  """Applies a residual block to h and a skip, if any, and perhaps attention, in `blocks.chain`."""

  residual: ResBlock
  attention: layers.Attention | None
  train: bool

  def __call__(self, h, skip, cond):
    x = h if skip is None else jnp.concatenate([h, skip], axis=-1)
    h = self.residual(x, cond, train=self.train)
    h = h if self.attention is None else self.attention(h)
    return h, h if skip is None else None  # kept as a skip on the way in


class VDMUNet(nn.Module):
  """Implements VDM's network, the function of the public code (arXiv 2107.00630, appendix B).

  It is the same at the published widths, 128 and 256; narrower ones have 32 groups with
  norm_groups=32.

  The layers are conv; `num_blocks` residual blocks; block, attention, block; `num_blocks` + 1
  blocks, each of which also reads one of the earlier outputs, the last first; GroupNorm, swish,
  conv. All are at full resolution, for one to three spatial axes of any size, with MOST_POSITIONS
  at most, for attention is over all.

  Attributes:
    width: channels of every activation; even, and a multiple of `num_heads`.
    num_blocks: residual blocks on the way in; one more on the way out.
    attention: attention after every block, not only in the middle.
    num_heads: heads of each attention; VDM has one.
    fourier_exponents: sin and cos of 2 pi 2^n z for each n are appended to z; may be empty.
    dropout: rate in each residual block.
    norm_groups: groups of channels in every norm; 0: `vdm.nn.layers.auto_groups`.
    padding: 'zero', or 'periodic' where both ends of space are neighbours; or one for each axis, as
      in 'zero,periodic'.
    num_classes: 0 for a network without labels.
    embedding_size: E, for vectors [B, E]; see `Conditioning`. 0: the network takes none.
    dtype: of activations. Parameters and output are float32.
    augmentation_flag: one more scalar conditioning input, `flag`, 1 where the image was augmented.
      The published checkpoints all have it.
    residual: adds z to the output. With eps as output the network starts as eps_hat = z, VDM's
      choice; leave it out for an output that is not near z where noise dominates.
    scan_blocks: the blocks in and out are two loops, each compiled once whatever the number, over
      stacked parameters (`blocks.stack` of those without; `init` draws others); the same function.
    remat: the gradient computes each block's activations again instead of keeping them.
  """

  width: int = 128
  num_blocks: int = 32
  attention: bool = False
  num_heads: int = 1
  fourier_exponents: tuple[int, ...] = (6, 7)
  dropout: float = 0.1
  norm_groups: int = 0
  padding: str = 'zero'
  num_classes: int = 0
  embedding_size: int = 0
  dtype: jnp.dtype = jnp.float32
  augmentation_flag: bool = False
  residual: bool = True
  scan_blocks: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, z, t, label=None, vector=None, field=None, flag=None, *, train):
    """Returns the raw output of the network.

    Args:
      z: [B, *space, C] float32, the noisy examples.
      t: [B] float32, the noise level (log_snr_max - log_snr) / (log_snr_max - log_snr_min).
      label: [B] int32; -1 or `num_classes`: no label. None: no labels at all.
      vector: [B, E] float32, with `embedding_size` only; NaN: no vector. None: none at all.
      field: [B, *coarse, F] float32, appended to what the first convolution reads, after it was
        repeated to the shape of z if it is coarser by whole factors. None: there is none.
      flag: [B], with `augmentation_flag` only; None: zeros.
      train: whether dropout is on; it draws from the rng stream 'dropout'.

    Returns:
      [B, *space, C] float32.
    """
    checks.check_fields(self.width, self.num_blocks, self.dropout, self.num_classes)
    checks.check_heads(self.num_heads, self.width)
    checks.check_axes('vdm_unet', z.shape)
    positions = math.prod(z.shape[1:-1])
    if positions > MOST_POSITIONS:
      raise ValueError(
        f'config.data.image_shape={z.shape[1:]} has {positions:,} positions, and vdm_unet attends '
        f'over all of them: at most {MOST_POSITIONS:,}; adm_unet and uvit halve the array first, '
        'as in --config=configs/my_arrays.py:large.'
      )

    def residual(name):
      fields = (self.width, self.dropout, self.dtype, self.norm_groups, self.padding)
      return ResBlock(*fields, name=name)

    def attention(name):
      return layers.Attention(self.num_heads, self.dtype, self.norm_groups, name=name)

    def block(name):
      return Block(
        residual(name), attention(f'{name}_attention') if self.attention else None, train
      )

    cond = Conditioning(
      self.width,
      self.num_classes,
      self.augmentation_flag,
      self.embedding_size,
      name='conditioning',
    )(t, label, vector, flag)
    conv = functools.partial(convolution.Conv3, dtype=self.dtype, padding=self.padding)
    h = layers.append_field(layers.fourier_features(z, self.fourier_exponents), field)
    h = layers.read(functools.partial(conv, self.width, name='conv_in'), h, self.dtype)

    chain = functools.partial(blocks.chain, block, scan=self.scan_blocks, remat=self.remat)
    first = h
    h, skips = chain('down_*', self.num_blocks, h, None, cond)
    h = residual('mid_0')(h, cond, train=train)
    h = attention('mid_attention')(h)
    h = residual('mid_1')(h, cond, train=train)
    h, _ = chain('up_*', self.num_blocks + 1, h, blocks.last_first(first, skips), cond)

    h = nn.swish(layers.group_norm(self.width, self.dtype, 'norm_out', self.norm_groups)(h))
    h = conv(z.shape[-1], kernel_init=nn.initializers.zeros, name='conv_out')(h)
    h = h.astype(jnp.float32)
    return h + z if self.residual else h
