"""ImageNet at 64 x 64 (box-filtered, TFDS imagenet_resized), class-conditional.

  python -m vdm.main --config=configs/imagenet64.py --config.data.dir=DIR

The network is VDM's published one for 64 x 64: width 256, 64 blocks a side, 238 M parameters,
about 5 TFLOP an image: a pod's work. The paper's 3.40 bits/dim is on another set (van den Oord's,
TFDS downsampled_imagenet, without labels) and must not be compared with what this prints; we have
not trained it to the end.
"""

from vdm.configs import default


def get_config(arg=''):
  """VDM's U-Net of width 256 with 64 blocks a side, learned end points, labels."""
  config = default.get_config()
  with config.unlocked():
    config.name = 'imagenet64'
    config.data.update(
      name='imagenet_resized/64x64',
      eval_split='validation',
      train_images=1_281_167,
      eval_images=50_000,
      image_shape=(64, 64, 3),
      num_values=256,
      num_classes=1000,
      flip=True,
    )
    config.model.update(
      width=256, num_blocks=64, fourier_exponents=(6, 7), dropout=0.1, class_conditional=True
    )
    config.schedule.update(log_snr_min=-5.0, log_snr_max=13.3)
    config.ema.update(halflife_images=887_200, rampup_ratio=0.0)
    config.train.update(
      batch_size=128, num_steps=10_000_000, log_every_steps=1000, eval_every_steps=50_000
    )
    config.eval.update(batch_size=128, draws=1)
    config.sample.num_steps = 1000
    config.checkpoint.every_steps = 10_000
    if arg == 'debug':
      default.debug(config)
  return config.lock()
