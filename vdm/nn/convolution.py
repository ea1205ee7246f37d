"""The convolution of the networks, with a gradient that XLA:CPU runs fast in a loop, too."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from vdm.nn.checks import axis_paddings
from vdm.nn.layers import spread


def conv3(x, kernel, padding='zero'):
  """Convolves x [B, *space, I] with kernel [3, ..., O], stride 1, to [B, *space, O].

  The kernel is [3, I, O], [3, 3, I, O] or [3, 3, 3, I, O], by the number of axes. Each axis is
  padded with zeros, or where it is periodic with what is at its other end.

  It equals `lax.conv_general_dilated` in value and gradient (reverse mode only). On CPU the
  gradient is written out as two plain convolutions with channels last: XLA:CPU takes its fast path
  for this layout only, and inside the body of a loop nothing rewrites the transposed layout of the
  automatic kernel gradient, which is then some forty times slower.
  """
  zero = [kind == 'zero' for kind in axis_paddings(padding, x.ndim - 2)]
  if not all(zero):
    x = jnp.pad(x, [(0, 0), *((not z, not z) for z in zero), (0, 0)], mode='wrap')
  return _conv(x, kernel, tuple((int(z), int(z)) for z in zero))


def _native(x, kernel, pads):
  """Returns x [B, *space, I] * kernel [*size, I, O] with these zeros at the ends of each axis."""
  space = 'DHW'[-len(pads) :]
  layout = (f'N{space}C', f'{space}IO', f'N{space}C')
  return lax.conv_general_dilated(x, kernel, (1,) * len(pads), pads, dimension_numbers=layout)


def _plain(x, kernel, pads):
  """Returns `_native`, on CPU by planes where there are three axes."""
  if len(pads) < 3:
    return _native(x, kernel, pads)
  planes, native = (functools.partial(f, pads=pads) for f in (_by_planes, _native))
  return lax.platform_dependent(x, kernel, cpu=planes, default=native)


def _by_planes(x, kernel, pads):
  """Convolves in three axes as the sum of three convolutions in two, over all planes at once.

  XLA:CPU has a fast path for two axes, and takes five times as long for three.
  """
  batch, depth, *sizes, _ = x.shape
  length = depth + sum(pads[0]) - 2
  x = jnp.pad(x, ((0, 0), pads[0], (0, 0), (0, 0), (0, 0)))
  parts = [
    _conv(x[:, i : i + length].reshape(batch * length, *sizes, -1), kernel[i], pads[1:])
    for i in range(3)
  ]
  out = sum(parts[1:], parts[0])
  return out.reshape(batch, length, *out.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, pads):
  return _plain(x, kernel, pads)


def _conv_fwd(x, kernel, pads):
  return _plain(x, kernel, pads), (x, kernel)


def _conv_bwd(pads, residuals, g):
  plain, native = (functools.partial(f, pads) for f in (_conv_vjp_plain, _conv_vjp_native))
  return lax.platform_dependent(*residuals, g, cpu=plain, default=native)


def _conv_vjp_native(pads, x, kernel, g):
  (dx,) = jax.linear_transpose(lambda x: _native(x, kernel, pads), x)(g)
  (dkernel,) = jax.linear_transpose(lambda kernel: _native(x, kernel, pads), kernel)(g)
  return dx, dkernel


def _conv_vjp_plain(pads, x, kernel, g):
  num_axes = len(pads)
  if num_axes == 3:
    return jax.vjp(functools.partial(_by_planes, pads=pads), x, kernel)[1](g)
  flipped = lax.rev(kernel, range(num_axes)).swapaxes(-2, -1)
  dx = _plain(g, flipped, tuple((2 - before, 2 - after) for before, after in pads))
  # Input channels act as the batch, examples as the channels, g as a kernel of the size of space.
  dkernel = _plain(x.swapaxes(0, -1), jnp.moveaxis(g, 0, num_axes), pads)
  return dx, jnp.moveaxis(dkernel, 0, num_axes)


_conv.defvjp(_conv_fwd, _conv_bwd)


class Conv3(nn.Module):
  """Applies a convolution of width 3 and a bias: x [B, *space, I] -> [B, *space, features].

  See `conv3` and `layers.spread`; `padding` is 'zero', 'periodic', or a list of these with one
  per axis.
  """

  features: int
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  padding: str = 'zero'

  @nn.compact
  def __call__(self, x):
    size = (3,) * (x.ndim - 2)
    kernel = self.param('kernel', self.kernel_init, (*size, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    y = conv3(x.astype(self.dtype), kernel.astype(self.dtype), self.padding)
    return y + spread(bias, y)
