"""Signals on one axis: periodic noise with a power-law spectrum, 256 samples, embedded.

python -m vdm.main --config=configs/signals1d.py

For your own, see my_arrays.py: this is the network and the recipe.
"""

from vdm.configs import default, gaussian_fields


def get_config(arg=''):
  """Unconditional, so that the exact entropy is the bound's limit."""
  config = gaussian_fields.get_config()
  with config.unlocked():
    config.name = 'signals1d'
    config.data.update(image_shape=(256, 1), condition_shape=())
    config.data.gaussian_field.exponent = -2.0
    config.train.num_steps = 1000
    if arg == 'debug':
      default.debug(config)
  return config.lock()
