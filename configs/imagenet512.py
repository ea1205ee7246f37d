"""ImageNet at 512 x 512, class-conditional: VDM++'s setting (arXiv 2303.00848) with a U-ViT.

  python -m vdm.main --config=configs/imagenet512.py --config.data.dir=DIR

As configs/imagenet128.py, on patches of 4 pixels, with a larger transformer. The paper reports FID
2.99, with guidance 2.65. Ours: not trained; sizes and training are our choice.
"""

from vdm.configs import default, imagenet128


def get_config(arg=''):
  """U-ViT, v, adaptive, shifted sigmoid weighting, guidance in an interval."""
  config = imagenet128.get_config()
  with config.unlocked():
    config.name = 'imagenet512'
    config.data.image_shape = (512, 512, 3)
    config.model.update(
      widths=(256, 512, 1024), patch_size=4, transformer_width=2048, transformer_depth=36
    )
    config.schedule.log_snr_min = -14.2
    config.weighting.image_size = 512
    if arg == 'debug':
      default.debug(config)
  return config.lock()
