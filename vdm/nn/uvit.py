"""U-ViT: convolutional levels around a transformer (arXiv 2301.11093; residual: 2410.19324)."""

import functools
import math

import jax.numpy as jnp
from flax import linen as nn

from vdm.nn import adm_unet, blocks, checks, convolution, layers
from vdm.nn.attention import softmax_attention
from vdm.nn.conditioning import Conditioning, ScaleShift


class TransformerBlock(nn.Module):
  """Applies self-attention, then a perceptron four times as wide, residual, to h [B, *space, C].

  Each begins with a LayerNorm, times 1 + scale, plus shift, both of cond and zero at first, as in
  DiT (arXiv 2212.09748), and ends in a projection that starts at zero. Queries and keys are
  RMS-normalised (arXiv 2302.05442): in bfloat16, logits that grow without bound are what ends the
  training of large transformers. Dropout is on the hidden units. It is a link of `blocks.chain`.
  """

  head_width: int
  dropout: float
  dtype: jnp.dtype
  train: bool

  @nn.compact
  def __call__(self, h, _, cond):
    batch, *sizes, channels = h.shape
    dense = functools.partial(layers.Dense, dtype=self.dtype)
    zeros = nn.initializers.zeros

    def norm(x, name):
      x = nn.LayerNorm(use_scale=False, use_bias=False, dtype=self.dtype, name=f'norm_{name}')(x)
      return ScaleShift(self.dtype, zeros, name=f'cond_{name}')(x, cond)

    u = norm(h, 'attention')
    q, k, v = (
      dense(channels, name=name)(u).reshape(batch, math.prod(sizes), -1, self.head_width)
      for name in ('query', 'key', 'value')
    )
    q = nn.RMSNorm(dtype=self.dtype, name='norm_query')(q)
    k = nn.RMSNorm(dtype=self.dtype, name='norm_key')(k)
    u = softmax_attention(q, k, v).reshape(h.shape)
    h += dense(channels, kernel_init=zeros, name='out')(u)

    u = nn.gelu(dense(4 * channels, name='hidden')(norm(h, 'mlp')))
    u = layers.Dropout(self.dropout)(u, train=self.train)
    return h + dense(channels, kernel_init=zeros, name='mlp_out')(u), None


class UViT(nn.Module):
  """Implements simple diffusion's U-ViT (Hoogeboom et al. 2023, arXiv 2301.11093), and SiD2's.

  Patches become channels; each level of residual blocks halves the image (the mean of 2 x 2); the
  transformer works on what is left, 16 x 16 as a rule, and takes most of the parameters; on the way
  up each position is taken four times. The block's details are ours where the papers leave them
  open. For 512 x 512 images the defaults with patch_size=4, transformer_width=2048,
  transformer_depth=36, head_width=128 and 1000 classes have 2,152,439,856 parameters.

  Space has one to three axes. Along a periodic one the transformer is not told where it is, so that
  a shift of z by whole positions of the transformer shifts the output.

  Attributes:
    widths: channels of the levels, from the top.
    num_blocks: residual blocks per level, on the way in and on the way out.
    transformer_width: channels of the transformer.
    transformer_depth: blocks of the transformer.
    head_width: channels per head; divides `transformer_width`.
    patch_size: patches of this size become channels at the input, and pixels at the output.
    skip: 'concatenate': each block on the way out reads also the output of one on the way in.
      'residual': what a level makes, the last before it halves the image, is added once, where
      the image has doubled again (SiD2, arXiv 2410.19324), which keeps less in memory.
    conditioning_width: size of the noise level's embedding; all layers see four times as many
      numbers. Even.
    dropout: rate in the transformer only.
    norm_groups: as in `VDMUNet`.
    padding: as in `VDMUNet`.
    fit_size: as in `ADMUNet`.
    num_classes: 0 for a network without labels.
    embedding_size: E, for vectors [B, E]; see `Conditioning`. 0: the network takes none.
    dtype: of activations. Parameters and output are float32.
    augmentation_flag: appends a flag, 1 for an augmented image, to the noise level's embedding.
    residual: adds z to the output, as in `VDMUNet`.
    scan_blocks: each chain of equal blocks is a loop, which compiles many times faster, over
      stacked parameters, as in `VDMUNet`.
    remat: the gradient computes each block's activations again instead of keeping them.
  """

  widths: tuple[int, ...] = (128, 256, 512)
  num_blocks: int = 2
  transformer_width: int = 1024
  transformer_depth: int = 16
  head_width: int = 64
  patch_size: int = 1
  skip: str = 'residual'
  conditioning_width: int = 256
  dropout: float = 0.1
  norm_groups: int = 0
  padding: str = 'zero'
  fit_size: bool = False
  num_classes: int = 0
  embedding_size: int = 0
  dtype: jnp.dtype = jnp.float32
  augmentation_flag: bool = False
  residual: bool = False
  scan_blocks: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, z, t, label=None, vector=None, field=None, flag=None, *, train):
    """Returns the raw output of the network; the arguments are those of `VDMUNet`."""
    common = (self.conditioning_width, self.num_blocks, self.dropout, self.num_classes)
    checks.check_fields(*common, width_field='conditioning_width')
    for name in ('transformer_depth', 'transformer_width', 'patch_size'):
      value = getattr(self, name)
      checks.require_field(value >= 1, name, value, 'at least 1', 1)
    checks.check_head_width(self.head_width, self.transformer_width)
    checks.require_field(
      self.widths and min(self.widths) >= 1,
      'widths',
      self.widths,
      'positive integers, one per level',
      '(128, 256, 512)',
    )
    checks.require_field(
      self.skip in ('concatenate', 'residual'),
      'skip',
      self.skip,
      "'concatenate' or 'residual'",
      "'residual'",
    )
    divisor, rule = self.patch_size * 2 ** len(self.widths), (self.padding, self.fit_size)
    fewer = 'widths or a smaller config.model.patch_size'
    checks.check_image_shape('uvit', z.shape, divisor, fewer, *rule)

    dense = functools.partial(layers.Dense, dtype=self.dtype)
    conv = functools.partial(convolution.Conv3, dtype=self.dtype, padding=self.padding)
    chain = functools.partial(blocks.chain, scan=self.scan_blocks, remat=self.remat)
    concatenate = self.skip == 'concatenate'

    def convolutional(features, name):
      same = dict(norm_groups=self.norm_groups, padding=self.padding)
      return adm_unet.Block(features, 0.0, self.dtype, train, **same, name=name)

    def transformer(name):
      return TransformerBlock(self.head_width, self.dropout, self.dtype, train, name=name)

    cond = Conditioning(
      self.conditioning_width,
      self.num_classes,
      self.augmentation_flag,
      self.embedding_size,
      name='conditioning',
    )(t, label, vector, flag)
    h = layers.fit(layers.append_field(jnp.asarray(z, jnp.float32), field), divisor)
    h = layers.space_to_depth(h, self.patch_size)
    h = layers.read(functools.partial(conv, self.widths[0], name='conv_in'), h, self.dtype)

    skips = []
    for level, width in enumerate(self.widths):
      make = functools.partial(convolutional, width)
      h, ys = chain(make, f'down_{level}_*', self.num_blocks, h, None, cond)
      skips.append(ys[::-1] if concatenate else h)
      wider = (*self.widths, self.transformer_width)[level + 1]
      h = dense(wider, name=f'halve_{level}')(layers.halve(h))

    kinds = checks.axis_paddings(self.padding, z.ndim - 2)
    told = checks.told_sizes(h.shape[1:-1], kinds)
    position = self.param('position', nn.initializers.normal(0.02), (1, *told, h.shape[-1]))
    h += position.astype(self.dtype)
    h, _ = chain(transformer, 'transformer_*', self.transformer_depth, h, None, cond)

    for level, width in reversed(list(enumerate(self.widths))):
      make, skip = functools.partial(convolutional, width), skips.pop()
      h = layers.double(dense(width, name=f'double_{level}')(h))
      if not concatenate:
        h, skip = h + skip, None
      h, _ = chain(make, f'up_{level}_*', self.num_blocks, h, skip, cond)

    h = nn.swish(layers.group_norm(self.widths[0], self.dtype, 'norm_out', self.norm_groups)(h))
    features = self.patch_size ** (z.ndim - 2) * z.shape[-1]
    h = conv(features, kernel_init=nn.initializers.zeros, name='conv_out')(h)
    h = layers.depth_to_space(h.astype(jnp.float32), self.patch_size)
    h = layers.crop(h, z.shape[1:-1])
    return h + z if self.residual else h
