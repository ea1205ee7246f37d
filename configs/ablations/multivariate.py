"""Does a path by pixel pay? Learned schedules against each other on the digits, three seeds each.

  python -m vdm.ablate --config=configs/ablations/multivariate.py --workdir=DIR --workers=2
  python -m vdm.ablate --config=configs/ablations/multivariate.py:fashion_mnist --workdir=DIR \
    --config.base.data.dir=DIR --workers=2

Nine runs of configs/digits.py, alike but for the schedule, and the same number of steps each.
`learned_multivariate` alone has a bound that its path can lower. :fashion_mnist is the same by the
small U-ViT of fashion_mnist_uvit.py on 28 x 28 garments. --config=...:debug has one seed and four
steps.
"""

from ml_collections import ConfigDict
from vdm.configs import default, digits, fashion_mnist_uvit

SCHEDULES = {
  'learned_endpoints': {},
  'learned_net': {},
  'learned_multivariate': dict(per='dimension'),
}


def get_config(arg=''):
  """See vdm/ablate.py: `base`, `axes`, `evaluations`, `reference`."""
  fashion = arg == 'fashion_mnist'
  base = (fashion_mnist_uvit if fashion else digits).get_config()
  with base.unlocked():
    base.name = 'multivariate'
    if fashion:
      base.schedule.log_snr_min = -6.0
      base.eval.draws = 8
    base.fid.train_every_steps = 0
    base.train.update(eval_every_steps=base.train.num_steps // 3, log_every_steps=50)
    base.eval.params = 'raw'
    base.sample.update(num_images=360, batch_size=72, preview_images=36)
    base.checkpoint.update(every_steps=base.train.num_steps, keep=1)
    if arg == 'debug':
      default.debug(base)
  ends = dict(log_snr_min=None, log_snr_max=None)  # None: those of base
  axes = dict(
    schedule={
      name: dict(schedule=dict(name=name, **ends, **leaves)) for name, leaves in SCHEDULES.items()
    },
    seed={str(seed): dict(seed=seed) for seed in range(3 if arg != 'debug' else 1)},
  )
  reference = dict(schedule='learned_endpoints')
  return ConfigDict(dict(base=base, axes=axes, evaluations=(16,), reference=reference)).lock()
