"""The adaptive schedule against fixed ones on Fashion-MNIST, three seeds each.

  python -m vdm.ablate --config=configs/ablations/schedules.py --workdir=runs/schedules \
    --config.base.data.dir=DIR --workers=2

Nine runs of a perceptron and one weighted loss, whose expectation no schedule changes: what changes
is the variance of its estimate (diffusion cv), and with it the steps to `cosine`'s last loss.
--config=...:debug has one seed and four steps.
"""

from ml_collections import ConfigDict
from vdm.configs import default, fashion_mnist_pp

SCHEDULES = ('cosine', 'linear', 'adaptive')


def get_config(arg=''):
  """See vdm/ablate.py: `base`, `axes`, `evaluations`, `reference`."""
  base = fashion_mnist_pp.get_config()
  with base.unlocked():
    base.name = 'schedules'
    base.model = ConfigDict(
      dict(
        name='mlp',
        output='v',
        width=256,
        num_blocks=2,
        fourier_exponents=(),
        dropout=0.0,
        class_conditional=True,
        condition_on='live',
        dtype='auto',
      )
    )
    base.optimizer.decay = 'constant'
    base.fid.train_every_steps = 0
    base.train.update(batch_size=128, num_steps=1500, eval_every_steps=250, log_every_steps=50)
    base.eval.update(max_images=2000, batch_size=500, draws=64, params='raw')
    base.eval.schedule = ConfigDict(dict(name='linear'))  # one for all: its error is alike
    base.sample.update(num_images=200, batch_size=40, preview_images=40, num_steps=16)
    base.checkpoint.update(every_steps=1500, keep=1)
    if arg == 'debug':
      default.debug(base)
  ends = dict(log_snr_min=None, log_snr_max=None)  # None: those of base
  axes = dict(
    schedule={name: dict(schedule=dict(name=name, **ends)) for name in SCHEDULES},
    seed={str(seed): dict(seed=seed) for seed in range(3 if arg != 'debug' else 1)},
  )
  reference = dict(schedule='cosine')
  return ConfigDict(dict(base=base, axes=axes, evaluations=(16,), reference=reference)).lock()
