"""Fashion-MNIST by class, VDM++ on a laptop CPU: garments one can name, in a quarter of an hour.

  python -m vdm.main --config=configs/fashion_mnist_pp.py --config.data.dir=DIR

Head v, the adaptive schedule and the sigmoid weighting of VDM++ on a small U-ViT. Labels are
withheld from a tenth of training's images, for guidance:
--mode=sample --config.sample.guidance.kind=classifier_free --config.sample.guidance.weight=2
"""

from ml_collections import ConfigDict
from vdm.configs import default, fashion_mnist


def get_config(arg=''):
  """The data of configs/fashion_mnist.py with labels, trained for its samples."""
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = 'fashion_mnist_pp'
    config.model = ConfigDict(
      dict(
        name='uvit',
        output='v',
        widths=(64,),
        num_blocks=1,
        transformer_width=128,
        transformer_depth=4,
        head_width=32,
        patch_size=2,
        conditioning_width=64,
        dropout=0.0,
        class_conditional=True,
        condition_on='live',
        dtype='auto',
      )
    )
    config.schedule = ConfigDict(dict(name='adaptive', log_snr_min=-9.0, log_snr_max=13.3))
    config.weighting = ConfigDict(dict(name='sigmoid', bias=2.0))
    config.optimizer.update(kind='adamw', learning_rate=1e-3, decay='cosine')
    config.ema.halflife_images = 20_000
    config.train.update(
      batch_size=64, num_steps=1500, log_every_steps=50, eval_every_steps=500, label_dropout=0.1
    )
    config.sample.num_steps = 32
    config.fid.train_every_steps = 500
    config.sample.grid = ConfigDict(dict(name='edm_train', std=5.0))
    config.checkpoint.every_steps = 500
    if arg == 'debug':
      default.debug(config)
  return config.lock()
