"""ADM's network: a U-Net that halves the image between its levels (arXiv 2105.05233)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from vdm.nn import checks, convolution, layers
from vdm.nn.conditioning import Conditioning, ScaleShift


class Block(nn.Module):
  """Applies a residual block, and perhaps attention: h, a skip or None, cond -> h, and h as a skip.

  GroupNorm, swish, conv; GroupNorm, times 1 + scale, plus shift, both of cond ("adaptive group
  norm", arXiv 2105.05233, section 3); swish, dropout, conv. Resampling, if any, is inside, before
  the first convolution and on the shortcut (BigGAN's, arXiv 1809.11096). The second convolution
  starts at zero, so that the block starts as its shortcut. It is a link of `blocks.chain`: with a
  skip, which is appended to the channels of h, it keeps none.
  """

  features: int
  dropout: float
  dtype: jnp.dtype
  train: bool
  num_heads: int = 0  # 0: no attention
  norm_groups: int = 0
  padding: str = 'zero'
  resample: Callable[[jax.Array], jax.Array] = lambda x: x

  @nn.compact
  def __call__(self, h, skip, cond):
    conv = functools.partial(convolution.Conv3, self.features, self.dtype, padding=self.padding)
    x = h if skip is None else jnp.concatenate([h, skip], axis=-1)
    h = nn.swish(layers.group_norm(x.shape[-1], self.dtype, 'norm_0', self.norm_groups)(x))
    h = conv(name='conv_0')(self.resample(h))
    h = layers.group_norm(self.features, self.dtype, 'norm_1', self.norm_groups)(h)
    h = nn.swish(ScaleShift(self.dtype, name='cond')(h, cond))
    h = layers.Dropout(self.dropout)(h, train=self.train)
    h = conv(kernel_init=nn.initializers.zeros, name='conv_1')(h)
    x = self.resample(x)
    if x.shape[-1] != self.features:
      x = layers.Dense(self.features, dtype=self.dtype, name='shortcut')(x)
    h += x
    if self.num_heads:
      h = layers.Attention(self.num_heads, self.dtype, self.norm_groups, name='attention')(h)
    return h, h if skip is None else None


class ADMUNet(nn.Module):
  """Implements ADM's U-Net (Dhariwal & Nichol 2021, arXiv 2105.05233), by default for ImageNet 64.

  Each level has `num_blocks` residual blocks on the way in and one more on the way out, where each
  reads also what one on the way in has written; residual blocks halve the image between levels (the
  mean of 2 x 2) and double it again (each pixel four times). The lowest level has attention between
  two more blocks. Space has one to three axes, and all of them are halved.

  For images the defaults, 1000 classes and 3 channels make 295,900,035 parameters. EDM's version
  (arXiv 2206.00364) has 768 fewer, for our null label has its own row; ADM's has 5,187 more than
  EDM's, since it also predicts a variance. The noise level's frequencies, and 1e-6 instead of 1e-5
  in the norms, are those of `VDMUNet`.

  There is no `scan_blocks`: within a level the first block, and on the way out most, read other
  numbers of channels than their neighbours, so that there are no long chains of equal blocks.

  Attributes:
    width: channels of a multiplier of 1, and size of the noise level's embedding; even.
    channel_multipliers: one per level, from the top.
    num_blocks: residual blocks per level on the way in.
    attention_resolutions: the sizes of the first spatial axis at the levels whose blocks have
      attention.
    head_width: channels per head; divides the channels wherever there is attention.
    dropout: rate in each residual block.
    norm_groups: as in `VDMUNet`.
    padding: as in `VDMUNet`.
    fit_size: appends zeros to spatial axes that the levels do not divide, and cuts what they become
      off the output; axes that are padded with zeros only.
    num_classes: 0 for a network without labels.
    embedding_size: E, for vectors [B, E]; see `Conditioning`. 0: the network takes none.
    dtype: of activations. Parameters and output are float32.
    augmentation_flag: appends a flag, 1 for an augmented image, to the noise level's embedding.
    residual: adds z to the output, as in `VDMUNet`.
    remat: the gradient computes each block's activations again instead of keeping them.
  """

  width: int = 192
  channel_multipliers: tuple[int, ...] = (1, 2, 3, 4)
  num_blocks: int = 3
  attention_resolutions: tuple[int, ...] = (32, 16, 8)
  head_width: int = 64
  dropout: float = 0.1
  norm_groups: int = 0
  padding: str = 'zero'
  fit_size: bool = False
  num_classes: int = 0
  embedding_size: int = 0
  dtype: jnp.dtype = jnp.float32
  augmentation_flag: bool = False
  residual: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, z, t, label=None, vector=None, field=None, flag=None, *, train):
    """Returns the raw output of the network; the arguments are those of `VDMUNet`."""
    checks.check_fields(self.width, self.num_blocks, self.dropout, self.num_classes)
    levels = len(self.channel_multipliers)
    checks.require_field(
      levels and min(self.channel_multipliers) >= 1,
      'channel_multipliers',
      self.channel_multipliers,
      'positive integers, one per level',
      '(1, 2, 3, 4)',
    )
    divisor, rule = 2 ** (levels - 1), (self.padding, self.fit_size)
    checks.check_image_shape('adm_unet', z.shape, divisor, 'channel_multipliers', *rule)

    def heads(channels):
      checks.check_head_width(self.head_width, channels)
      return channels // self.head_width

    def block(name, h, channels, skip=None, attention=False, **kwargs):
      num_heads = heads(channels) if attention else 0
      fields = (channels, self.dropout, self.dtype, train, num_heads, self.norm_groups)
      module = Block(*fields, self.padding, name=name, **kwargs)
      return run(module, h, skip, cond)

    def run(module, h, skip, cond):
      return module(h, skip, cond)[0]

    if self.remat:
      run = nn.remat(run)
    cond = Conditioning(
      self.width,
      self.num_classes,
      self.augmentation_flag,
      self.embedding_size,
      name='conditioning',
    )(t, label, vector, flag)
    channels = [self.width * multiplier for multiplier in self.channel_multipliers]
    h = layers.fit(layers.append_field(z, field), divisor)
    sizes = [h.shape[1] >> level for level in range(levels)]
    unknown = sorted(set(self.attention_resolutions) - set(sizes))
    checks.require_field(
      not unknown,
      'attention_resolutions',
      tuple(self.attention_resolutions),
      f'sizes of the first axis at the levels, {", ".join(map(str, sizes))}',
      f'{tuple(sizes[1:])}, or () for attention in the middle alone',
    )
    attention = [size in self.attention_resolutions for size in sizes]

    conv = functools.partial(convolution.Conv3, dtype=self.dtype, padding=self.padding)
    h = layers.read(functools.partial(conv, channels[0], name='conv_in'), h, self.dtype)
    skips = [h]
    for level in range(levels):
      if level:
        h = block(f'halve_{level}', h, channels[level - 1], resample=layers.halve)
        skips.append(h)
      for i in range(self.num_blocks):
        h = block(f'down_{level}_{i}', h, channels[level], attention=attention[level])
        skips.append(h)

    h = block('mid_0', h, channels[-1], attention=True)
    h = block('mid_1', h, channels[-1])

    for level in reversed(range(levels)):
      for i in range(self.num_blocks + 1):
        h = block(f'up_{level}_{i}', h, channels[level], skips.pop(), attention[level])
      if level:
        h = block(f'double_{level}', h, channels[level], resample=layers.double)

    h = nn.swish(layers.group_norm(channels[0], self.dtype, 'norm_out', self.norm_groups)(h))
    h = conv(z.shape[-1], kernel_init=nn.initializers.zeros, name='conv_out')(h)
    h = layers.crop(h.astype(jnp.float32), z.shape[1:-1])
    return h + z if self.residual else h
