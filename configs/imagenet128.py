"""ImageNet at 128 x 128, class-conditional: VDM++'s setting (arXiv 2303.00848) with a U-ViT.

  python -m vdm.main --config=configs/imagenet128.py --config.data.dir=DIR

A residual U-ViT: convolutions at 128 to 32, a transformer at 16.
Head v, adaptive schedule, the sigmoid weighting moved to this resolution, labels withheld from a
tenth of training's images. Images are those of TFDS imagenet2012, scaled and cropped as ADM's.

The paper reports FID 1.75 without guidance. Ours: not trained. Network sizes, batch,
learning rate, average, steps, guidance weight and interval are our choice; the paper's could not be
read. Cost: a pod's work; `python -m benchmarks.parameters` counts the parameters.
"""

from ml_collections import ConfigDict
from vdm.configs import default


def get_config(arg=''):
  """U-ViT, v, adaptive, shifted sigmoid weighting, guidance in an interval."""
  config = default.get_config()
  with config.unlocked():
    config.name = 'imagenet128'
    config.data.update(
      name='imagenet2012',
      eval_split='validation',
      train_images=1_281_167,
      eval_images=50_000,
      image_shape=(128, 128, 3),
      resize=True,
      num_values=256,
      num_classes=1000,
      flip=True,
    )
    config.model = ConfigDict(
      dict(
        name='uvit',
        output='v',
        widths=(128, 256, 512),
        num_blocks=3,
        transformer_width=1024,
        transformer_depth=16,
        head_width=128,
        patch_size=1,
        skip='residual',
        dropout=0.1,  # in the transformer alone
        class_conditional=True,
        augmentation_flag=False,
        condition_on='live',
        scan_blocks='auto',
        remat=True,
        dtype='auto',
      )
    )
    config.schedule = ConfigDict(
      dict(name='adaptive', log_snr_min=-11.4, log_snr_max=13.0, num_bins=100, decay=0.999)
    )
    config.weighting = ConfigDict(dict(name='sigmoid', bias=2.0, image_size=128))
    config.optimizer.update(learning_rate=1e-4, warmup_steps=10_000, clip_norm=1.0)
    config.ema.update(halflife_images=10_000_000, rampup_ratio=0.05)
    config.train.update(
      batch_size=2048,
      num_steps=500_000,
      label_dropout=0.1,
      log_every_steps=100,
      eval_every_steps=10_000,
    )
    config.eval.update(batch_size=256, draws=1)
    config.sample.update(num_images=64, batch_size=64, num_steps=512)
    config.sample.sampler.variance = 0.3
    config.sample.guidance.update(
      kind='classifier_free', weight=1.5, log_snr_min=-4.0, log_snr_max=6.0
    )
    config.fid.features = 'inception'
    config.checkpoint.every_steps = 2500
    if arg == 'debug':
      default.debug(config)
  return config.lock()
