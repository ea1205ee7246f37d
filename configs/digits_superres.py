"""Digits 8 x 8 given their means over 2 x 2 pixels: super-resolution, by the config alone.

python -m vdm.main --config=configs/digits_superres.py

For inpainting, the middle given the rest, add --config.data.derive=inpainting
--config.data.masked=True --config.data.condition_shape=8,8,1
"""

from vdm.configs import default, digits


def get_config(arg=''):
  """As configs/digits.py, whose bits/dim it is to be set beside: what the means do not say."""
  config = digits.get_config()
  with config.unlocked():
    config.name = 'digits_superres'
    config.data.update(derive='low_resolution', condition_shape=(4, 4, 1))
    config.fid.train_every_steps = 0  # samples follow the conditions of the evaluation split
    if arg == 'debug':
      default.debug(config)
  return config.lock()
