"""What makes bits/dim fall faster at equal network and data: one knob of the recipe at a time.

  python -m vdm.ablate --config=configs/ablations/recipe.py --workdir=runs/recipe
  python -m vdm.ablate --config=configs/ablations/recipe.py:cifar10 --workdir=runs/recipe_cifar10 \
    --config.base.data.dir=DIR

The network is that of configs/digits.py; with :fashion_mnist that of fashion_mnist_uvit.py, with
:cifar10 VDM's with 2 blocks of width 64. Each recipe has three seeds. `public_2e-4` is what the
public VDM code does, the other `public_*` the same with its learning rate tuned: that is what a
better recipe has to beat. `muon_adaptive_fast` is that of configs/digits.py, `muon_8e-3` that of
fashion_mnist_uvit.py. --config=...:debug has one seed and four steps.

`fast_*` is `muon_adaptive_fast` with one thing changed: of Adam, for what Muon is not for, `b2` and
`eps`. `fast_ema` is evaluated with averaged parameters, all others with those as trained.

`python -m benchmarks.front` runs a choice of them, and writes a page.
"""

from ml_collections import ConfigDict
from vdm.configs import cifar10, default, digits, fashion_mnist_uvit

RATES = ('2e-4', '5e-4', '1e-3', '2e-3', '4e-3')


def get_config(arg=''):
  """See vdm/ablate.py: `base`, `axes`, `evaluations`, `reference`."""
  bases = {'fashion_mnist': _fashion_mnist, 'cifar10': _cifar10}
  base = bases.get(arg, digits.get_config)()
  with base.unlocked():
    base.name = 'recipe'
    base.schedule.name = 'learned_endpoints'
    base.fid.train_every_steps = 0
    base.sample.update(num_images=40, batch_size=40, preview_images=40, num_steps=16)
    base.eval.params = 'raw'
    base.checkpoint.update(every_steps=base.train.num_steps, keep=1)
    if arg == 'debug':
      default.debug(base)
  plain = dict(kind='adamw', decay='constant', clip_norm=0.0, warmup_steps=100)
  tuned = {
    f'public_{rate}': dict(optimizer=plain | dict(learning_rate=float(rate))) for rate in RATES
  }
  decayed = {
    f'{decay}_{rate}': dict(optimizer=_of('adamw', rate, decay))
    for decay in ('cosine', 'linear')
    for rate in RATES[2:]
  }
  muon = {f'muon_{rate}': dict(optimizer=_of('muon', rate)) for rate in (*RATES[2:], '8e-3')}
  ends = dict(log_snr_min=None, log_snr_max=None)  # None: those of base
  adaptive = dict(schedule=dict(name='adaptive', **ends))
  parts = dict(
    adaptive=dict(optimizer=_of('adamw', '4e-3')) | adaptive,
    adaptive_slow=dict(optimizer=_of('adamw', '2e-3')) | adaptive,
    muon_adaptive_slow=muon['muon_2e-3'] | adaptive,
    muon_adaptive=muon['muon_4e-3'] | adaptive,
    muon_adaptive_fast=muon['muon_8e-3'] | adaptive,
    muon_net=muon['muon_4e-3'] | dict(schedule=dict(name='learned_net', **ends)),
    muon_b2=dict(optimizer=_of('muon', '4e-3') | dict(b2=0.999)),
    muon_path=muon['muon_4e-3']
    | dict(schedule=dict(name='learned_multivariate', per='dimension', **ends)),
    muon_velocity=muon['muon_4e-3']
    | dict(model=dict(output='v'), schedule=dict(name='softplus', **ends)),
    muon_ends=dict(optimizer=_of('muon', '4e-3') | dict(schedule_rate=10.0)),
  )
  axes = dict(
    recipe=tuned | decayed | muon | parts | _knobs(parts['muon_adaptive_fast']),
    seed={str(seed): dict(seed=seed) for seed in range(3 if arg != 'debug' else 1)},
  )
  reference = dict(recipe='public_2e-4')
  return ConfigDict(dict(base=base, axes=axes, evaluations=(16,), reference=reference)).lock()


def _of(kind, rate, decay='linear'):
  return dict(kind=kind, learning_rate=float(rate), decay=decay, clip_norm=1.0)


def _knobs(fast):
  """Returns the recipe `fast` with one thing changed at a time, by name."""
  optimizer = {
    'warmup_0': dict(warmup_steps=0),
    'warmup_300': dict(warmup_steps=300),
    'b2_95': dict(b2=0.95),
    'b2_999': dict(b2=0.999),
    'eps_1e-4': dict(eps=1e-4),
    'weight_decay_0': dict(weight_decay=0.0),
    'clip_0': dict(clip_norm=0.0),
    'cosine': dict(decay='cosine'),
    'rate_double': dict(learning_rate=1.6e-2),
  }
  knobs = {name: dict(optimizer=fast['optimizer'] | change) for name, change in optimizer.items()}
  knobs['velocity'] = dict(model=dict(output='v'))
  knobs['ema'] = dict(eval=dict(params='ema'))
  return {f'fast_{name}': fast | change for name, change in knobs.items()}


def _fashion_mnist():
  """Returns configs/fashion_mnist_uvit.py, from other end points and evaluated more often."""
  base = fashion_mnist_uvit.get_config()
  with base.unlocked():
    base.schedule.log_snr_min = -6.0
    base.train.eval_every_steps = 500
  return base


def _cifar10():
  """Returns configs/cifar10.py with two blocks of width 64, at a batch of 16."""
  base = cifar10.get_config()
  with base.unlocked():
    base.model.update(width=64, num_blocks=2, dropout=0.0)
    base.train.update(batch_size=16, num_steps=2000, log_every_steps=100, eval_every_steps=250)
    base.eval.update(batch_size=100, draws=3, max_images=0)
  return base
