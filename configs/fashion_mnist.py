"""Fashion-MNIST, 28 x 28 grey: a real data set on a laptop CPU.

python -m vdm.main --config=configs/fashion_mnist.py --config.data.dir=DIR
"""

from vdm.configs import default


def get_config(arg=''):
  """A small VDM U-Net, learned end points, Muon."""
  config = default.get_config()
  with config.unlocked():
    config.name = 'fashion_mnist'
    config.data.update(
      name='fashion_mnist',
      train_images=60_000,
      eval_images=10_000,
      image_shape=(28, 28, 1),
      num_values=256,
      num_classes=10,
    )
    config.model.update(width=32, num_blocks=2, fourier_exponents=(6, 7), dropout=0.0)
    config.schedule.update(log_snr_min=-5.0, log_snr_max=13.3)
    config.optimizer.update(kind='muon', learning_rate=8e-3, decay='linear', clip_norm=1.0)
    config.ema.halflife_images = 5_000
    config.train.update(batch_size=32, num_steps=1200, log_every_steps=50, eval_every_steps=300)
    config.eval.update(batch_size=200, draws=2, max_images=1000)
    config.sample.sampler.name = 'dpmpp_2m'
    config.sample.update(batch_size=64, num_steps=25)
    config.fid.update(train_every_steps=300, train_images=500)
    config.checkpoint.every_steps = 300
    if arg == 'debug':
      default.debug(config)
  return config.lock()
