"""Fashion-MNIST by class, 24 epochs: three and a half minutes of one H100.

  python -m vdm.main --config=configs/fashion_mnist_full.py --config.data.dir=DIR

2.641 bits/dim on all 10,000 test images (benchmarks/H100.md).

VDM's U-Net at width 128 with four blocks a side, the bound as the loss, times by VDM++'s adaptive
schedule between fixed end points, and Muon. Labels are withheld from a tenth of training's images,
for guidance. Bits/dim are of the images given their classes, which is at most log2(10) / 784 = .004
below that of the images alone.
"""

from ml_collections import ConfigDict
from vdm.configs import default, fashion_mnist


def get_config(arg=''):
  """5.3 M parameters, the bound by the adaptive schedule."""
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = 'fashion_mnist_full'
    config.model.update(width=128, num_blocks=4, dropout=0.1, class_conditional=True)
    config.schedule = ConfigDict(dict(name='adaptive', log_snr_min=-6.0, log_snr_max=13.3))
    config.optimizer.update(
      kind='muon', learning_rate=6e-3, warmup_steps=200, decay='linear', clip_norm=1.0
    )
    config.ema.update(halflife_images=100_000, rampup_ratio=0.05)
    config.train.update(
      batch_size=256,
      num_steps=5600,
      log_every_steps=200,
      eval_every_steps=1120,
      label_dropout=0.1,
    )
    config.eval.update(batch_size=1000, draws=4, max_images=0)
    config.sample.sampler.name = 'heun'
    config.sample.grid = ConfigDict(dict(name='edm_train', std=5.0))
    config.sample.update(batch_size=1000, num_images=10_000, num_steps=40, denoise_last=True)
    config.fid.update(train_every_steps=0, num_images=10_000)
    config.checkpoint.every_steps = 1120
    if arg == 'debug':
      default.debug(config)
  return config.lock()
