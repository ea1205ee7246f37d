"""The embedded 8 x 8 digits by class: a complete VDM++ run in two minutes, nothing to download.

  python -m vdm.main --config=configs/digits_pp.py

Head v, the adaptive schedule and the sigmoid weighting of VDM++, on VDM's small U-Net: minutes on a
laptop. Labels are withheld from a tenth of training's images, for guidance:
--mode=sample --config.sample.guidance.kind=classifier_free --config.sample.guidance.weight=2
"""

from ml_collections import ConfigDict
from vdm.configs import default, digits


def get_config(arg=''):
  """The network of configs/digits.py with labels, trained for its samples."""
  config = digits.get_config()
  with config.unlocked():
    config.name = 'digits_pp'
    config.model.update(output='v', class_conditional=True)
    config.schedule = ConfigDict(dict(name='adaptive', log_snr_min=-8.0, log_snr_max=8.0))
    config.weighting = ConfigDict(dict(name='sigmoid', bias=2.0))
    config.optimizer.update(kind='adamw', learning_rate=2e-3, decay='cosine')
    config.train.label_dropout = 0.1
    config.sample.num_steps = 32
    config.sample.grid = ConfigDict(dict(name='edm_train', std=5.0))
    if arg == 'debug':
      default.debug(config)
  return config.lock()
