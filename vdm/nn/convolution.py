"""The 3x3 convolution of the networks, with a gradient that XLA:CPU runs fast in a loop, too."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def _conv(x, kernel):
  """Returns x [B, H, W, I] * kernel [3, 3, I, O], [B, H, W, O]."""
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


@jax.custom_vjp
def conv3x3(x, kernel):
  """Convolves x [B, H, W, I] with kernel [3, 3, I, O], stride 1, zero padding, to [B, H, W, O].

  It equals `lax.conv_general_dilated` in value and gradient (reverse mode only). On CPU the
  gradient is written out as two plain NHWC/HWIO convolutions: XLA:CPU takes its fast path for this
  layout only, and inside the body of a loop nothing rewrites the transposed layout of the automatic
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
  """Applies a 3x3 convolution with bias: x [B, H, W, I] -> [B, H, W, features]; see `conv3x3`."""

  features: int
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', self.kernel_init, (3, 3, x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    y = conv3x3(x.astype(self.dtype), kernel.astype(self.dtype))
    return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)
