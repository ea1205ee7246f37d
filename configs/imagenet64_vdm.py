"""ImageNet at 64 x 64, the old set, VDM's published settings (arXiv 2107.00630, table 5).

  python -m vdm.main --config=configs/imagenet64_vdm.py --config.data.dir=DIR

The old set is van den Oord's (arXiv 1601.06759; TFDS downsampled_imagenet 2.0.0, no labels). The
new one (arXiv 1707.08819; TFDS imagenet_resized 0.1.0, box-filtered, with labels; imagenet64.py)
has other pixels: numbers of the two never share a table. The paper reports 3.40 bits/dim on the
old; we have not trained it to the end.

Cost: 4.9 TFLOP an image, 6.3e21 FLOP in all: about four years of an accelerator that sustains
50 TFLOP/s, one of one that sustains 200.
"""

from vdm.configs import default


def get_config(arg=''):
  """VDM's U-Net of width 256 with 64 blocks a side, learned end points; no labels, no flips."""
  config = default.get_config()
  with config.unlocked():
    config.name = 'imagenet64_vdm'
    config.data.update(
      name='downsampled_imagenet/64x64',
      eval_split='validation',
      train_images=1_281_149,
      eval_images=49_999,
      image_shape=(64, 64, 3),
      num_values=256,
      num_classes=0,
    )
    config.model.update(width=256, num_blocks=64, fourier_exponents=(6, 7), dropout=0.1)
    config.schedule.update(log_snr_min=-5.0, log_snr_max=13.3)
    # the paper's decay of 0.9999 a step, at its batch of 128; no ramp
    config.ema.update(halflife_images=887_200, rampup_ratio=0.0)
    config.train.update(
      batch_size=128, num_steps=10_000_000, log_every_steps=1000, eval_every_steps=50_000
    )
    config.eval.update(batch_size=128, draws=1)
    config.sample.num_steps = 1000
    config.fid.features = 'inception'
    config.checkpoint.every_steps = 10_000
    if arg == 'debug':
      default.debug(config)
  return config.lock()
