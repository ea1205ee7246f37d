"""ImageNet at 256 x 256, class-conditional: VDM++'s setting (arXiv 2303.00848) with a U-ViT.

  python -m vdm.main --config=configs/imagenet256.py --config.data.dir=DIR

As configs/imagenet128.py, on patches of 2 pixels, with a larger transformer. The paper reports FID
2.40, with guidance 2.12. Ours: not trained; sizes and training are our choice.
"""

from vdm.configs import default, imagenet128


def get_config(arg=''):
  """U-ViT, v, adaptive, shifted sigmoid weighting, guidance in an interval."""
  config = imagenet128.get_config()
  with config.unlocked():
    config.name = 'imagenet256'
    config.data.image_shape = (256, 256, 3)
    config.model.update(
      widths=(256, 512, 1024), patch_size=2, transformer_width=1536, transformer_depth=24
    )
    config.schedule.log_snr_min = -12.8
    config.weighting.image_size = 256
    if arg == 'debug':
      default.debug(config)
  return config.lock()
