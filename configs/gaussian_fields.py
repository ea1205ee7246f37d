"""Periodic Gaussian fields given what a noisy instrument saw of them: the truth is known exactly.

python -m vdm.main --config=configs/gaussian_fields.py

Fields 16 x 16, embedded, given their blurred and noisy images. The bound is to be set beside the
exact E[-log p(u | y)], which the log says. It is above it by 1.2 % of what y tells, after 86
minutes on two CPU cores beside other work.
"""

from vdm.configs import default


def get_config(arg=''):
  """See configs/default.py."""
  config = default.get_config()
  with config.unlocked():
    config.name = 'gaussian_fields'
    config.data.update(
      name='gaussian_field',
      train_images=20_000,
      eval_images=512,
      image_shape=(16, 16, 1),
      condition_shape=(16, 16, 1),
      num_values=0,
      num_classes=0,
    )
    config.decoder.name = 'normal'
    config.schedule.update(log_snr_min=-8.0, log_snr_max=10.0)
    config.model.update(
      width=32, num_blocks=2, dropout=0.0, fourier_exponents=(), padding='periodic'
    )
    config.optimizer.update(learning_rate=2e-3, decay='cosine', clip_norm=1.0)
    config.ema.halflife_images = 5_000
    config.train.update(batch_size=64, num_steps=4000, log_every_steps=100, eval_every_steps=1000)
    config.eval.update(batch_size=128, draws=16)
    config.eval.ode.dequantization = 'none'
    config.sample.sampler.name = 'dpmpp_2m'
    config.sample.num_steps = 50
    config.checkpoint.every_steps = 1000
    if arg == 'debug':
      default.debug(config)
  return config.lock()
