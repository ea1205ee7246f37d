"""Fashion-MNIST by class, VDM++ on a laptop CPU.

  python -m vdm.main --config=configs/fashion_mnist_pp.py --config.data.dir=DIR

Head v, the adaptive schedule and the sigmoid weighting of VDM++, on VDM's small U-Net: minutes on a
laptop. Labels are withheld from a tenth of training's images, for guidance:
--mode=sample --config.sample.guidance.kind=classifier_free --config.sample.guidance.weight=2
"""

from ml_collections import ConfigDict
from vdm.configs import default, fashion_mnist


def get_config(arg=''):
  """The network of configs/fashion_mnist.py with labels, trained for its samples."""
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = 'fashion_mnist_pp'
    config.model.update(output='v', class_conditional=True)
    config.schedule = ConfigDict(dict(name='adaptive', log_snr_min=-9.0, log_snr_max=13.3))
    config.weighting = ConfigDict(dict(name='sigmoid', bias=2.0))
    config.train.label_dropout = 0.1
    config.sample.sampler.name = 'dpmpp_2m'
    config.sample.num_steps = 32
    config.sample.grid = ConfigDict(dict(name='cosine'))
    if arg == 'debug':
      default.debug(config)
  return config.lock()
