"""Refuses what no run could use, before anything is compiled or written; needs no device."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vdm.build.factories import decoder, other_schedule, sampler, threshold
from vdm.build.optimizer import ema_decays
from vdm.diffusion.decoders import Decoder
from vdm.diffusion.gaussian import Schedule
from vdm.diffusion.ode import PROBES
from vdm.errors import require


class Rule(NamedTuple):
  """States what a leaf's value must be, whatever the other leaves are."""

  holds: Callable[[Any], bool]
  rule: str
  remedy: str


MOST, MOST_SEED = 2**31 - 1, 2**63 - 1
# leaves of config.model that every network has
MODEL_LEAVES = ('name', 'output', 'class_conditional', 'condition_on', 'dtype')
POWER_STDS = 'between 0 and 0.289', 'usual: (0.05, 0.1)'
POSITIVE = Rule(lambda value: value > 0, 'positive', 'give 1 or more')
NOT_NEGATIVE = Rule(lambda value: value >= 0, 'zero or more', 'give 0 to switch it off')


def _at_least(least: float, remedy: str) -> Rule:
  return Rule(lambda value: value >= least, f'{least} or more', remedy)


def _one_of(*names: str, remedy: str = 'choose one') -> Rule:
  *first, last = map(repr, names)
  return Rule(lambda value: value in names, f'{", ".join(first)} or {last}', remedy)


# Leaves that share a rule, their names without `config.`.
RULES = (
  (
    'train.batch_size train.num_steps train.microbatches train.log_every_steps '
    'train.eval_every_steps eval.batch_size eval.draws sample.num_images sample.preview_images '
    'sample.batch_size sample.num_steps checkpoint.every_steps checkpoint.keep fid.batch_size '
    'fid.num_images fid.train_images parallel.fsdp optimizer.learning_rate '
    'ema.halflife_images train.most_skipped',
    POSITIVE,
  ),
  (
    'train.num_timesteps eval.num_timesteps eval.max_images data.num_classes '
    'optimizer.warmup_steps optimizer.clip_norm optimizer.schedule_rate optimizer.weight_decay '
    'ema.rampup_ratio ema.snapshot_every_steps',
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
  ('parallel.mode', _one_of('jit', 'pmap')),
  ('train.on_nan', _one_of('stop', 'skip')),
  ('model.condition_on', _one_of('live', 'configured')),
  ('optimizer.decay', _one_of('constant', 'cosine')),
  ('eval.likelihood', _one_of('elbo', 'ode', 'elbo,ode')),
  ('eval.ode.trace', _one_of('hutchinson', 'exact')),
  ('eval.ode.probe', _one_of(*PROBES)),
  ('eval.ode.rtol', _at_least(0, 'give 0 or more')),
  ('eval.ode.atol', _at_least(1e-6, 'float32 resolves no less: try 1e-3')),
  ('eval.ode.max_steps', _at_least(1, 'try 1000')),
  ('eval.ode.num_probes eval.ode.importance_samples', _at_least(1, 'give 1 or more')),
  ('sample.guidance.kind', _one_of('none', 'classifier_free', 'auto')),
)


# Leaves that only make sense for pictures, by the value that they have for real values.
OF_PICTURES = {
  'eval.fid': False,
  'fid.train_every_steps': 0,
  'sample.threshold.name': 'none',
  'data.num_bits': 0,
}


def check_config(config: ConfigDict):
  """Refuses values that no run could use, each in one line.

  Raises:
    ValueError: a leaf breaks a rule of its own, or one that it shares with others.
  """
  for leaf in MODEL_LEAVES:
    field, remedy = f'config.model.{leaf}', 'configs/default.py says what it is'
    require(leaf in config.model, field, None, 'given', remedy)
  _check_numbers(config)
  for leaves, (holds, rule, remedy) in RULES:
    for leaf in leaves.split():
      value = _value(config, leaf)
      require(holds(value), f'config.{leaf}', value, rule, remedy)
  if 'fourier_exponents' in config.model:
    exponents = tuple(config.model.fourier_exponents)
    good = all(isinstance(n, int) and 0 <= n <= 20 for n in exponents)
    rule = 'integers from 0 to 20'
    require(
      good, 'config.model.fourier_exponents', exponents, rule, 'usual: (6, 7), or () for none'
    )
  shape = tuple(config.data.image_shape)
  good = 2 <= len(shape) <= 4 or (len(shape) > 0 and config.model.name == 'mlp')
  rule = (
    'one to three spatial sizes, then channels; only the network mlp takes other numbers of axes'
  )
  require(good, 'config.data.image_shape', shape, rule, 'give two to four numbers')
  _check_data(config.data, is_flagged(config.model))
  _check_shapes(config.data)
  _check_conditions(config.model.class_conditional, config.data, config.train.label_dropout)
  _check_training(config.train, config.fid.train_every_steps)
  kept = ('raw', *ema_decays(config.ema, config.train.batch_size, 0))
  for leaf in ('eval.params', 'eval.ode.params', 'sample.params'):
    _check_parameters(leaf, _value(config, leaf), kept)
  require(
    config.decoder.name != 'discrete' or config.data.num_values >= 2,
    'config.decoder.name',
    config.decoder.name,
    "'normal' or 'censored' for real values, config.data.num_values=0",
    'choose one',
  )
  made = decoder(config.decoder, config.data, config.schedule.log_snr_max)
  _check_decoder(made, config.eval)
  for leaf, none in OF_PICTURES.items() if made.is_density else ():
    rule = f'{none!r} for {made.units}: it is for pictures, whose range is known'
    require(_value(config, leaf) == none, f'config.{leaf}', _value(config, leaf), rule, 'change it')


def _check_decoder(made: Decoder, evaluation: ConfigDict):
  """Refuses a likelihood by the ODE that a decoder does not have.

  Args:
    made: of config.decoder.
    evaluation: config.eval.
  """
  asks = 'ode' in evaluation.likelihood.split(',')
  require(
    bool(made.dequantizations) or not asks,
    'config.eval.likelihood',
    evaluation.likelihood,
    f"'elbo' for {made.units}, which have no density",
    'choose it',
  )
  if made.dequantizations and (asks or not made.is_density):
    choices = _one_of(*made.dequantizations)
    value = evaluation.ode.dequantization
    require(choices.holds(value), 'config.eval.ode.dequantization', value, *choices[1:])


def _check_numbers(tree: ConfigDict, prefix: str = 'config'):
  """Refuses numbers that are not finite, or that the arrays they end in do not hold."""
  for name, value in tree.items():
    field = f'{prefix}.{name}'
    if isinstance(value, ConfigDict):
      _check_numbers(value, field)
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


def _value(tree: Any, leaf: str) -> Any:
  for name in leaf.split('.'):
    tree = tree[name]
  return tuple(tree) if isinstance(tree, list | tuple) else tree


def is_flagged(model: ConfigDict) -> bool:
  """Returns whether the network of config.model is told which images were augmented."""
  return 'augmentation_flag' in model and model.augmentation_flag


def _check_data(data: ConfigDict, flagged: bool):
  shape = tuple(data.image_shape)
  require(
    not data.flip or len(shape) == 3,
    'config.data.flip',
    data.flip,
    f'False for examples that are not images, config.data.image_shape={shape}',
    'only height, width, channels can be flipped',
  )
  require(
    not data.rotate or (len(shape) == 3 and shape[0] == shape[1]),
    'config.data.rotate',
    data.rotate,
    f'False for images that are not square, config.data.image_shape={shape}',
    'config.data.flip works for any height and width',
  )
  require(
    not data.rotate or flagged,
    'config.data.rotate',
    data.rotate,
    'False for a network that is not told which images were turned',
    'set config.model.augmentation_flag=True',
  )


def _check_shapes(data: ConfigDict):
  """Refuses a field that does not lie on the images, and statistics of other channels."""
  image, field = tuple(data.image_shape), tuple(data.condition_shape)
  fits = not field or len(field) == len(image)
  fits = fits and all(isinstance(n, int) and n > 0 for n in field)
  if fits and field:
    fits = all(n % m == 0 for n, m in zip(image[:-1], field[:-1], strict=True))
  rule = f'() or as fine as images {image}, or coarser by whole factors, and channels'
  require(fits, 'config.data.condition_shape', field, rule, 'average or repeat the field')
  sizes = {'': image[-1], 'condition_': field[-1] if field else 0, 'vector_': data.embedding_size}
  for prefix, size in sizes.items():
    shift, scale = tuple(data[f'{prefix}shift']), tuple(data[f'{prefix}scale'])
    rule = f'() or {size} numbers, one for each channel'
    require(len(shift) in (0, size), f'config.data.{prefix}shift', shift, rule, 'give ()')
    good = len(scale) == len(shift) and all(s > 0 for s in scale)
    rule = f'as many numbers as config.data.{prefix}shift={shift}, and positive'
    require(good, f'config.data.{prefix}scale', scale, rule, 'give () for both')


def _check_conditions(class_conditional: bool, data: ConfigDict, label_dropout: float):
  require(
    not class_conditional or data.num_classes > 0,
    'config.model.class_conditional',
    class_conditional,
    'False for data without labels',
    'state config.data.num_classes, or set it to False',
  )
  size = data.embedding_size
  require(size >= 0, 'config.data.embedding_size', size, '0 or more', 'give 0 for none')
  conditional = class_conditional or size > 0 or bool(data.condition_shape)
  require(
    0 <= label_dropout < 1 and (conditional or label_dropout == 0),
    'config.train.label_dropout',
    label_dropout,
    'in [0, 1), and 0 without conditions',
    'give 0, or 0.1 with config.model.class_conditional=True',
  )


def _check_training(train: ConfigDict, distances_every: int):
  evaluations = train.eval_every_steps
  require(
    distances_every >= 0 and distances_every % evaluations == 0,
    'config.fid.train_every_steps',
    distances_every,
    f'a multiple of config.train.eval_every_steps={evaluations}, or 0',
    f'try {evaluations}, or 0 for never',
  )
  require(
    train.batch_size % train.microbatches == 0,
    'config.train.batch_size',
    train.batch_size,
    f'divisible by config.train.microbatches={train.microbatches}',
    f'try {_multiples(train.batch_size, train.microbatches)}',
  )


def _check_parameters(leaf: str, value: str, kept: tuple[str, ...]):
  """Refuses names of parameters that are none of the averages that config.ema keeps."""
  chosen = value.split(',') if leaf == 'eval.params' else [value]
  rule, remedy = f'among {", ".join(kept)}', 'config.ema says which averages are kept'
  require(set(chosen) <= set(kept), f'config.{leaf}', value, rule, remedy)


def check_sampling(sample: ConfigDict, own: Schedule, label_dropout: float):
  """Refuses a sampler, threshold, grid or guidance of config.sample that a model cannot follow.

  Args:
    sample: config.sample.
    own: the model's schedule, concrete.
    label_dropout: of its training.
  """
  sampler(sample.sampler)
  threshold(sample.threshold)
  other_schedule(sample.grid, 'sample.grid', own)
  require(
    not sample.denoise_last or sample.num_steps > 1,
    'config.sample.num_steps',
    sample.num_steps,
    '2 or more with config.sample.denoise_last=True',
    'the last step only denoises',
  )
  guidance = sample.guidance
  require(
    guidance.log_snr_min < guidance.log_snr_max,
    'config.sample.guidance.log_snr_min',
    guidance.log_snr_min,
    f'below config.sample.guidance.log_snr_max={guidance.log_snr_max}',
    'swap them',
  )
  require(
    guidance.kind != 'classifier_free' or label_dropout > 0,
    'config.sample.guidance.kind',
    guidance.kind,
    "'none' or 'auto' for a model trained with all its labels",
    'train with config.model.class_conditional=True and config.train.label_dropout=0.1',
  )
  require(
    guidance.kind != 'auto' or guidance.checkpoint != '',
    'config.sample.guidance.checkpoint',
    guidance.checkpoint,
    'the workdir of the guiding run',
    'train a smaller or shorter run and name its --workdir',
  )


def check_devices(config: ConfigDict, num_devices: int):
  """Refuses batches and meshes that do not fit the devices."""
  for field, parts in (('train', config.train.microbatches), ('eval', 1), ('sample', 1)):
    batch = config[field].batch_size
    by = 'devices' if parts == 1 else f'devices x {parts} microbatches'
    require(
      batch % (num_devices * parts) == 0,
      f'config.{field}.batch_size',
      batch,
      f'divisible by the {num_devices} {by}',
      f'try {_multiples(batch, num_devices * parts)}',
    )
  fsdp = config.parallel.fsdp
  require(
    num_devices % fsdp == 0,
    'config.parallel.fsdp',
    fsdp,
    f'a divisor of the {num_devices} devices',
    'try 1, which replicates the parameters',
  )
  require(
    fsdp == 1 or config.parallel.mode == 'jit',
    'config.parallel.fsdp',
    fsdp,
    "1 with config.parallel.mode='pmap', which keeps replicas",
    'use --config.parallel.mode=jit',
  )


def works_on(config: ConfigDict, num_devices: int) -> bool:
  """Returns whether check_devices accepts this number of devices; asks JAX for nothing."""
  try:
    check_devices(config, num_devices)
  except (ValueError, ZeroDivisionError):  # check_config refuses zeros, with their names
    return False
  return True


def _multiples(n: int, divisor: int) -> str:
  below = n // divisor * divisor
  return f'{below} or {below + divisor}' if below else str(divisor)
