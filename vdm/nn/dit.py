"""DiT: a plain transformer on patches of pixels (arXiv 2212.09748), built as JiT (2511.13720)."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vdm.nn import blocks, checks, layers
from vdm.nn.attention import softmax_attention
from vdm.nn.conditioning import Conditioning, ScaleShift

LONGEST = 10_000  # positions; the slowest rotation turns by one radian in about so many


def rotations(sizes, kinds, pairs):
  """Returns sines and cosines [2, prod(sizes), pairs] of the angles by which a position turns.

  Each of the N axes has pairs // N of the pairs, and one that is left over does not turn. The k-th
  of K turns by 10000^(-k / K) per position (arXiv 2104.09864), along a periodic axis of n positions
  by 2 pi m / n, with the integer m nearest to (n / 2)^(k / (K - 1)): how two positions are turned
  against each other depends there on their distance round the axis alone.

  Args:
    sizes: positions along each axis of space.
    kinds: 'zero' or 'periodic' for each.
    pairs: half the width of a head.
  """
  count = pairs // len(sizes)
  k, angles = np.arange(count), []
  for n, kind, places in zip(sizes, kinds, np.indices(sizes), strict=True):
    if kind == 'periodic':
      turns = np.round((n / 2) ** (k / max(count - 1, 1))).astype(int)
      # the remainder, in integers, makes whole turns none
      angles.append(2 * np.pi / n * (np.outer(places, turns) % n))
    else:
      angles.append(np.outer(places, LONGEST ** (-k / count)))
  still = np.zeros((math.prod(sizes), pairs - count * len(sizes)))
  angles = np.concatenate([*angles, still], axis=1)
  return np.float32([np.sin(angles), np.cos(angles)])


def rotate(x, turns):
  """Turns the pairs (x_i, x_{i + D/2}) of x [B, S, N, D] by `rotations` [2, S, D/2], in float32."""
  sin, cos = turns[:, None, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Block(nn.Module):
  """Applies self-attention, then SwiGLU, residual, to h [B, *space, C]; a link of `blocks.chain`.

  h + gate f(RMS(h) (1 + scale) + shift), with all three of cond and zero at first, so that the
  block starts as the identity (adaLN-zero, arXiv 2212.09748). Queries and keys are RMS-normalised,
  then turned by their positions. SwiGLU is W (swish(U u) * V u) with 8 C / 3 hidden units (arXiv
  2002.05202), and dropout on them.
  """

  head_width: int
  dropout: float
  dtype: jnp.dtype
  train: bool

  @nn.compact
  def __call__(self, h, _, cond, turns):
    batch, *sizes, channels = h.shape
    dense = functools.partial(layers.Dense, dtype=self.dtype)
    zeros = nn.initializers.zeros
    parts = dense(6 * channels, kernel_init=zeros, name='cond')(cond)
    parts = jnp.split(jnp.expand_dims(parts, range(1, h.ndim - 1)), 6, axis=-1)
    parts = [layers.spread(part, h) for part in parts]

    def norm(x, scale, shift, name):
      rms = nn.RMSNorm(use_scale=False, dtype=self.dtype, name=f'norm_{name}')
      return rms(x) * (1 + scale) + shift

    u = norm(h, *parts[:2], 'attention')
    q, k, v = (
      dense(channels, name=name)(u).reshape(batch, math.prod(sizes), -1, self.head_width)
      for name in ('query', 'key', 'value')
    )
    q = rotate(nn.RMSNorm(dtype=self.dtype, name='norm_query')(q), turns)
    k = rotate(nn.RMSNorm(dtype=self.dtype, name='norm_key')(k), turns)
    u = softmax_attention(q, k, v).reshape(h.shape)
    h += parts[2] * dense(channels, name='out')(u)

    u = norm(h, *parts[3:5], 'mlp')
    hidden = 8 * channels // 3
    u = nn.swish(dense(hidden, name='gate')(u)) * dense(hidden, name='hidden')(u)
    u = layers.Dropout(self.dropout)(u, train=self.train)
    return h + parts[5] * dense(channels, name='mlp_out')(u), None


class DiT(nn.Module):
  """Implements DiT (Peebles & Xie, arXiv 2212.09748) on patches of pixels, as JiT (2511.13720).

  Patches become tokens by a linear map, of low rank if they are large; equal blocks; a linear map
  that starts at zero makes pixels of tokens. Nothing is convolved, and all is at one resolution.
  The defaults are JiT-B/16, with 131,227,392 parameters for 256 x 256 images of 1000 classes. JiT
  has 32 more tokens for the class from its fifth block on, positions also by fixed sinusoids where
  they are learned here, and its dropout in the middle half of the blocks of its largest networks.

  Space has one to three axes. A position is told by a learned vector, and to each pair of positions
  by `rotations`. Along a periodic axis there is no such vector and the rotations close, so that a
  shift of z by whole patches shifts the output.

  Attributes:
    width: channels of a token.
    num_blocks: blocks of attention and SwiGLU.
    head_width: channels per head; divides `width`; even, and two or more for each axis of space.
    patch_size: pixels of a patch along each axis.
    bottleneck: rank of the map from patches to tokens; 0: full.
    conditioning_width: as in `UViT`; in JiT a quarter of `width`.
    dropout: rate on the hidden units of each block.
    padding: 'zero' or 'periodic', or one for each axis, as in `VDMUNet`.
    fit_size: as in `ADMUNet`.
    num_classes: 0 for a network without labels.
    embedding_size: E, for vectors [B, E]; see `Conditioning`. 0: the network takes none.
    dtype: of activations. Parameters and output are float32.
    augmentation_flag: appends a flag, 1 for an augmented image, to the noise level's embedding.
    residual: adds z to the output, as in `VDMUNet`.
    scan_blocks: the blocks are a loop over stacked parameters, as in `VDMUNet`.
    remat: the gradient computes each block's activations again instead of keeping them.
  """

  width: int = 768
  num_blocks: int = 12
  head_width: int = 64
  patch_size: int = 16
  bottleneck: int = 128
  conditioning_width: int = 192
  dropout: float = 0.0
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
    self._check(z.shape)
    dense = functools.partial(layers.Dense, dtype=self.dtype)
    zeros = nn.initializers.zeros

    def block(name):
      return Block(self.head_width, self.dropout, self.dtype, train, name=name)

    cond = Conditioning(
      self.conditioning_width,
      self.num_classes,
      self.augmentation_flag,
      self.embedding_size,
      name='conditioning',
    )(t, label, vector, flag)
    h = layers.append_field(jnp.asarray(z, jnp.float32), field)
    h = layers.space_to_depth(layers.fit(h, self.patch_size), self.patch_size)
    dense_in = functools.partial(dense, self.width, name='dense_in')
    if self.bottleneck:
      low = functools.partial(dense, self.bottleneck, use_bias=False, name='bottleneck')
      h = dense_in()(layers.read(low, h, self.dtype))
    else:
      h = layers.read(dense_in, h, self.dtype)

    sizes, kinds = h.shape[1:-1], checks.axis_paddings(self.padding, z.ndim - 2)
    told = checks.told_sizes(sizes, kinds)
    position = self.param('position', nn.initializers.normal(0.02), (1, *told, self.width))
    h += position.astype(self.dtype)
    turns = jnp.asarray(rotations(sizes, kinds, self.head_width // 2))
    layout = dict(scan=self.scan_blocks, remat=self.remat)
    h, _ = blocks.chain(block, 'block_*', self.num_blocks, h, None, cond, turns, **layout)

    h = nn.RMSNorm(use_scale=False, dtype=self.dtype, name='norm_out')(h)
    h = ScaleShift(self.dtype, zeros, name='cond_out')(h, cond)
    features = self.patch_size ** (z.ndim - 2) * z.shape[-1]
    h = dense(features, kernel_init=zeros, name='dense_out')(h).astype(jnp.float32)
    h = layers.crop(layers.depth_to_space(h, self.patch_size), z.shape[1:-1])
    return h + z if self.residual else h

  def _check(self, shape):
    common = (self.conditioning_width, self.num_blocks, self.dropout, self.num_classes)
    checks.check_fields(*common, width_field='conditioning_width')
    for name, least in dict(width=1, patch_size=1, bottleneck=0).items():
      value = getattr(self, name)
      checks.require_field(value >= least, name, value, f'at least {least}', least)
    checks.check_head_width(self.head_width, self.width)
    rule = (self.padding, self.fit_size)
    checks.check_image_shape('dit', shape, self.patch_size, 'patch_size', *rule)
    least = 2 * (len(shape) - 2)
    good = self.head_width % 2 == 0 and self.head_width >= least
    fact = f'even, and at least {least} for the rotations of {len(shape) - 2} axes'
    checks.require_field(good, 'head_width', self.head_width, fact, max(64, least))
