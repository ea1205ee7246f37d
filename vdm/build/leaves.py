"""Checks the value of each leaf of a config by itself, whatever the others are."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vdm.diffusion.ode import PROBES
from vdm.errors import require


class Rule(NamedTuple):
  """States what a leaf's value must be, whatever the other leaves are."""

  holds: Callable[[Any], bool]
  rule: str
  remedy: str


MOST, MOST_SEED = 2**31 - 1, 2**63 - 1
POWER_STDS = 'between 0 and 0.289', 'usual: (0.05, 0.1)'
POSITIVE = Rule(lambda value: value > 0, 'positive', 'give 1 or more')
NOT_NEGATIVE = Rule(lambda value: value >= 0, 'zero or more', 'give 0 to switch it off')


def _at_least(least: float, remedy: str) -> Rule:
  return Rule(lambda value: value >= least, f'{least} or more', remedy)


def one_of(*names: str, remedy: str = 'choose one') -> Rule:
  """Returns the rule that a value is one of some names."""
  *first, last = map(repr, names)
  rule = f'{", ".join(first)} or {last}' if first else last
  return Rule(lambda value: value in names, rule, remedy)


# Leaves that share a rule, their names without `config.`.
RULES = (
  (
    'train.batch_size train.num_steps train.microbatches train.log_every_steps '
    'train.eval_every_steps eval.batch_size eval.draws eval.fields.samples_per_example '
    'likelihood.draws likelihood.intervals '
    'sample.num_images sample.preview_images sample.batch_size sample.num_steps '
    'checkpoint.every_steps checkpoint.keep fid.batch_size '
    'fid.num_images fid.train_images parallel.fsdp optimizer.learning_rate '
    'ema.halflife_images train.most_skipped',
    POSITIVE,
  ),
  (
    'likelihood.maps train.num_timesteps eval.num_timesteps eval.max_images data.num_classes '
    'optimizer.warmup_steps optimizer.clip_norm optimizer.schedule_rate optimizer.weight_decay '
    'ema.rampup_ratio ema.snapshot_every_steps train.second_order eval.fields.num_examples',
    NOT_NEGATIVE,
  ),
  (
    'data.image_shape',
    Rule(
      lambda shape: all(isinstance(n, int) and n > 0 for n in shape),
      'positive integers',
      'for 28 x 28 grey images give --config.data.image_shape=28,28,1',
    ),
  ),
  ('optimizer.b1 optimizer.b2', Rule(lambda b: 0 <= b < 1, 'in [0, 1)', 'usual: 0.9, 0.999')),
  ('optimizer.eps', Rule(lambda eps: eps > 0, 'positive', 'usual: 1e-8')),
  ('fid.halves', _at_least(0, 'give 0 for no intervals')),
  ('ema.power_stds', Rule(lambda stds: all(0 < s < 0.289 for s in stds), *POWER_STDS)),
  (
    'ema.extra_halflives_images',
    Rule(lambda halflives: all(n > 0 for n in halflives), 'positive', 'give images'),
  ),
  ('data.num_values', Rule(lambda n: n == 0 or n >= 2, '0, or 2 or more', '256 for 8-bit pixels')),
  ('data.eval_share', Rule(lambda s: 0 < s < 1, 'between 0 and 1', 'usual: 0.1')),
  ('parallel.mode', one_of('jit', 'pmap')),
  ('train.on_nan', one_of('stop', 'skip')),
  ('model.condition_on', one_of('live', 'configured')),
  ('optimizer.kind', one_of('adamw', 'muon')),
  ('optimizer.moments', one_of('float32', 'bfloat16')),
  ('optimizer.decay', one_of('constant', 'cosine', 'linear')),
  ('likelihood.conditions', one_of('given', 'none')),
  ('eval.likelihood', one_of('elbo', 'ode', 'elbo,ode')),
  ('eval.ode.trace', one_of('hutchinson', 'exact')),
  ('eval.ode.probe', one_of(*PROBES)),
  ('eval.ode.dequantization', one_of('uniform', 'truncated_normal', 'none')),
  ('eval.ode.rtol', _at_least(0, 'give 0 or more')),
  ('eval.ode.atol', _at_least(1e-6, 'float32 resolves no less: try 1e-3')),
  ('eval.ode.max_steps', _at_least(1, 'try 1000')),
  ('eval.ode.num_probes eval.ode.importance_samples', _at_least(1, 'give 1 or more')),
  ('sample.guidance.kind', one_of('none', 'classifier_free', 'auto')),
)


def value_of(tree: Any, leaf: str) -> Any:
  """Returns the value of a leaf, its name without `config.`; a list as a tuple."""
  for name in leaf.split('.'):
    tree = tree[name]
  return tuple(tree) if isinstance(tree, list | tuple) else tree


def check_numbers(tree: ConfigDict, prefix: str = 'config'):
  """Refuses numbers that are not finite, or that the arrays they end in do not hold."""
  for name, value in tree.items():
    field = f'{prefix}.{name}'
    if isinstance(value, ConfigDict):
      check_numbers(value, field)
      continue
    most = MOST_SEED if name == 'seed' else MOST
    several = isinstance(value, tuple | list)
    numbers = tuple(value) if several else (value,)
    known = not several or all(isinstance(number, int | float) for number in numbers)
    require(known, field, value, 'numbers', 'give as many as configs/default.py has')
    for number in numbers:
      if isinstance(number, float):
        require(math.isfinite(number), field, value, 'finite', 'give a number')
      elif isinstance(number, int):
        least = 0 if name == 'seed' else -most
        require(least <= number <= most, field, value, f'from {least} to {most}', 'give another')
