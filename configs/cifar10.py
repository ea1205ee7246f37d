"""CIFAR-10 without augmentation, VDM's published settings (arXiv 2107.00630, table 5).

  python -m vdm.main --config=configs/cifar10.py --config.data.dir=DIR

Cost: 155 GFLOP an image, 2.0e20 FLOP in all: about 46 days of an accelerator that sustains
50 TFLOP/s, 12 of one that sustains 200. The paper reports 2.65 bits/dim after 10 M steps; we have
not trained it to the end.
"""

from vdm.configs import default


def get_config(arg=''):
  """VDM's U-Net of width 128 with 32 blocks a side, learned end points."""
  config = default.get_config()
  with config.unlocked():
    config.name = 'cifar10'
    config.data.update(
      name='cifar10',
      train_images=50_000,
      eval_images=10_000,
      image_shape=(32, 32, 3),
      num_values=256,
      num_classes=10,
    )
    config.model.update(width=128, num_blocks=32, fourier_exponents=(6, 7), dropout=0.1)
    config.schedule.update(log_snr_min=-5.0, log_snr_max=13.3)
    # the paper's decay of 0.9999 a step, at its batch of 128; no ramp
    config.ema.update(halflife_images=887_200, rampup_ratio=0.0)
    config.train.update(
      batch_size=128, num_steps=10_000_000, log_every_steps=1000, eval_every_steps=10_000
    )
    config.eval.update(batch_size=128, draws=4)
    config.sample.num_steps = 1000
    config.fid.features = 'inception'
    config.checkpoint.every_steps = 10_000
    if arg == 'debug':
      default.debug(config)
  return config.lock()
