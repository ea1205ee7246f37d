"""The digits of configs/digits.py for 16,000 steps instead of 1,200, with learned end points.

  python -m vdm.main --config=configs/digits_full.py

1.710 bits/dim on the 360 test images: 71 minutes on two CPU cores beside other work, by Adam. The
averaged parameters are pretrained/digits, which comes with the package.
"""

from ml_collections import ConfigDict
from vdm.configs import default, digits


def get_config(arg=''):
  """The same network, with dropout, which 1,437 images need by then."""
  config = digits.get_config()
  with config.unlocked():
    config.name = 'digits_full'
    config.model.dropout = 0.1
    ends = dict(log_snr_min=-5.0, log_snr_max=8.0)
    config.schedule = ConfigDict(dict(name='learned_endpoints', **ends))
    config.optimizer.update(kind='adamw', learning_rate=2e-3, decay='cosine')
    config.ema.update(halflife_images=20_000, rampup_ratio=0.05)
    config.train.update(num_steps=16_000, log_every_steps=400, eval_every_steps=2000)
    config.fid.train_every_steps = 4000
    config.checkpoint.every_steps = 2000
    if arg == 'debug':
      default.debug(config)
  return config.lock()
