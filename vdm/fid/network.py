"""Every feature extractor is a name, parameters, and two pure functions of images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdm.errors import require
from vdm.fid import inception, weights

Features = dict[str, Any]  # 'features' [B, D]; and, if any, 'spatial' [B, S], 'logits'


class Network(NamedTuple):
  """Holds a feature extractor.

  Attributes:
    name: what a reference must have been made with to be compared; it names the weights too.
    label: short, for the names of metrics: 'fid' for Inception, else fd_<label>.
    sha256: of the parameters.
    num_features: D.
    params: a pytree of arrays.
    prepare: uint8 images [B, H, W, C] -> what `apply` takes; compiled for every size of images.
    apply: (params, prepared) -> Features, in float32.
  """

  name: str
  label: str
  sha256: str
  num_features: int
  params: Any
  prepare: Callable[[jax.Array], jax.Array]
  apply: Callable[[Any, jax.Array], Features]


def to_eight_bits(images: jax.Array, num_values: int) -> jax.Array:
  """Returns pixels 0 .. num_values - 1 as 0 .. 255, rounded, as `vdm.sampling` writes pictures."""
  if num_values == 256:
    return images
  return jnp.round(images.astype(jnp.float32) * (255 / (num_values - 1)))


def inception_network(settings, image_shape: tuple[int, ...], num_values: int) -> Network:
  """Returns the network of `config.fid.features='inception'`.

  Raises:
    ValueError: its weights are not there, or images are neither RGB nor allowed to be made so.
  """
  channels = image_shape[-1]
  require(
    channels == 3 or (channels == 1 and settings.replicate_grey),
    'config.fid.features',
    'inception',
    f'given RGB images, not {channels} channel(s)',
    "use 'classifier', or, for grey ones, --config.fid.replicate_grey=True: three equal channels, "
    'which not every protocol does',
  )
  params, facts = weights.inception(settings.weights)

  def prepare(images):
    eight_bits = to_eight_bits(images, num_values)
    return inception.prepare(jnp.tile(eight_bits, (1, 1, 1, 3 // channels)))

  return Network(
    name=facts['name'],
    label='inception',
    sha256=facts['sha256'],
    num_features=inception.NUM_FEATURES,
    params=weights.nested(params),
    prepare=prepare,
    apply=lambda params, x: inception.Inception().apply({'params': params}, x),
  )


def check_range(images: np.ndarray, num_values: int):
  """Refuses pixels that the extractor was not told of."""
  if images.dtype != np.uint8:
    raise ValueError(f'images have dtype {images.dtype}, must be uint8; quantise them first.')
  if num_values < 256 and images.size and images.max() >= num_values:
    raise ValueError(
      f'images have values up to {images.max()}, must be below '
      f'config.data.num_values={num_values}; give an NPZ of values as drawn, or, for 8-bit '
      'pictures and Inception, set it to 256.'
    )
