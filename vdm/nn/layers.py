"""Layers that the networks share: dropout, normalisation, attention, resampling, Fourier features.

Parameters are float32. `dtype` is that of activations; statistics, softmax and the conditioning
vector are float32 whatever it is.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from vdm.errors import require
from vdm.nn.attention import softmax_attention
from vdm.nn.checks import require_field


def random_words(key, shape):
  """Draws uniform uint32 for masks, at a tenth of the work of `jax.random.bits`.

  Each is a hash, by C. Wellons' `lowbias32` without its ends, of two words of `jax.random.bits`:
  one says where the element is along the first axes, and one where along the last. Any two results
  are independent, and larger sets of them nearly so. Only the upper bits are to be used. How an
  array is divided over devices has no part in it.
  """
  one = (1,) * len(shape)
  halves = [(shape[:n] + one[n:], one[:n] + shape[n:]) for n in range(len(shape) + 1)]
  halves = min(halves, key=lambda shapes: sum(map(math.prod, shapes)))  # the fewest words
  words = map(jax.random.bits, jax.random.split(key), halves)
  # A TPU's convolutions compute the hash again as they read a mask, but not these.
  first, last = lax.optimization_barrier(tuple(words))
  h = (first ^ last) * jnp.uint32(0x7FEB352D)
  return (h ^ h >> 15) * jnp.uint32(0x846CA68B)


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
    kept = x.astype(jnp.float32) * jnp.float32(1 / (1 - self.rate))  # bfloat16 has no 1 / .9
    return jnp.where(keep, kept, 0).astype(x.dtype)


def spread(a, like):
  """Returns a, of as many axes as `like` or [C], broadcast to the shape of `like`, in its type.

  The gradient (reverse mode only) is a sum over what was broadcast, which is taken in float32: in
  bfloat16 such a sum stops to grow at 256 times what is added.
  """
  a = a if a.ndim == like.ndim else a.reshape((1,) * (like.ndim - 1) + (-1,))
  return _spread(a, like.shape, like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _spread(a, shape, dtype):
  return jnp.broadcast_to(a.astype(dtype), shape)


def _spread_fwd(a, shape, dtype):
  return _spread(a, shape, dtype), jnp.zeros((0, *a.shape), a.dtype)


def _spread_bwd(shape, dtype, like, g):
  axes = tuple(i for i, n in enumerate(like.shape[1:]) if n != shape[i])
  return (g.astype(jnp.float32).sum(axes, keepdims=True).astype(like.dtype),)


_spread.defvjp(_spread_fwd, _spread_bwd)


class Dense(nn.Module):
  """Applies a linear map and a bias to channels, x [..., I] -> [..., features], as Flax's does.

  All is in `dtype` but the sum that the gradient by the bias is (`spread`).
  """

  features: int
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
    y = x.astype(self.dtype) @ kernel.astype(self.dtype)
    if not self.use_bias:
      return y
    return y + spread(self.param('bias', nn.initializers.zeros, (self.features,)), y)


class GroupNorm(nn.Module):
  """Normalises x [B, ..., C] over positions and groups of channels (Wu & He, arXiv 1803.08494).

  The statistics are float32, the output is in `dtype`. Sums over positions come first, channel by
  channel, and the normalisation is x a + b with a and b [B, C]: no array is split into groups but
  those of B C numbers, which is what makes it fast, forward and backward.
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


class Attention(nn.Module):
  """Applies residual self-attention over all positions: x [B, *space, C] -> [B, *space, C].

  GroupNorm comes first, then projections to queries, keys and values, a float32 softmax, and an
  output projection that starts at zero, so that the layer starts as the identity.
  """

  num_heads: int = 1
  dtype: jnp.dtype = jnp.float32
  norm_groups: int = 0

  @nn.compact
  def __call__(self, x):
    batch, *sizes, channels = x.shape
    h = group_norm(channels, self.dtype, 'norm', self.norm_groups)(x)
    heads = (batch, math.prod(sizes), self.num_heads, channels // self.num_heads)
    q, k, v = (
      Dense(channels, dtype=self.dtype, name=name)(h).reshape(heads)
      for name in ('query', 'key', 'value')
    )
    h = softmax_attention(q, k, v).reshape(x.shape)
    zeros = nn.initializers.zeros
    return x + Dense(channels, dtype=self.dtype, kernel_init=zeros, name='out')(h)


def read(layer, x, dtype):
  """Returns layer(dtype=float32)(x) in `dtype`, for the layer of a network that reads z.

  With little noise z has details below the last digit of bfloat16, and of the products that
  accelerators make of float32: rounded before the first layer they are lost, behind it they are in
  the channels that are differences. The gradient by the kernel is rounded as others.
  """
  with jax.default_matmul_precision('highest'):
    return layer(dtype=jnp.float32)(x).astype(dtype)


def halve(x):
  """Returns the mean of every two positions along each axis: x [B, 2H, 2W, C] -> [B, H, W, C]."""
  inside = tuple(2 * axis for axis in range(1, x.ndim - 1))
  return _patches(x, 2).mean(inside)


def double(x):
  """Repeats each position along each axis: x [B, H, W, C] -> [B, 2H, 2W, C].

  It is a right inverse of `halve`.
  """
  return repeat(x, (2,) * (x.ndim - 2))


def repeat(x, times):
  """Repeats each position so many times along each axis: x [B, H, W, C] -> [B, S H, T W, C]."""
  for axis, number in enumerate(times, 1):
    x = x.repeat(number, axis=axis)
  return x


def space_to_depth(x, size):
  """Turns patches of this size per axis into channels: [B, S H, S W, C] -> [B, H, W, S S C]."""
  batch, *sizes, channels = x.shape
  outside = range(1, 2 * len(sizes), 2)
  inside = range(2, 2 * len(sizes) + 1, 2)
  x = _patches(x, size).transpose(0, *outside, *inside, 2 * len(sizes) + 1)
  return x.reshape(batch, *(n // size for n in sizes), size ** len(sizes) * channels)


def depth_to_space(x, size):
  """Undoes `space_to_depth`: [B, H, W, S S C] -> [B, S H, S W, C]."""
  batch, *sizes, _ = x.shape
  num_axes = len(sizes)
  x = x.reshape(batch, *sizes, *[size] * num_axes, -1)
  pairs = [axis for outside in range(1, num_axes + 1) for axis in (outside, num_axes + outside)]
  return x.transpose(0, *pairs, 2 * num_axes + 1).reshape(batch, *(n * size for n in sizes), -1)


def _patches(x, size):
  """Splits each axis of space in two: [B, S H, S W, C] -> [B, H, S, W, S, C]."""
  batch, *sizes, channels = x.shape
  return x.reshape(batch, *(m for n in sizes for m in (n // size, size)), channels)


def fourier_features(z, exponents):
  """Returns z, sin(2 pi 2^n z), cos(2 pi 2^n z): z [..., C] -> [..., C (1 + 2 len(exponents))].

  These are VDM's Fourier features (arXiv 2107.00630). Among the sines, and among the cosines, the
  exponents vary fastest, as in the published checkpoints. The K values 2(u + 1/2)/K - 1 of the data
  have all the same features for n = log2(K) - 1, which so show the noise alone. Everything is in
  float32.
  """
  z = jnp.asarray(z, jnp.float32)
  if not exponents:
    return z
  cycles = jnp.stack([z * 2.0**n for n in exponents], axis=-1).reshape(*z.shape[:-1], -1)
  # This is exact in float32, unlike 2 pi 2^n z, which for n = 7 is 1e-4 off.
  angles = 2 * jnp.pi * (cycles - jnp.round(cycles))
  return jnp.concatenate([z, jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fit(x, divisor):
  """Appends zeros to the axes of space that `divisor` does not divide: x [B, *space, C]."""
  lacking = [-n % divisor for n in x.shape[1:-1]]
  return jnp.pad(x, [(0, 0), *((0, n) for n in lacking), (0, 0)]) if any(lacking) else x


def crop(x, sizes):
  """Undoes `fit`: returns the first so many positions along each axis of space."""
  return x[:, *(slice(n) for n in sizes)] if x.shape[1:-1] != sizes else x


def append_field(x, field):
  """Appends a field [B, *coarse, F] to the channels of x [B, *space, C]; None: there is none.

  A field may be coarser than x by a whole factor along each axis; its positions are then repeated.
  """
  if field is None:
    return x
  sizes, coarse = x.shape[1:-1], field.shape[1:-1]
  good = len(coarse) == len(sizes) and len(field) == len(x)
  good = good and all(m and n % m == 0 for n, m in zip(sizes, coarse, strict=True))
  rule = f'[{len(x)}, *space, C] with space {sizes}, or whole fractions of it, like z'
  require(good, 'field', field.shape, rule, 'average or repeat the field')
  times = [n // m for n, m in zip(sizes, coarse, strict=True)]
  return jnp.concatenate([x, repeat(jnp.asarray(field, x.dtype), times)], axis=-1)
