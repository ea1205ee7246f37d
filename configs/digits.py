"""The 1,797 real 8 x 8 digits that come with scikit-learn: nothing to download.

python -m vdm.main --config=configs/digits.py

The loss is the bound, times are drawn by VDM++'s adaptive schedule between fixed end points, and
the optimizer is Muon: of the recipes in docs/recipe.md this one learns fastest.
"""

from ml_collections import ConfigDict
from vdm.configs import default


def get_config(arg=''):
  """See configs/default.py, whose data block is this one's."""
  config = default.get_config()
  with config.unlocked():
    config.name = 'digits'
    config.model.update(width=32, num_blocks=2, dropout=0.0)
    config.schedule = ConfigDict(dict(name='adaptive', log_snr_min=-5.0, log_snr_max=8.0))
    config.optimizer.update(kind='muon', learning_rate=8e-3, decay='linear', clip_norm=1.0)
    config.ema.halflife_images = 5_000
    config.train.update(batch_size=64, num_steps=1200, log_every_steps=100, eval_every_steps=400)
    config.eval.update(batch_size=360, draws=32)
    config.sample.sampler.name = 'dpmpp_2m'
    config.sample.num_steps = 50
    config.fid.update(train_every_steps=400, train_images=360)
    config.checkpoint.every_steps = 400
    if arg == 'debug':
      default.debug(config)
  return config.lock()
