"""Refuses what no run could use, before anything is compiled or written; needs no device."""

from ml_collections import ConfigDict

from vdm.build.factories import other_schedule, sampler, threshold
from vdm.build.optimizer import ema_decays
from vdm.diffusion.decoders import discrete
from vdm.diffusion.gaussian import Schedule
from vdm.diffusion.ode import PROBES
from vdm.errors import require


def check_sampling(config: ConfigDict, own: Schedule):
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


def is_flagged(config: ConfigDict) -> bool:
  """Whether the network is told which images were augmented."""
  return 'augmentation_flag' in config.model and config.model.augmentation_flag


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
    not config.data.rotate or is_flagged(config),
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
    ('dequantization', tuple(discrete(config.data.num_values).dequantizations)),
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
