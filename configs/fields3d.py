"""Periodic Gaussian fields in three dimensions, 16^3 on a CPU, 64^3 and 128^3 on accelerators.

python -m vdm.main --config=configs/fields3d.py
python -m vdm.main --config=configs/fields3d.py --mode=plan --topology=v5e:2x4 \\
  --config.data.image_shape=64,64,64,1 --config.model.channel_multipliers=1,2,4

Attention is over all positions of the coarsest level: a larger field wants more levels.
"""

from vdm.configs import default, gaussian_fields


def get_config(arg=''):
  """Unconditional; the network halves the field between its levels."""
  config = gaussian_fields.get_config()
  with config.unlocked():
    config.name = 'fields3d'
    config.data.update(
      image_shape=(16, 16, 16, 1), condition_shape=(), train_images=2000, eval_images=64
    )
    kept = ('output', 'class_conditional', 'condition_on', 'dtype', 'dropout', 'norm_groups')
    config.model = {name: config.model[name] for name in kept} | dict(
      name='adm_unet',
      width=16,
      channel_multipliers=(1, 2),
      num_blocks=1,
      attention_resolutions=(),
      head_width=16,
      padding='periodic',
    )
    config.train.update(batch_size=8, num_steps=1000)
    config.eval.update(batch_size=8, draws=4)
    config.sample.update(num_images=16, preview_images=16, batch_size=16)
    if arg == 'debug':
      default.debug(config)
  return config.lock()
