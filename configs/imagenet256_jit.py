"""ImageNet at 256 x 256, class-conditional: JiT-B/16 (arXiv 2511.13720), a plain transformer.

  python -m vdm.main --config=configs/imagenet256_jit.py --config.data.dir=DIR
  python -m vdm.main --config=configs/imagenet256_jit.py:600 --config.data.dir=DIR

Patches of 16 x 16 pixels, of which x is predicted and the loss is that of the flow's velocity, at
logit-normal times: by log-SNR, N(-1.6, 1.6^2) is the density of the schedule and, times the ratio
of that loss to eps's, the weighting. 200 epochs in batches of 1024, Adam at 2e-4 after five epochs
of warm-up, no decay of either kind, no dropout but a tenth of the labels; Heun's method. :600 has
600 epochs. The L and H of the paper are (width, num_blocks, head_width, bottleneck,
conditioning_width) = (1024, 24, 64, 128, 256) and (1280, 32, 80, 256, 320), H with dropout.

What differs: 32 tokens for the class are not here, positions are learned, norms have no gains but
those of queries and keys, the class and the noise level begin as in VDM's networks (embeddings of
unit variance) where DiT's begin at .02, and the network reads
alpha x + sigma eps, of about unit variance, and a time that is linear in log-SNR. The paper bounds
the division by the noise level at .05, log-SNR 5.9, beyond which 1e-6 of its times lie; here
log-SNR ends at 8, and bits/dim of a model that never saw less noise say little. Of the paper's
averages this is the one of rate .9999, a half-life of 7.1 M images. Its interval of guidance, from
t = .1 on, is log-SNR from -4.4 on. Images are scaled and cropped as ADM's.

The paper reports FID 4.37, and 3.66 after 600 epochs, guided. Ours: not trained.
"""

from ml_collections import ConfigDict
from vdm.configs import default, imagenet256

STEPS_PER_EPOCH = 1251  # of 1024 images


def get_config(arg=''):
  """131 M parameters, x, normal log-SNR, the loss of the flow, guidance in an interval."""
  config = imagenet256.get_config()
  epochs = 600 if arg == '600' else 200
  with config.unlocked():
    config.name = 'imagenet256_jit'
    config.model = ConfigDict(
      dict(
        name='dit',
        output='x',
        width=768,
        num_blocks=12,
        head_width=64,
        patch_size=16,
        bottleneck=128,
        conditioning_width=192,
        dropout=0.0,
        class_conditional=True,
        condition_on='live',
        scan_blocks='auto',
        remat=False,
        dtype='auto',
      )
    )
    times = dict(mean=-1.6, std=1.6)
    ends = dict(log_snr_min=-12.8, log_snr_max=8.0)
    config.schedule = ConfigDict(dict(name='edm_train', **ends, **times))
    config.weighting = ConfigDict(dict(name='sd3', head='o', **times))
    config.optimizer.update(
      learning_rate=2e-4, warmup_steps=5 * STEPS_PER_EPOCH, b1=0.9, b2=0.95, clip_norm=0.0
    )
    config.optimizer.weight_decay = 0.0
    config.ema.update(halflife_images=7_100_000, rampup_ratio=0.0)
    config.train.update(batch_size=1024, num_steps=epochs * STEPS_PER_EPOCH, label_dropout=0.1)
    config.sample.sampler = ConfigDict(dict(name='heun'))
    config.sample.grid = ConfigDict(dict(name='flow_matching'))
    config.sample.num_steps = 50
    config.sample.guidance.update(weight=2.9, log_snr_min=-4.4, log_snr_max=100.0)
    if arg == 'debug':
      default.debug(config)
  return config.lock()
