"""The one bridge from a config to objects, and the checks that need no device."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vdm import state as state_lib
from vdm.gaussian import HEADS, Denoiser, Schedule, to_prediction
from vdm.nn import NETWORKS, blocks
from vdm.schedules import SCHEDULES, Learned
from vdm.weightings import WEIGHTINGS, Weighting


class Model(NamedTuple):
  """Everything the loss, the likelihood and the samplers need of a config."""

  init: Callable[[jax.Array], Any]  # key -> params {'network', 'schedule'}
  schedule: Callable[[Any], Schedule]  # params -> Schedule
  denoiser: Callable[..., Denoiser]  # (params, label=None, key_dropout=None, flag=None) -> Denoiser
  weighting: Weighting
  image_shape: tuple[int, ...]
  num_values: int


def check(condition: bool, field: str, value: Any, constraint: str, remedy: str):
  """Raises the one-line error every bad value gets."""
  if not condition:
    raise ValueError(f'config.{field}={value!r} must be {constraint}; {remedy}.')


def _factory(table: dict, field: str, block: dict, **extra):
  """table[block['name']](**rest of block, **extra), with errors in the user's words."""
  kwargs = {**block, **extra}
  name = kwargs.pop('name')
  check(name in table, f'{field}.name', name, f'one of {", ".join(table)}', 'choose one of these')
  parameters = inspect.signature(table[name]).parameters
  unknown = [k for k in kwargs if k not in parameters]
  missing = [
    k
    for k, p in parameters.items()
    if p.default is p.empty
    and k not in kwargs
    and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
  ]
  if unknown or missing:
    problem = f'does not take {unknown[0]}' if unknown else f'needs {missing[0]}'
    raise ValueError(
      f'config.{field}.name={name!r} {problem}; it takes {", ".join(parameters) or "nothing"}: '
      f'set config.{field} = dict(name={name!r}, ...) in a config file.'
    )
  return table[name](**kwargs)


def schedule(config: ConfigDict) -> Learned:
  """config.schedule as a Learned pair; a fixed schedule has no parameters."""
  built = _factory(SCHEDULES, 'schedule', config.schedule.to_dict())
  return built if isinstance(built, Learned) else Learned(dict, lambda params: built)


def dtype(config: ConfigDict) -> jnp.dtype:
  """Of activations inside the network."""
  name = config.model.dtype
  check(
    name in ('auto', 'float32', 'bfloat16'),
    'model.dtype',
    name,
    "'auto', 'float32' or 'bfloat16'",
    'auto means bfloat16 on TPU and GPU, float32 on CPU',
  )
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def _flagged(config: ConfigDict) -> bool:
  """Whether the network is told which images were augmented."""
  return 'augmentation_flag' in config.model and config.model.augmentation_flag


def scan_blocks(config: ConfigDict) -> bool:
  """Whether the network runs its equal blocks in a loop; False for one that has no such choice.

  Not on CPU by default, where convolutions in a loop have been slow (`vdm.nn.layers.conv3x3`).
  """
  if 'scan_blocks' not in config.model:
    return False
  choice = config.model.scan_blocks
  check(
    choice in ('auto', 'on', 'off'),
    'model.scan_blocks',
    choice,
    "'auto', 'on' or 'off'",
    'auto means on, but off on CPU',
  )
  return choice == 'on' or (choice == 'auto' and jax.default_backend() != 'cpu')


def model(config: ConfigDict) -> Model:
  """The network, schedule and weighting of a config, as pure functions of parameters."""
  check_config(config)
  block = config.model.to_dict()
  output, class_conditional = block.pop('output'), block.pop('class_conditional')
  check(
    output in HEADS, 'model.output', output, f'one of {", ".join(HEADS)}', 'choose one of these'
  )
  num_classes = config.data.num_classes if class_conditional else 0
  flagged, scan = _flagged(config), scan_blocks(config)
  unrolled = _factory(
    NETWORKS,
    'model',
    block | ({'scan_blocks': False} if 'scan_blocks' in block else {}),
    num_classes=num_classes,
    dtype=dtype(config),
    residual=output == 'eps',  # z is nearly eps where noise dominates, and nothing like x or v
  )
  network = unrolled.clone(scan_blocks=True) if scan else unrolled
  learned = schedule(config)
  weighting = _factory(WEIGHTINGS, 'weighting', config.weighting.to_dict())
  check(
    not (jax.tree.leaves(learned.init()) and config.weighting.name != 'elbo'),
    'weighting.name',
    config.weighting.name,
    "'elbo' where the schedule is learned",
    'the end points are trained by the bound: choose a fixed config.schedule.name, such as linear',
  )
  image_shape = tuple(config.data.image_shape)

  def init(key):
    z, t = jnp.zeros((1, *image_shape)), jnp.zeros((1,))
    label = jnp.zeros((1,), jnp.int32) if class_conditional else None

    def params_of(network, key):
      return network.init(key, z, t, label, train=False)['params']

    params = params_of(unrolled, key)
    if scan:  # the same numbers in either layout
      names = blocks.stacked_names(jax.eval_shape(functools.partial(params_of, network), key))
      params = blocks.stack(params, names)
    return {'network': params, 'schedule': learned.init()}

  def as_schedule(params):
    return learned.as_schedule(params['schedule'])

  def denoiser(params, label=None, key_dropout=None, flag=None):
    ends = as_schedule(params)(jnp.array([0.0, 1.0]))
    rngs = {} if key_dropout is None else {'dropout': key_dropout}
    label = label if class_conditional else None
    kwargs = dict(train=key_dropout is not None, rngs=rngs) | (dict(flag=flag) if flagged else {})

    def denoise(z, log_snr):
      t = (ends[0] - log_snr) / (ends[0] - ends[1])  # by the live end points: always in [0, 1]
      out = network.apply({'params': params['network']}, z, t, label, **kwargs)
      return to_prediction(output, out, z, log_snr)

    return denoise

  return Model(init, as_schedule, denoiser, weighting, image_shape, config.data.num_values)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """config.optimizer as an optax transformation."""
  decay = config.optimizer.decay
  check(
    decay in ('constant', 'cosine'),
    'optimizer.decay',
    decay,
    "'constant' or 'cosine'",
    'choose one',
  )
  return state_lib.make_optimizer(config.train.num_steps, **config.optimizer)


def init_state(config: ConfigDict, model: Model) -> Callable[[], state_lib.TrainState]:
  """A function without arguments, to be traced: the state before the first step."""
  tx = optimizer(config)
  return lambda: state_lib.create(model.init(jax.random.key(config.seed)), tx)


def check_config(config: ConfigDict):
  """Refuses values that no run could use, before anything is compiled or written."""
  for field in (
    'train.batch_size',
    'train.num_steps',
    'train.microbatches',
    'train.log_every_steps',
    'train.eval_every_steps',
    'eval.batch_size',
    'eval.draws',
    'sample.num_images',
    'sample.batch_size',
    'sample.num_steps',
    'checkpoint.every_steps',
    'checkpoint.keep',
    'data.num_values',
    'parallel.fsdp',
    'optimizer.learning_rate',
    'ema.halflife_images',
  ):
    block, leaf = field.split('.')
    check(config[block][leaf] > 0, field, config[block][leaf], 'positive', 'give 1 or more')
  for field in (
    'train.num_timesteps',
    'eval.num_timesteps',
    'eval.max_images',
    'data.num_classes',
    'optimizer.warmup_steps',
    'optimizer.clip_norm',
    'optimizer.weight_decay',
    'ema.rampup_ratio',
  ):
    block, leaf = field.split('.')
    check(
      config[block][leaf] >= 0,
      field,
      config[block][leaf],
      'zero or more',
      'give 0 to switch it off',
    )
  shape = config.data.image_shape
  check(
    all(isinstance(n, int) and n > 0 for n in shape),
    'data.image_shape',
    tuple(shape),
    'positive integers',
    'for 28 x 28 grey images give --config.data.image_shape=28,28,1',
  )
  check(
    config.data.num_values >= 2,
    'data.num_values',
    config.data.num_values,
    '2 or more',
    '256 for 8-bit pixels',
  )
  conditional, classes = config.model.class_conditional, config.data.num_classes
  check(
    not conditional or classes > 0,
    'model.class_conditional',
    conditional,
    'False for data without labels',
    'state config.data.num_classes, or set it to False',
  )
  check(
    not config.data.rotate or shape[0] == shape[1],
    'data.rotate',
    config.data.rotate,
    f'False for images that are not square, config.data.image_shape={tuple(shape)}',
    'config.data.flip works for any shape',
  )
  check(
    not config.data.rotate or _flagged(config),
    'data.rotate',
    config.data.rotate,
    'False for a network that is not told which images were turned',
    'set config.model.augmentation_flag=True',
  )
  microbatches, batch = config.train.microbatches, config.train.batch_size
  check(
    batch % microbatches == 0,
    'train.batch_size',
    batch,
    f'divisible by config.train.microbatches={microbatches}',
    f'try {_multiples(batch, microbatches)}',
  )
  for field, names in (('parallel.mode', ('jit', 'pmap')), ('sample.params', ('ema', 'raw'))):
    block, leaf = field.split('.')
    check(
      config[block][leaf] in names,
      field,
      config[block][leaf],
      ' or '.join(map(repr, names)),
      'choose one',
    )


def check_devices(config: ConfigDict, num_devices: int):
  """Refuses batches and meshes that do not fit the devices."""
  for field, parts in (('train', config.train.microbatches), ('eval', 1), ('sample', 1)):
    batch = config[field].batch_size
    by = 'devices' if parts == 1 else f'devices x {parts} microbatches'
    check(
      batch % (num_devices * parts) == 0,
      f'{field}.batch_size',
      batch,
      f'divisible by the {num_devices} {by}',
      f'try {_multiples(batch, num_devices * parts)}',
    )
  fsdp = config.parallel.fsdp
  check(
    num_devices % fsdp == 0,
    'parallel.fsdp',
    fsdp,
    f'a divisor of the {num_devices} devices',
    'try 1, which replicates the parameters',
  )
  check(
    fsdp == 1 or config.parallel.mode == 'jit',
    'parallel.fsdp',
    fsdp,
    "1 with config.parallel.mode='pmap', which keeps replicas",
    'use --config.parallel.mode=jit',
  )


def _multiples(n: int, divisor: int) -> str:
  below = n // divisor * divisor
  return f'{below} or {below + divisor}' if below else str(divisor)
