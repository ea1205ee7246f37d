"""ImageNet at 64 x 64, class-conditional: the headline run of VDM++ (arXiv 2303.00848).

  python -m vdm.main --config=configs/imagenet64.py --config.data.dir=DIR

ADM's U-Net (295.9 M parameters), EDM's head F, the adaptive schedule, EDM's weighting made
monotone, EDM's stochastic sampler with 511 network evaluations an image.

The paper reports FID 1.43 with this combination. Ours: not trained to the end. Its network, head,
schedule, weighting and sampler are the paper's; batch, learning rate, dropout, average and the
2.5 billion images are those that EDM states for the same network (FID 1.36), for the paper's own
could not be read; the range of log-SNR is ours. The data are TFDS imagenet_resized/64x64, 1,281,167
images with labels: bits/dim here must not be compared with those of van den Oord's older set
(`imagenet64_vdm`), nor FID with one against another reference.

Cost: 0.20 TFLOP an image forward (XLA's count), three times that to train on it, 1.5e21 FLOP in
all: 87 days of an accelerator that sustains 200 TFLOP/s, so a pod's or a large node's work.
"""

from ml_collections import ConfigDict
from vdm.configs import default


def get_config(arg=''):
  """ADM U-Net, F, adaptive, edm_monotonic, EDM's sampler."""
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
    )
    config.model = ConfigDict(
      dict(
        name='adm_unet',
        output='F',
        width=192,
        channel_multipliers=(1, 2, 3, 4),
        num_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_width=64,
        dropout=0.1,
        class_conditional=True,
        augmentation_flag=False,
        condition_on='live',
        remat=False,
        dtype='auto',
      )
    )
    config.schedule = ConfigDict(
      dict(name='adaptive', log_snr_min=-10.0, log_snr_max=14.0, num_bins=100, decay=0.999)
    )
    config.weighting = ConfigDict(dict(name='edm_monotonic'))
    config.optimizer.update(learning_rate=1e-4, warmup_steps=2500, b2=0.999, weight_decay=0.0)
    config.ema.update(halflife_images=50_000_000, rampup_ratio=0.05)
    config.train.update(
      batch_size=4096, num_steps=610_000, log_every_steps=100, eval_every_steps=10_000
    )
    config.eval.update(batch_size=512, draws=1)
    config.sample.update(num_images=64, batch_size=64, num_steps=256, denoise_last=True)
    config.sample.sampler.update(name='heun', s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    config.sample.grid = ConfigDict(
      dict(name='edm_sample', sigma_min=0.002, sigma_max=80.0, rho=7.0)
    )
    config.fid.features = 'inception'
    config.checkpoint.every_steps = 2500
    if arg == 'debug':
      default.debug(config)
  return config.lock()
