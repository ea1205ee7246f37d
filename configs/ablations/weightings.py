"""Every weighting on `digits_pp`, three seeds each: which loss makes which samples and bits/dim.

  python -m vdm.ablate --config=configs/ablations/weightings.py --workdir=DIR --workers=2

36 runs of 300 steps. --config=...:debug has two weightings, one seed and four steps.
"""

from ml_collections import ConfigDict
from vdm.configs import digits_pp

from vdm.diffusion.weightings import WEIGHTINGS


def get_config(arg=''):
  """See vdm/ablate.py: `base`, `axes`, `evaluations`, `reference`."""
  base = digits_pp.get_config(arg)
  with base.unlocked():
    base.name = 'weightings'
    if arg != 'debug':
      base.fid.train_every_steps = 0  # runs are scored at their end
      base.train.update(num_steps=300, eval_every_steps=150, log_every_steps=20)
      base.eval.update(draws=4, params='ema')
      base.sample.update(num_images=360, batch_size=72, preview_images=36)
      base.checkpoint.update(every_steps=300, keep=1)
  weightings = [name for name in WEIGHTINGS if arg != 'debug' or name in ('elbo', 'sigmoid')]
  seeds = range(3 if arg != 'debug' else 1)
  axes = dict(
    weighting={name: dict(weighting=dict(name=name)) for name in weightings},
    seed={str(seed): dict(seed=seed) for seed in seeds},
  )
  return ConfigDict(dict(base=base, axes=axes, evaluations=(4, 8, 16, 32), reference={})).lock()
