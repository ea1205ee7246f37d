"""Does a path by pixel pay? Learned schedules against each other on the digits, three seeds each.

  python -m vdm.ablate --config=configs/ablations/multivariate.py --workdir=runs/multivariate \
    --workers=2

Nine runs of the small U-Net, alike but for the schedule, and the same number of steps each.
`learned_multivariate` alone has a bound that its path can lower. --config=...:fashion_mnist is the
same on 28 x 28 garments, with --config.base.data.dir=DIR. --config=...:debug has one seed and four
steps.
"""

from ml_collections import ConfigDict
from vdm.configs import default, digits, fashion_mnist

SCHEDULES = {
  'learned_endpoints': {},
  'learned_net': {},
  'learned_multivariate': dict(per='dimension'),
}


def get_config(arg=''):
  """See vdm/ablate.py: `base`, `axes`, `evaluations`, `reference`."""
  base = fashion_mnist.get_config() if arg == 'fashion_mnist' else digits.get_config()
  steps = 600
  with base.unlocked():
    base.name = 'multivariate'
    rate = 1e-3 if arg == 'fashion_mnist' else 2e-3
    base.optimizer.update(kind='adamw', learning_rate=rate, decay='cosine', schedule_rate=10.0)
    base.fid.train_every_steps = 0
    base.train.update(num_steps=steps, eval_every_steps=steps // 3, log_every_steps=20)
    base.eval.params = 'ema'
    base.sample.update(num_images=360, batch_size=72, preview_images=36)
    base.checkpoint.update(every_steps=steps, keep=1)
    if arg == 'debug':
      default.debug(base)
  ends = {leaf: base.schedule[leaf] for leaf in ('log_snr_min', 'log_snr_max')}
  axes = dict(
    schedule={
      name: dict(schedule=dict(name=name, **ends, **leaves)) for name, leaves in SCHEDULES.items()
    },
    seed={str(seed): dict(seed=seed) for seed in range(3 if arg != 'debug' else 1)},
  )
  reference = dict(schedule='learned_endpoints')
  return ConfigDict(dict(base=base, axes=axes, evaluations=(16,), reference=reference)).lock()
