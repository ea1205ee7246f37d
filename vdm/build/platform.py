"""Says what 'auto' means on a platform."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdm.errors import require


def for_platform(model: ConfigDict, platform: str) -> ConfigDict:
  """Returns a copy of config.model in which 'auto' is what it means on 'cpu', 'gpu' or 'tpu'.

  Without it 'auto' is for the platform at hand. Layers choose as they are lowered.
  """
  model = model.copy_and_resolve_references()
  model.dtype = dtype(model.dtype, platform).name
  if 'scan_blocks' in model:
    model.scan_blocks = 'on' if scan_blocks(model, platform) else 'off'
  return model


def dtype(name: str, platform: str = '') -> jnp.dtype:
  """Returns the dtype of activations, config.model.dtype, on `platform` or on what is at hand."""
  require(
    name in ('auto', 'float32', 'bfloat16'),
    'config.model.dtype',
    name,
    "'auto', 'float32' or 'bfloat16'",
    'auto means bfloat16 on TPU and GPU, float32 on CPU',
  )
  if name == 'auto':
    name = 'float32' if (platform or jax.default_backend()) == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def scan_blocks(model: ConfigDict, platform: str = '') -> bool:
  """Returns whether the network of config.model runs its equal blocks in a loop.

  One that has no such choice does not; by default none does on CPU, where convolutions in a loop
  have been slow (`vdm.nn.convolution.conv3`).
  """
  if 'scan_blocks' not in model:
    return False
  choice = model.scan_blocks
  require(
    choice in ('auto', 'on', 'off'),
    'config.model.scan_blocks',
    choice,
    "'auto', 'on' or 'off'",
    'auto means on, but off on CPU',
  )
  platform = platform or jax.default_backend()
  return choice == 'on' or (choice == 'auto' and platform != 'cpu')
