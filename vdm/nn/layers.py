"""Layers that the networks share: convolution, dropout, normalisation, attention, conditioning.

Parameters are float32. `dtype` is that of activations; statistics, softmax and the conditioning
vector are float32 whatever it is.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from vdm.errors import require
from vdm.nn.attention import softmax_attention


def _conv(x, kernel):
  """x [B, H, W, I] * kernel [3, 3, I, O] -> [B, H, W, O]."""
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


@jax.custom_vjp
def conv3x3(x, kernel):
  """3x3 convolution, stride 1, zero padding: x [B, H, W, I], kernel [3, 3, I, O] -> [B, H, W, O].

  Equal to `lax.conv_general_dilated` in value and gradient (reverse mode only). On CPU the gradient
  is written out as two plain NHWC/HWIO convolutions: XLA:CPU takes its fast path for this layout
  only, and inside the body of a loop nothing rewrites the transposed layout of the automatic
  kernel gradient, which is then some forty times slower.
  """
  return _conv(x, kernel)


def _conv3x3_fwd(x, kernel):
  return _conv(x, kernel), (x, kernel)


def _conv3x3_bwd(residuals, g):
  return lax.platform_dependent(*residuals, g, cpu=_conv_vjp_plain, default=_conv_vjp_native)


def _conv_vjp_native(x, kernel, g):
  (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel), x)(g)
  (dkernel,) = jax.linear_transpose(lambda kernel: _conv(x, kernel), kernel)(g)
  return dx, dkernel


def _conv_vjp_plain(x, kernel, g):
  dx = _conv(g, kernel[::-1, ::-1].swapaxes(2, 3))
  # Input channels act as the batch, examples as the channels, g as an H x W kernel.
  dkernel = lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    g.transpose(1, 2, 0, 3),
    (1, 1),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return dx, dkernel.transpose(1, 2, 0, 3)


conv3x3.defvjp(_conv3x3_fwd, _conv3x3_bwd)


class Conv3x3(nn.Module):
  """3x3 convolution with bias: x [B, H, W, I] -> [B, H, W, features]; see `conv3x3`."""

  features: int
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', self.kernel_init, (3, 3, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    y = conv3x3(x.astype(self.dtype), kernel.astype(self.dtype))
    return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def random_words(key, shape):
  """Independent uint32, uniform: for masks, where they need a tenth of `jax.random.bits`' work.

  A hash of each element's number, of the multiplications and shifts of C. Wellons' `lowbias32`, and
  of the key's two words, one before and one between them. Of the results only the upper bits are
  to be used. How an array is divided over devices has no part in it.
  """
  before, *_, between = jax.random.key_data(key)  # itself a hash, of the layer and the step
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  numbers = [lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]
  h = sum(n * jnp.uint32(stride) for n, stride in zip(numbers, strides, strict=True)) ^ before
  h = (h ^ h >> 16) * jnp.uint32(0x7FEB352D)
  h = (h ^ h >> 15 ^ between) * jnp.uint32(0x846CA68B)
  return (h ^ h >> 16) * jnp.uint32(0x7FEB352D)


class Dropout(nn.Module):
  """Sets elements of x to zero with probability `rate`, and divides the others by 1 - rate.

  Draws from the rng stream 'dropout', but not when `train` is False or the rate is 0.
  """

  rate: float

  @nn.compact
  def __call__(self, x, *, train):
    if not train or not self.rate:
      return x
    keep = random_words(self.make_rng('dropout'), x.shape) >= jnp.uint32(self.rate * 2**32)
    # A TPU's step compiles up to twice as long when masks are merged into the convolutions.
    keep = lax.optimization_barrier(keep)
    return jnp.where(keep, x * jnp.asarray(1 / (1 - self.rate), x.dtype), jnp.zeros_like(x))


class GroupNorm(nn.Module):
  """GroupNorm over positions and groups of channels (Wu & He, arXiv 1803.08494): x [B, ..., C].

  float32 statistics, output in `dtype`. Sums over positions come first, channel by channel, and
  the normalisation is x a + b with a and b [B, C]: no array is split into groups but those of B C
  numbers, which is what makes it fast, forward and backward.
  """

  num_groups: int
  dtype: jnp.dtype = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x):
    batch, *positions, channels = x.shape
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    x, axes = x.astype(jnp.float32), tuple(range(1, 1 + len(positions)))

    def of_group(a):
      a = a.reshape(batch, self.num_groups, -1).mean(axis=-1, keepdims=True)
      return jnp.broadcast_to(a, (*a.shape[:2], channels // self.num_groups)).reshape(batch, -1)

    mean, square = of_group(x.mean(axes)), of_group((x * x).mean(axes))
    a = scale[None] * lax.rsqrt(jnp.maximum(square - mean * mean, 0) + self.epsilon)
    b = bias[None] - mean * a
    spread = lambda a: jnp.expand_dims(a, axes)
    return (x * spread(a) + spread(b)).astype(self.dtype)


def group_norm(channels, dtype, name, num_groups=0):
  """Returns `GroupNorm`, named `name`, with `num_groups` groups, or with `auto_groups` if it is 0.

  Raises ValueError if the groups cannot share the channels evenly.
  """
  valid = num_groups >= 0 and channels % (num_groups or 1) == 0
  fact = f'0 or a divisor of the {channels} channels it groups'
  require_field(valid, 'norm_groups', num_groups, fact, '0, which suits any width')
  return GroupNorm(num_groups or auto_groups(channels), dtype, name=name)


def auto_groups(channels):
  """Returns 32, as in VDM's public code, or fewer so that each group has four channels or more.

  A group of one channel would remove the conditioning, which shifts whole channels just before it,
  and one of two keeps only their difference.
  """
  most = max(1, min(32, channels // 4))
  return max(n for n in range(1, most + 1) if channels % n == 0)


class ScaleShift(nn.Module):
  """x [B, H, W, C], cond [B, D] -> x (1 + scale) + shift, both projections [B, C] of cond."""

  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x, cond):
    dense = nn.Dense(2 * x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name='dense')
    scale, shift = jnp.split(dense(cond)[:, None, None, :], 2, axis=-1)
    return x * (1 + scale) + shift


class Attention(nn.Module):
  """Residual self-attention over all positions: x [B, H, W, C] -> [B, H, W, C].

  GroupNorm, projections to queries, keys and values, float32 softmax, and an output projection
  that starts at zero, so that the layer starts as the identity.
  """

  num_heads: int = 1
  dtype: jnp.dtype = jnp.float32
  norm_groups: int = 0

  @nn.compact
  def __call__(self, x):
    batch, height, width, channels = x.shape
    h = group_norm(channels, self.dtype, 'norm', self.norm_groups)(x)
    heads = (batch, height * width, self.num_heads, channels // self.num_heads)
    q, k, v = (
      nn.Dense(channels, dtype=self.dtype, name=name)(h).reshape(heads)
      for name in ('query', 'key', 'value')
    )
    h = softmax_attention(q, k, v).reshape(x.shape)
    zeros = nn.initializers.zeros
    return x + nn.Dense(channels, dtype=self.dtype, kernel_init=zeros, name='out')(h)


def halve(x):
  """The mean of every 2 x 2 pixels: x [B, 2H, 2W, C] -> [B, H, W, C]."""
  batch, height, width, channels = x.shape
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def double(x):
  """Every pixel four times: x [B, H, W, C] -> [B, 2H, 2W, C]; a right inverse of `halve`."""
  return x.repeat(2, axis=1).repeat(2, axis=2)


def space_to_depth(x, size):
  """Patches of size x size pixels as channels: [B, S H, S W, C] -> [B, H, W, S S C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // size, size, width // size, size, channels)
  return x.swapaxes(2, 3).reshape(batch, height // size, width // size, size * size * channels)


def depth_to_space(x, size):
  """The inverse of `space_to_depth`: [B, H, W, S S C] -> [B, S H, S W, C]."""
  batch, height, width, _ = x.shape
  x = x.reshape(batch, height, width, size, size, -1).swapaxes(2, 3)
  return x.reshape(batch, height * size, width * size, -1)


def sinusoidal_embedding(t, size):
  """t [B] in [0, 1] -> [B, size]: sin, then cos, of 1000 t w_k, k = 0 .. size/2 - 1.

  w_k = 10000^(-k / (size/2 - 1)), from 1 to 1e-4.
  """
  k = jnp.arange(size // 2, dtype=jnp.float32)
  frequencies = jnp.exp(-math.log(10_000) / (size // 2 - 1) * k)
  angles = 1000 * t[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fourier_features(z, exponents):
  """z [..., C] -> [..., C (1 + 2 len(exponents))]: z, sin(2 pi 2^n z), cos(2 pi 2^n z).

  VDM's Fourier features (arXiv 2107.00630). Among the sines, and among the cosines, the exponents
  vary fastest, as in the published checkpoints. The K values 2(u + 1/2)/K - 1 of the data have all
  the same features for n = log2(K) - 1, which so show the noise alone. Everything in float32.
  """
  z = jnp.asarray(z, jnp.float32)
  if not exponents:
    return z
  cycles = jnp.stack([z * 2.0**n for n in exponents], axis=-1).reshape(*z.shape[:-1], -1)
  # Exact in float32, unlike 2 pi 2^n z, which for n = 7 is 1e-4 off.
  angles = 2 * jnp.pi * (cycles - jnp.round(cycles))
  return jnp.concatenate([z, jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Conditioning(nn.Module):
  """Noise level t [B], label and flag [B] -> conditioning vector [B, 4 width], float32.

  VDM's (public code): sinusoidal embedding of t, then twice Dense, swish. Our addition: the
  embedding of the label is added before the last swish. Labels -1 and `num_classes`, and no labels
  at all, are the null label, which has its own row in the table.

  With `embedding_size` E > 0 the label is instead a vector of each image, float [B, E], such as
  another network's; its projection is added. Zeros, and no labels at all, stand for its absence,
  for which a vector is learned.
  """

  width: int
  num_classes: int = 0
  augmentation_flag: bool = False
  embedding_size: int = 0

  @nn.compact
  def __call__(self, t, label=None, flag=None):
    if label is not None and not self.num_classes and not self.embedding_size:
      raise ValueError(
        'labels were given to a network with num_classes=0; set '
        'config.model.class_conditional=True, or pass label=None.'
      )
    if self.num_classes and self.embedding_size:
      raise ValueError(
        f'config.data.embedding_size={self.embedding_size} must be 0 for a network with classes; '
        'set config.model.class_conditional=False to condition on embeddings.'
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
    h = nn.swish(nn.Dense(4 * self.width, name='dense_0')(h))
    h = nn.Dense(4 * self.width, name='dense_1')(h)
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
      label = jnp.zeros((len(t), self.embedding_size)) if label is None else label
      if label.shape != (len(t), self.embedding_size):
        raise ValueError(
          f'config.data.embedding_size={self.embedding_size} must be that of the embeddings, '
          f'whose shape is {label.shape}.'
        )
      label = jnp.asarray(label, jnp.float32)
      null = self.param('null_embedding', nn.initializers.normal(1.0), (1, 4 * self.width))
      projected = nn.Dense(4 * self.width, use_bias=False, name='embedding')(label)
      h += jnp.where(label.any(axis=-1, keepdims=True), projected, null)
    return nn.swish(h)


def require_field(valid, name, value, rule, remedy):
  """Raises ValueError with the name of the network's field unless it is valid."""
  require(valid, f'config.model.{name}', value, rule, f'try {remedy}')


def check_fields(width, num_blocks, dropout, num_classes, width_field='width'):
  """Raises ValueError if a field that all networks have is out of its range."""
  valid = width >= 4 and width % 2 == 0
  require_field(valid, width_field, width, 'even and at least 4', max(4, width + 1))
  require_field(num_blocks >= 1, 'num_blocks', num_blocks, 'at least 1', 1)
  require_field(0 <= dropout < 1, 'dropout', dropout, 'in [0, 1)', 0.1)
  require_field(num_classes >= 0, 'num_classes', num_classes, 'zero or more', 0)


def check_heads(num_heads, width):
  """Raises ValueError if attention cannot split the width into that many heads."""
  divisors = [n for n in range(1, min(width, 17)) if width % n == 0]
  remedy = ' or '.join(map(str, divisors[1:3] or divisors))
  valid = num_heads >= 1 and width % num_heads == 0
  require_field(valid, 'num_heads', num_heads, f'a divisor of the width {width}', remedy)


def check_head_width(head_width, width):
  """Raises ValueError if attention cannot split the width into heads of that width."""
  valid = head_width >= 1 and width % head_width == 0
  require_field(valid, 'head_width', head_width, f'a divisor of the width {width}', min(width, 64))


def check_image_shape(name, shape, divisor, field):
  """Raises ValueError unless z is images [B, H, W, C] whose H and W the levels can divide."""
  if len(shape) != 4:
    raise ValueError(f'{name} takes images [B, H, W, C], but z has shape {shape}.')
  _, height, width, channels = shape
  if height % divisor or width % divisor:
    larger = tuple(-(-n // divisor) * divisor for n in (height, width))
    raise ValueError(
      f'config.data.image_shape={shape[1:]} must have a height and width divisible by {divisor} '
      f'for this {name}; try {(*larger, channels)}, or fewer config.model.{field}.'
    )
