"""CIFAR-10 with flips and quarter turns, VDM's published settings (arXiv 2107.00630, table 5).

  python -m vdm.main --config=configs/cifar10_aug.py --config.data.dir=DIR

The network is told which images were changed, and is evaluated and sampled as if none were. The
paper reports 2.49 bits/dim, its authors 2.52 for their public checkpoint; we have not trained it to
the end.

Cost: 0.93 TFLOP an image, 9.5e20 FLOP a million steps: about 220 days of an accelerator that
sustains 50 TFLOP/s, 55 of one that sustains 200. We do not know the paper's number of steps; the
public code goes on to 100 M, this config to 10 M.
"""

from vdm.configs import default


def get_config(arg=''):
  """VDM's U-Net of width 256 with 32 blocks a side and attention in each, learned schedule."""
  config = default.get_config()
  with config.unlocked():
    config.name = 'cifar10_aug'
    config.data.update(
      name='cifar10',
      train_images=50_000,
      eval_images=10_000,
      image_shape=(32, 32, 3),
      num_values=256,
      num_classes=10,
      flip=True,
      rotate=True,
    )
    config.model.update(
      width=256,
      num_blocks=32,
      attention=True,
      fourier_exponents=(6, 7),
      dropout=0.05,
      augmentation_flag=True,
    )
    config.schedule = dict(name='learned_net', log_snr_min=-5.0, log_snr_max=13.3)
    # the paper's decay of 0.9999 a step, at its batch of 1024; no ramp
    config.ema.update(halflife_images=7_097_500, rampup_ratio=0.0)
    config.train.update(
      batch_size=1024, num_steps=10_000_000, log_every_steps=1000, eval_every_steps=10_000
    )
    config.eval.update(batch_size=1024, draws=4)
    config.sample.num_steps = 1000
    config.fid.features = 'inception'
    config.checkpoint.every_steps = 10_000
    if arg == 'debug':
      default.debug(config)
  return config.lock()
