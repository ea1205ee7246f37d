"""The one bridge from a config to objects, and the checks that need no device."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vdm import ema
from vdm import state as state_lib
from vdm.adaptive import Adaptive, adaptive
from vdm.errors import require, within
from vdm.gaussian import HEADS, Denoiser, Schedule, network_input, to_prediction
from vdm.guidance import THRESHOLDS
from vdm.nn import NETWORKS, blocks
from vdm.ode import DEQUANTIZATIONS, PROBES
from vdm.samplers import SAMPLERS, Sampler
from vdm.schedules import SCHEDULES, Learned
from vdm.weightings import WEIGHTINGS, Weighting, shifted


class Model(NamedTuple):
  """Everything the loss, the likelihood and the samplers need of a config."""

  init: Callable[[jax.Array], Any]  # key -> params {'network', 'schedule'}
  schedule: Callable[[Any], Schedule]  # params -> Schedule
  # (params, label=None, flag=None, *, train=False, key_dropout=None) -> Denoiser
  denoiser: Callable[..., Denoiser]
  weighting: Weighting
  image_shape: tuple[int, ...]
  num_values: int
  adaptive: Adaptive | None = None

  def training_schedule(self, params: Any, adaptive_state: Any) -> Schedule:
    """What training draws its times from: the adaptive schedule where there is one."""
    if self.adaptive:
      return self.adaptive.as_schedule(adaptive_state)
    return self.schedule(params)


def _factory(table: dict, field: str, block: dict, **extra):
  """table[block['name']](**rest of block, **extra), with errors in the user's words."""
  kwargs = {**block, **extra}
  name = kwargs.pop('name')
  require(
    name in table, f'config.{field}.name', name, f'one of {", ".join(table)}', 'choose one of these'
  )
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
  with within(f'config.{field}'):
    return table[name](**kwargs)


def schedule(config: ConfigDict) -> tuple[Learned, Adaptive | None]:
  """config.schedule as a Learned pair, and as an adaptive schedule where it is one.

  A fixed schedule has no parameters. An adaptive one is for training; all else sees the linear
  schedule between its end points.
  """
  table = SCHEDULES | {'adaptive': adaptive}
  built = _factory(table, 'schedule', config.schedule.to_dict())
  if isinstance(built, Learned):
    return built, None
  if isinstance(built, Adaptive):
    fixed = SCHEDULES['linear'](config.schedule.log_snr_min, config.schedule.log_snr_max)
    return Learned(dict, lambda params: fixed), built
  return Learned(dict, lambda params: built), None


def _weighting(config: ConfigDict) -> Weighting:
  """config.weighting as a function; beside any name, the leaf image_size applies `shifted`."""
  block = config.weighting.to_dict()
  if 'image_size' not in block:
    return _factory(WEIGHTINGS, 'weighting', block)
  image_size = block.pop('image_size')
  weighting = _factory(WEIGHTINGS, 'weighting', block)
  with within('config.weighting'):
    return shifted(weighting, image_size)


def _of_chosen(table: dict, block: ConfigDict) -> dict:
  """A block that lists the arguments of every factory, without those that are another's default.

  So `--config.sample.sampler.name=ddim` is enough, and what has no effect is still refused.
  """
  block = block.to_dict()
  if block['name'] not in table:
    return block
  taken = inspect.signature(table[block['name']]).parameters
  defaults = [
    (k, p.default)
    for factory in table.values()
    for k, p in inspect.signature(factory).parameters.items()
  ]
  return {k: v for k, v in block.items() if k == 'name' or k in taken or (k, v) not in defaults}


def sampler(config: ConfigDict) -> Sampler:
  """config.sample.sampler."""
  block = _of_chosen(SAMPLERS, config.sample.sampler)
  return _factory(SAMPLERS, 'sample.sampler', block)


def threshold(config: ConfigDict) -> Callable[[Denoiser], Denoiser]:
  """config.sample.threshold."""
  block = _of_chosen(THRESHOLDS, config.sample.threshold)
  return _factory(THRESHOLDS, 'sample.threshold', block)


def other_schedule(config: ConfigDict, field: str, own: Schedule) -> Schedule:
  """config.sample.grid or config.eval.schedule: the model's own, or a fixed one between its ends.

  `own` has to be concrete: the factories of schedules take floats.
  """
  part, leaf = field.split('.')
  block = config[part][leaf].to_dict()
  if block['name'] == 'schedule':
    return _factory({'schedule': lambda: own}, field, block)
  least, most = map(float, own(jnp.array([1.0, 0.0])))
  if 'sigma_min' not in block:
    block = {'log_snr_max': most} | block
  if 'sigma_max' not in block:
    block = {'log_snr_min': least} | block
  built = _factory(SCHEDULES, field, block)
  require(
    not isinstance(built, Learned),
    f'config.{field}.name',
    block['name'],
    'a schedule without parameters',
    "'schedule' is the model's own",
  )
  low, high = map(float, built(jnp.array([1.0, 0.0])))
  require(
    least - 0.01 <= low < high <= most + 0.01,
    f'config.{field}',
    config[part][leaf].to_dict(),
    f"within the model's log_snr, {least:.2f} to {most:.2f}, not {low:.2f} to {high:.2f}",
    'leave its limits out, or train with a wider config.schedule',
  )
  return built


def _check_sampling(config: ConfigDict, own: Schedule):
  """Refuses samplers, thresholds, grids and guidance that the model cannot follow."""
  sampler(config)
  threshold(config)
  other_schedule(config, 'sample.grid', own)
  other_schedule(config, 'eval.schedule', own)
  last = config.sample.denoise_last
  require(
    not last or config.sample.num_steps > 1,
    'config.sample.num_steps',
    config.sample.num_steps,
    '2 or more with config.sample.denoise_last=True',
    'the last step only denoises',
  )
  guidance = config.sample.guidance
  kinds = ('none', 'classifier_free', 'auto')
  require(
    guidance.kind in kinds,
    'config.sample.guidance.kind',
    guidance.kind,
    f'one of {kinds}',
    'choose one',
  )
  require(
    guidance.log_snr_min < guidance.log_snr_max,
    'config.sample.guidance.log_snr_min',
    guidance.log_snr_min,
    f'below config.sample.guidance.log_snr_max={guidance.log_snr_max}',
    'swap them',
  )
  require(
    guidance.kind != 'classifier_free' or config.train.label_dropout > 0,
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


def for_platform(config: ConfigDict, platform: str) -> ConfigDict:
  """A copy in which what is 'auto' says what that means on `platform`: 'cpu', 'gpu' or 'tpu'.

  Without it 'auto' is for the platform at hand. Layers choose as they are lowered.
  """
  config = config.copy_and_resolve_references()
  config.model.dtype = dtype(config, platform).name
  if 'scan_blocks' in config.model:
    config.model.scan_blocks = 'on' if scan_blocks(config, platform) else 'off'
  return config


def dtype(config: ConfigDict, platform: str = '') -> jnp.dtype:
  """Of activations inside the network, on `platform` or on what is at hand."""
  name = config.model.dtype
  require(
    name in ('auto', 'float32', 'bfloat16'),
    'config.model.dtype',
    name,
    "'auto', 'float32' or 'bfloat16'",
    'auto means bfloat16 on TPU and GPU, float32 on CPU',
  )
  if name == 'auto':
    name = 'float32' if (platform or jax.default_backend()) == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def _flagged(config: ConfigDict) -> bool:
  """Whether the network is told which images were augmented."""
  return 'augmentation_flag' in config.model and config.model.augmentation_flag


def scan_blocks(config: ConfigDict, platform: str = '') -> bool:
  """Whether the network runs its equal blocks in a loop; False for one that has no such choice.

  Not on CPU by default, where convolutions in a loop have been slow (`vdm.nn.layers.conv3x3`).
  """
  if 'scan_blocks' not in config.model:
    return False
  choice = config.model.scan_blocks
  require(
    choice in ('auto', 'on', 'off'),
    'config.model.scan_blocks',
    choice,
    "'auto', 'on' or 'off'",
    'auto means on, but off on CPU',
  )
  platform = platform or jax.default_backend()
  return choice == 'on' or (choice == 'auto' and platform != 'cpu')


def model(config: ConfigDict) -> Model:
  """The network, schedule and weighting of a config, as pure functions of parameters."""
  check_config(config)
  block = config.model.to_dict()
  output, class_conditional = block.pop('output'), block.pop('class_conditional')
  condition_on = block.pop('condition_on')
  require(
    output in HEADS,
    'config.model.output',
    output,
    f'one of {", ".join(HEADS)}',
    'choose one of these',
  )
  num_classes = config.data.num_classes if class_conditional else 0
  embedding_size = config.data.embedding_size
  flagged, scan = _flagged(config), scan_blocks(config)
  unrolled = _factory(
    NETWORKS,
    'model',
    block | ({'scan_blocks': False} if 'scan_blocks' in block else {}),
    num_classes=num_classes,
    dtype=dtype(config),
    # z is nearly eps where noise dominates; x, v and F are nothing like it, the score is -z there,
    # and o = eps - x has the wrong sign of x
    residual=output == 'eps',
    **(dict(embedding_size=embedding_size) if embedding_size else {}),
  )
  network = unrolled.clone(scan_blocks=True) if scan else unrolled
  learned, adapts = schedule(config)
  weighting = _weighting(config)
  require(
    not (jax.tree.leaves(learned.init()) and config.weighting.name != 'elbo'),
    'config.weighting.name',
    config.weighting.name,
    "'elbo' where the schedule is learned",
    'the end points are trained by the bound: choose a fixed config.schedule.name, such as linear',
  )
  _check_sampling(config, learned.as_schedule(learned.init()))
  image_shape = tuple(config.data.image_shape)

  def init(key):
    z, t = jnp.zeros((1, *image_shape)), jnp.zeros((1,))
    label = jnp.zeros((1,), jnp.int32) if class_conditional else None
    label = jnp.zeros((1, embedding_size)) if embedding_size else label

    def params_of(network, key):
      return network.init(key, z, t, label, train=False)['params']

    params = params_of(unrolled, key)
    if scan:  # the same numbers in either layout
      names = blocks.stacked_names(jax.eval_shape(functools.partial(params_of, network), key))
      params = blocks.stack(params, names)
    return {'network': params, 'schedule': learned.init()}

  def as_schedule(params):
    return learned.as_schedule(params['schedule'])

  def denoiser(params, label=None, flag=None, *, train=False, key_dropout=None):
    if condition_on == 'live':
      ends = as_schedule(params)(jnp.array([0.0, 1.0]))  # so that t is always in [0, 1]
    else:
      ends = config.schedule.log_snr_max, config.schedule.log_snr_min
    rngs = {} if key_dropout is None else {'dropout': key_dropout}
    label = label if class_conditional or embedding_size else None
    kwargs = dict(train=train, rngs=rngs) | (dict(flag=flag) if flagged else {})

    def denoise(z, log_snr):
      t = (ends[0] - log_snr) / (ends[0] - ends[1])
      z_in = network_input(output, z, log_snr)
      out = network.apply({'params': params['network']}, z_in, t, label, **kwargs)
      return to_prediction(output, out, z, log_snr)

    return denoise

  num_values = config.data.num_values
  return Model(init, as_schedule, denoiser, weighting, image_shape, num_values, adapts)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """config.optimizer as an optax transformation."""
  decay = config.optimizer.decay
  require(
    decay in ('constant', 'cosine'),
    'config.optimizer.decay',
    decay,
    "'constant' or 'cosine'",
    'choose one',
  )
  return state_lib.make_optimizer(config.train.num_steps, **config.optimizer)


def create_state(config: ConfigDict, model: Model, params: Any) -> state_lib.TrainState:
  """The state before the first step from these parameters."""
  adapts = model.adaptive.init() if model.adaptive else None
  averages = tuple(ema_decays(config, 0))[1:]
  return state_lib.create(params, optimizer(config), adapts, averages)


def init_state(config: ConfigDict, model: Model) -> Callable[[], state_lib.TrainState]:
  """A function without arguments, to be traced: the state before the first step."""
  return lambda: create_state(config, model, model.init(jax.random.key(config.seed)))


def ema_decays(config: ConfigDict, step: jax.Array | int) -> dict[str, jax.Array]:
  """The decay at `step` of each average config.ema asks for, by name; 'ema' is the first."""
  settings, batch_size = config.ema, config.train.batch_size
  halflives = {'ema': settings.halflife_images}
  halflives |= {f'halflife_{images:g}': images for images in settings.extra_halflives_images}
  decays = {
    name: ema.exponential_decay(step, batch_size, images, settings.rampup_ratio)
    for name, images in halflives.items()
  }
  return decays | {f'std_{std:g}': ema.power_decay(step, std) for std in settings.power_stds}


def check_config(config: ConfigDict):
  """Refuses values that no run could use, before anything is compiled or written."""
  for leaf in ('name', 'output', 'class_conditional', 'condition_on', 'dtype'):
    require(
      leaf in config.model,
      f'config.model.{leaf}',
      None,
      'given',
      'configs/default.py says what it is',
    )
  for field in (
    'train.batch_size',
    'train.num_steps',
    'train.microbatches',
    'train.log_every_steps',
    'train.eval_every_steps',
    'eval.batch_size',
    'eval.draws',
    'sample.num_images',
    'sample.preview_images',
    'sample.batch_size',
    'sample.num_steps',
    'checkpoint.every_steps',
    'checkpoint.keep',
    'fid.batch_size',
    'fid.num_images',
    'fid.train_images',
    'data.num_values',
    'parallel.fsdp',
    'optimizer.learning_rate',
    'ema.halflife_images',
  ):
    block, leaf = field.split('.')
    require(
      config[block][leaf] > 0, f'config.{field}', config[block][leaf], 'positive', 'give 1 or more'
    )
  for field in (
    'train.num_timesteps',
    'eval.num_timesteps',
    'eval.max_images',
    'data.num_classes',
    'optimizer.warmup_steps',
    'optimizer.clip_norm',
    'optimizer.schedule_rate',
    'optimizer.weight_decay',
    'ema.rampup_ratio',
    'ema.snapshot_every_steps',
  ):
    block, leaf = field.split('.')
    require(
      config[block][leaf] >= 0,
      f'config.{field}',
      config[block][leaf],
      'zero or more',
      'give 0 to switch it off',
    )
  shape = config.data.image_shape
  require(
    all(isinstance(n, int) and n > 0 for n in shape),
    'config.data.image_shape',
    tuple(shape),
    'positive integers',
    'for 28 x 28 grey images give --config.data.image_shape=28,28,1',
  )
  require(
    config.data.num_values >= 2,
    'config.data.num_values',
    config.data.num_values,
    '2 or more',
    '256 for 8-bit pixels',
  )
  every, evaluations = config.fid.train_every_steps, config.train.eval_every_steps
  require(
    every >= 0 and every % evaluations == 0,
    'config.fid.train_every_steps',
    every,
    f'a multiple of config.train.eval_every_steps={evaluations}, or 0',
    f'try {evaluations}, or 0 for never',
  )
  conditional, classes = config.model.class_conditional, config.data.num_classes
  require(
    not conditional or classes > 0,
    'config.model.class_conditional',
    conditional,
    'False for data without labels',
    'state config.data.num_classes, or set it to False',
  )
  size = config.data.embedding_size
  require(
    size >= 0 and not (size and conditional),
    'config.data.embedding_size',
    size,
    '0 for a network with classes, and never below',
    'set config.model.class_conditional=False to condition on embeddings',
  )
  label_dropout = config.train.label_dropout
  require(
    0 <= label_dropout < 1 and (conditional or size > 0 or label_dropout == 0),
    'config.train.label_dropout',
    label_dropout,
    'in [0, 1), and 0 without labels or embeddings',
    'give 0, or 0.1 with config.model.class_conditional=True',
  )
  require(
    not config.data.rotate or shape[0] == shape[1],
    'config.data.rotate',
    config.data.rotate,
    f'False for images that are not square, config.data.image_shape={tuple(shape)}',
    'config.data.flip works for any shape',
  )
  require(
    not config.data.rotate or _flagged(config),
    'config.data.rotate',
    config.data.rotate,
    'False for a network that is not told which images were turned',
    'set config.model.augmentation_flag=True',
  )
  microbatches, batch = config.train.microbatches, config.train.batch_size
  require(
    batch % microbatches == 0,
    'config.train.batch_size',
    batch,
    f'divisible by config.train.microbatches={microbatches}',
    f'try {_multiples(batch, microbatches)}',
  )
  for field, names in (
    ('parallel.mode', ('jit', 'pmap')),
    ('model.condition_on', ('live', 'configured')),
  ):
    block, leaf = field.split('.')
    require(
      config[block][leaf] in names,
      f'config.{field}',
      config[block][leaf],
      ' or '.join(map(repr, names)),
      'choose one',
    )
  _check_ode(config)


def _check_ode(config: ConfigDict):
  kinds, ode = config.eval.likelihood, config.eval.ode
  names = ('raw', *ema_decays(config, 0))
  for field, chosen in (
    ('eval.params', tuple(config.eval.params.split(','))),
    ('eval.ode.params', (ode.params,)),
    ('sample.params', (config.sample.params,)),
  ):
    require(
      chosen and set(chosen) <= set(names),
      f'config.{field}',
      ','.join(chosen),
      f'among {", ".join(names)}',
      'config.ema says which averages are kept',
    )
  require(
    kinds in ('elbo', 'ode', 'elbo,ode'),
    'config.eval.likelihood',
    kinds,
    "'elbo', 'ode' or 'elbo,ode'",
    'choose one',
  )
  for leaf, names in (
    ('trace', ('hutchinson', 'exact')),
    ('probe', tuple(PROBES)),
    ('dequantization', tuple(DEQUANTIZATIONS)),
  ):
    require(
      ode[leaf] in names,
      f'config.eval.ode.{leaf}',
      ode[leaf],
      ' or '.join(map(repr, names)),
      'choose one',
    )
  for leaf, least, remedy in (
    ('rtol', 0, 'give 0 or more'),
    ('atol', 1e-6, 'float32 resolves no less: try 1e-3'),
    ('max_steps', 1, 'try 1000'),
    ('num_probes', 1, 'give 1 or more'),
    ('importance_samples', 1, 'give 1 or more'),
  ):
    require(ode[leaf] >= least, f'config.eval.ode.{leaf}', ode[leaf], f'{least} or more', remedy)


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
  """Whether check_devices accepts this number of devices; asks JAX for nothing."""
  try:
    check_devices(config, num_devices)
  except (ValueError, ZeroDivisionError):  # check_config refuses zeros, with their names
    return False
  return True


def _multiples(n: int, divisor: int) -> str:
  below = n // divisor * divisor
  return f'{below} or {below + divisor}' if below else str(divisor)
