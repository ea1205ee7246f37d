"""Refuses what no run could use, before anything is compiled or written; needs no device.

What one leaf must be by itself is in `leaves`, what config.sample must be in `sample_checks`.
"""

from ml_collections import ConfigDict

from vdm.build.factories import decoder
from vdm.build.leaves import RULES, check_numbers, one_of, value_of
from vdm.build.optimizer import ema_shares
from vdm.diffusion.decoders import Decoder
from vdm.errors import require

# leaves of config.model that every network has
MODEL_LEAVES = ('name', 'output', 'class_conditional', 'condition_on', 'dtype')
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
  check_numbers(config)
  for leaves, (holds, rule, remedy) in RULES:
    for leaf in leaves.split():
      value = value_of(config, leaf)
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
  class_conditional, dropout = config.model.class_conditional, config.train.label_dropout
  _check_conditions(class_conditional, config.data, dropout, config.likelihood.conditions)
  _check_training(config.train, config.schedule.name, config.fid.train_every_steps)
  kept = ('raw', *ema_shares(config.ema, config.train.batch_size, 0))
  for leaf in ('eval.params', 'eval.ode.params', 'sample.params'):
    _check_parameters(leaf, value_of(config, leaf), kept)
  require(
    config.decoder.name != 'discrete' or config.data.num_values >= 2,
    'config.decoder.name',
    config.decoder.name,
    "'normal' or 'censored' for real values, config.data.num_values=0",
    'choose one',
  )
  require(
    not config.data.masked or config.sample.threshold.name != 'dynamic',
    'config.sample.threshold.name',
    config.sample.threshold.name,
    "'static' or 'none' for data with masks, whose percentiles it does not know",
    'change it',
  )
  for leaf in ('log_snr_min', 'log_snr_max'):
    name, rule = config.schedule.name, f'beside its {leaf}, an end of the whole model'
    require(leaf in config.schedule, 'config.schedule.name', name, rule, 'give both ends')
  made = decoder(config.decoder, config.data, config.schedule.log_snr_max)
  _check_decoder(made, config.eval)
  for leaf, none in OF_PICTURES.items() if made.is_density else ():
    rule = f'{none!r} for {made.units}: it is for pictures, whose range is known'
    require(
      value_of(config, leaf) == none, f'config.{leaf}', value_of(config, leaf), rule, 'change it'
    )


def _check_decoder(made: Decoder, evaluation: ConfigDict):
  """Refuses a likelihood by the ODE that a decoder does not have.

  Args:
    made: of config.decoder.
    evaluation: config.eval.
  """
  if 'ode' in evaluation.likelihood.split(','):
    check_ode(made, evaluation.ode.dequantization, 'config.eval.likelihood', evaluation.likelihood)


def check_ode(made: Decoder, dequantization: str, asker: str, value: str):
  """Refuses the likelihood by the ODE where a decoder has none, or not with this dequantization.

  Args:
    made: the decoder.
    dequantization: config.eval.ode.dequantization.
    asker: the name of what asks for the ODE.
    value: its value.
  """
  rule = f"'elbo' for {made.units}, which have no density"
  require(bool(made.dequantizations), asker, value, rule, 'choose it')
  choices, field = one_of(*made.dequantizations), 'config.eval.ode.dequantization'
  require(choices.holds(dequantization), field, dequantization, *choices[1:])


def is_flagged(model: ConfigDict) -> bool:
  """Returns whether the network of config.model is told which images were augmented."""
  return 'augmentation_flag' in model and model.augmentation_flag


def _check_data(data: ConfigDict, flagged: bool):
  shape = tuple(data.image_shape)
  require(
    not data.ignore or data.as_found,
    'config.data.ignore',
    data.ignore,
    "'' unless conditions are found in the data, config.data.as_found=True",
    'num_classes, embedding_size, condition_shape and masked say what is used',
  )
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
  turned = 'flip' if data.flip else 'rotate'
  parts = data.derive == 'haar_details'
  coarse = data.name == 'gaussian_field' and data.gaussian_field.subsample > 1
  require(
    not ((data.flip or data.rotate) and (parts or coarse)),
    f'config.data.{turned}',
    True,
    'False for coefficients, or conditions of every nth pixel, which do not turn as pictures do',
    'set it to False',
  )
  field = tuple(data.condition_shape)
  require(
    not data.rotate or not field or field[0] == field[1],
    'config.data.rotate',
    data.rotate,
    f'False for conditions that are not square, config.data.condition_shape={field}',
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


def _check_conditions(class_conditional: bool, data: ConfigDict, label_dropout: float, scored: str):
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
    'give 0, or 0.1 with classes (config.model.class_conditional=True), vectors or fields',
  )
  require(
    scored == 'given' or not conditional or label_dropout > 0,
    'config.likelihood.conditions',
    scored,
    "'given' with config.train.label_dropout=0.0, which teaches nothing of their lack",
    'train with 0.1',
  )


def _check_training(train: ConfigDict, schedule: str, distances_every: int):
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
  require(
    train.second_order == 0 or train.num_timesteps == 0,
    'config.train.second_order',
    train.second_order,
    f'0 in discrete time, config.train.num_timesteps={train.num_timesteps}',
    'the ODE is that of continuous time: give config.train.num_timesteps=0',
  )
  require(
    schedule != 'adaptive' or train.num_timesteps == 0,
    'config.train.num_timesteps',
    train.num_timesteps,
    "0 with config.schedule.name='adaptive': in discrete time the loss is that of the steps' place",
    'the T of an evaluation is config.eval.num_timesteps; or choose another schedule',
  )


def _check_parameters(leaf: str, value: str, kept: tuple[str, ...]):
  """Refuses names of parameters that are none of the averages that config.ema keeps."""
  chosen = value.split(',') if leaf == 'eval.params' else [value]
  rule, remedy = f'among {", ".join(kept)}', 'config.ema says which averages are kept'
  require(set(chosen) <= set(kept), f'config.{leaf}', value, rule, remedy)


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
