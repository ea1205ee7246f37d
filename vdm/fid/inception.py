"""Inception of 2015-12-05, the network that FID is defined by, to the letter of its frozen graph.

Names of parts are those of that graph, so that `vdm.fid.weights` needs no table for it. Each
convolution has a bias and a scale per channel into which its batch normalisation is folded.

Others get these wrong, and here they are as they are there: the bilinear resize of TensorFlow 1
(output pixel i reads at i * size / 299, no half-pixel centres, no antialiasing); range
(u - 128) / 128; average pools that leave padding out of the mean; a maximum instead of an average
pool in the last block; 1008 logits, for the Inception score without their bias.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

SIDE = 299
NUM_FEATURES, NUM_LOGITS = 2048, 1008
SPATIAL_CHANNELS = 7  # of mixed_6/conv, 17 x 17: ADM's spatial features, 2023 of them


class Conv(NamedTuple):
  """Describes one convolution: output channels, kernel (height, width), stride, padding."""

  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = 'SAME'


class Block(NamedTuple):
  """Describes towers side by side, {path: convolution}; they, and a pool, are concatenated.

  A convolution reads the one before it in its tower; those of 'tower/mixed' read the same one and
  lie side by side. The pool is 'average', 'max', or 'max2', of stride 2 and with no convolution.
  """

  convs: dict[str, Conv]
  pool: str


def _block_35(pool_features: int) -> Block:
  convs = {
    'conv': Conv(64),
    'tower/conv': Conv(48),
    'tower/conv_1': Conv(64, (5, 5)),
    'tower_1/conv': Conv(64),
    'tower_1/conv_1': Conv(96, (3, 3)),
    'tower_1/conv_2': Conv(96, (3, 3)),
    'tower_2/conv': Conv(pool_features),
  }
  return Block(convs, 'average')


def _block_17(width: int) -> Block:
  row, column = (1, 7), (7, 1)
  convs = {
    'conv': Conv(192),
    'tower/conv': Conv(width),
    'tower/conv_1': Conv(width, row),
    'tower/conv_2': Conv(192, column),
    'tower_1/conv': Conv(width),
    'tower_1/conv_1': Conv(width, column),
    'tower_1/conv_2': Conv(width, row),
    'tower_1/conv_3': Conv(width, column),
    'tower_1/conv_4': Conv(192, row),
    'tower_2/conv': Conv(192),
  }
  return Block(convs, 'average')


def _block_8(pool: str) -> Block:
  convs = {
    'conv': Conv(320),
    'tower/conv': Conv(384),
    'tower/mixed/conv': Conv(384, (1, 3)),
    'tower/mixed/conv_1': Conv(384, (3, 1)),
    'tower_1/conv': Conv(448),
    'tower_1/conv_1': Conv(384, (3, 3)),
    'tower_1/mixed/conv': Conv(384, (1, 3)),
    'tower_1/mixed/conv_1': Conv(384, (3, 1)),
    'tower_2/conv': Conv(192),
  }
  return Block(convs, pool)


# After 'conv_2' and 'conv_4' comes a 3 x 3 maximum of stride 2.
STEM = {
  'conv': Conv(32, (3, 3), 2, 'VALID'),
  'conv_1': Conv(32, (3, 3), 1, 'VALID'),
  'conv_2': Conv(64, (3, 3)),
  'conv_3': Conv(80, padding='VALID'),
  'conv_4': Conv(192, (3, 3), 1, 'VALID'),
}
BLOCKS = {
  'mixed': _block_35(32),
  'mixed_1': _block_35(64),
  'mixed_2': _block_35(64),
  'mixed_3': Block(
    {
      'conv': Conv(384, (3, 3), 2, 'VALID'),
      'tower/conv': Conv(64),
      'tower/conv_1': Conv(96, (3, 3)),
      'tower/conv_2': Conv(96, (3, 3), 2, 'VALID'),
    },
    'max2',
  ),
  'mixed_4': _block_17(128),
  'mixed_5': _block_17(160),
  'mixed_6': _block_17(160),
  'mixed_7': _block_17(192),
  'mixed_8': Block(
    {
      'tower/conv': Conv(192),
      'tower/conv_1': Conv(320, (3, 3), 2, 'VALID'),
      'tower_1/conv': Conv(192),
      'tower_1/conv_1': Conv(192, (1, 7)),
      'tower_1/conv_2': Conv(192, (7, 1)),
      'tower_1/conv_3': Conv(192, (3, 3), 2, 'VALID'),
    },
    'max2',
  ),
  'mixed_9': _block_8('average'),
  'mixed_10': _block_8('max'),
}


def conv_names() -> list[str]:
  """Returns paths of the 94 convolutions, such as 'mixed_9/tower/conv', in the order they run."""
  return [*STEM, *(f'{name}/{path}' for name, block in BLOCKS.items() for path in block.convs)]


def resize(
  images: UInt8[Array, 'B H W 3'] | Float[Array, 'B H W 3'],
) -> Float[Array, 'B 299 299 3']:
  """Resizes to 299 x 299 as TensorFlow 1's ResizeBilinear does.

  align_corners and half_pixel_centers are both off.
  """
  x = images.astype(jnp.float32)
  for axis in (2, 1):  # columns first, as its kernel rounds
    size = x.shape[axis]
    position = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
    low = position.astype(np.int32)
    share = (position - low).reshape([-1 if i == axis else 1 for i in range(4)])
    below = jnp.take(x, low, axis)
    x = below + (jnp.take(x, np.minimum(low + 1, size - 1), axis) - below) * share
  return x


def prepare(images: UInt8[Array, 'B H W 3']) -> Float[Array, 'B 299 299 3']:
  """Returns what the network sees of 8-bit RGB images of any size: resized, (u - 128) / 128."""
  return (resize(images) - 128) / 128


class ConvNormRelu(nn.Module):
  """Applies a convolution without bias, its folded batch normalisation, and ReLU."""

  spec: Conv

  @nn.compact
  def __call__(self, x):
    spec = self.spec
    shape = (*spec.kernel, x.shape[-1], spec.features)
    kernel = self.param('kernel', nn.initializers.he_normal(), shape)
    scale = self.param('scale', nn.initializers.ones, (spec.features,))
    bias = self.param('bias', nn.initializers.zeros, (spec.features,))
    y = jax.lax.conv_general_dilated(
      x,
      kernel,
      (spec.stride, spec.stride),
      spec.padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      precision='highest',  # no TF32 or bfloat16 passes: features are compared across machines
    )
    return nn.relu(y * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1))


class Mixed(nn.Module):
  """Applies a block of towers; returns their concatenation, and its first convolution's output."""

  block: Block

  @nn.compact
  def __call__(self, x):
    pooled = _POOLS[self.block.pool](x)
    ends, first = {}, None  # ends: the output of each tower so far
    for path, spec in self.block.convs.items():
      tower = path.rpartition('/')[0]
      if tower.endswith('/mixed'):
        source = tower.removesuffix('/mixed')
        y = self.conv(path, spec, ends[source][0])
        ends[source] = (*ends[source], y)
        continue
      start = pooled if tower == 'tower_2' else x
      y = self.conv(path, spec, ends[tower][0] if tower in ends else start)
      ends[tower] = (y,)
      first = y if first is None else first
    # What 'mixed' convolutions read is not itself an output.
    outputs = [y for end in ends.values() for y in (end[1:] or end)]
    if self.block.pool == 'max2':
      outputs.append(pooled)
    return jnp.concatenate(outputs, axis=-1), first

  def conv(self, path, spec, x):
    return ConvNormRelu(spec, name=path)(x)


def _max_pool_2(x):
  return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


_POOLS = {
  'average': lambda x: nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False),
  'max': lambda x: nn.max_pool(x, (3, 3), (1, 1), 'SAME'),
  'max2': _max_pool_2,
}


class Inception(nn.Module):
  """Maps x float32 [B, 299, 299, 3] to features [B, 2048], spatial [B, 2023], and logits.

  x is from `prepare`.
  """

  @nn.compact
  def __call__(self, x):
    for name, spec in STEM.items():
      x = ConvNormRelu(spec, name=name)(x)
      if name in ('conv_2', 'conv_4'):
        x = _max_pool_2(x)
    for name, block in BLOCKS.items():
      x, first = Mixed(block, name=name)(x)
      if name == 'mixed_6':
        spatial = first[..., :SPATIAL_CHANNELS].reshape(len(first), -1)
    features = x.mean(axis=(1, 2))  # pool_3
    weights = self.param('softmax', nn.initializers.lecun_normal(), (NUM_FEATURES, NUM_LOGITS))
    logits = jnp.matmul(features, weights, precision='highest')
    return {'features': features, 'spatial': spatial, 'logits': logits}
