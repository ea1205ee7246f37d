"""What is measured on an accelerator: commands, in the order of their worth."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TRAIN_IMAGES = 60_000  # of Fashion-MNIST's file; the others are the test images
START = 50  # seconds of a training run that are not steps: start, compilation, evaluations
EPOCH = 234  # steps of configs/fashion_mnist_full.py
EXIT_SAVED = 75  # of a training run that was stopped and goes on


class Part(NamedTuple):
  """Holds python -m `module` `arguments`, one measurement.

  Attributes:
    name: of the part.
    module: of the command.
    arguments: of the command.
    expected: seconds that it takes on an H100; it is not started with less left.
    limit: seconds after which it is stopped.
    environment: variables of the command.
    needs: the part without whose end, or stop, there is nothing to be measured.
  """

  name: str
  module: str
  arguments: tuple[str, ...]
  expected: float
  limit: float
  environment: tuple[tuple[str, str], ...] = ()
  needs: str = ''

  def shown(self) -> str:
    """Returns the command as one types it."""
    variables = [f'{k}={v}' for k, v in self.environment]
    return ' '.join([*variables, 'python -m', self.module, *self.arguments])


class Plan(NamedTuple):
  """Holds what the parts depend on.

  Attributes:
    out: the folder of the results.
    data: Fashion-MNIST as an NPZ file; '': parts that read it are left out.
    train_minutes: of the training run.
    rehearse: whether all is tiny, for any device.
  """

  out: pathlib.Path
  data: str
  train_minutes: float
  rehearse: bool

  def shown(self, part: Part) -> str:
    """Returns the command of a part as one types it, with OUT and DATA for paths."""
    text = part.shown().replace(self.data or 'DATA', 'DATA')
    return text.replace(str(self.out), 'OUT')


# Its programs run once: without it most of its minutes are the choice of kernels.
NO_AUTOTUNING = (('XLA_FLAGS', '--xla_gpu_autotune_level=0'),)
TRUE_FLOAT32 = (('JAX_DEFAULT_MATMUL_PRECISION', 'highest'),)
PRECISIONS = {  # dtype of activations, and variables
  'bfloat16': ('bfloat16', ()),
  'TF32': ('float32', ()),
  'float32': ('float32', TRUE_FLOAT32),
}
OTHER_PRECISIONS = (  # of the same networks: config, precision, expected, limit
  ('cifar10', 'TF32', 70, 100),
  ('fashion_mnist_uvit', 'bfloat16', 27, 100),
  ('cifar10', 'float32', 80, 120),
  ('imagenet64', 'TF32', 330, 420),
)
BATCHES = {  # images per step, by config and precision where it matters
  'cifar10': 128,
  'imagenet64': 64,
  'imagenet64 TF32': 32,
  'fashion_mnist_uvit': 512,
  'fashion_mnist_full': 256,
}


def step(config: str, precision: str, expected: float, limit: float, rehearse: bool) -> Part:
  """Returns the train step of a config, in a precision."""
  dtype, environment = PRECISIONS[precision]
  size = BATCHES.get(f'{config} {precision}', BATCHES[config])
  shape = (f'--config.train.batch_size={size}', '--steps=15', '--trace_steps=3')
  arguments = (
    f'--config=configs/{config}.py{":debug" if rehearse else ""}',
    f'--config.model.dtype={dtype}',
    '--nobreakdown',
    *(('--steps=1', '--warmup=1', '--trace_steps=1') if rehearse else shape),
  )
  name = f'step {config} {precision}'
  return Part(name, 'benchmarks.train_step', arguments, expected, limit, environment)


def arrays(path: str, train_images: int = TRAIN_IMAGES) -> dict[str, Any]:
  """Returns the leaves of config.data for Fashion-MNIST in an NPZ file of `pack`."""
  split = {'train_split': f'[:{train_images}]', 'eval_split': f'[{train_images}:]'}
  return {'name': 'arrays', 'path': path} | split


def fashion_mnist(plan: Plan, leaves: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns flags of configs/fashion_mnist_full.py on the file, with more leaves changed."""
  data = arrays(plan.data)
  if plan.rehearse:
    data = arrays(plan.data, 64) | {'train_images': 64, 'eval_images': 32}
  leaves = {f'data.{name}': value for name, value in data.items()} | leaves
  config = f'configs/fashion_mnist_full.py{":debug" if plan.rehearse else ""}'
  return (f'--config={config}', *(f'--config.{name}={value}' for name, value in leaves.items()))


def num_steps(plan: Plan, results: Mapping[str, Any]) -> int:
  """Returns steps for the minutes of the run at the rate that was measured, in whole epochs.

  Without one it is the config's own number, and the limit stops the run.
  """
  measured = results.get('step fashion_mnist_full bfloat16', {'status': 1})
  if measured['status']:
    return 24 * EPOCH
  per_second = 1000 / measured['result']['step_ms']['median']
  epochs = int(0.95 * (60 * plan.train_minutes - START) * per_second / EPOCH)
  return EPOCH * max(epochs // 4 * 4, 4)  # evaluated four times


def training(plan: Plan, results: Mapping[str, Any]) -> list[Part]:
  """Returns a run of Fashion-MNIST: trained, its averages kept, all test images, and distances."""
  workdir, seconds = plan.out / 'fashion_mnist', 60 * plan.train_minutes
  steps = num_steps(plan, results)
  every = {'train.eval_every_steps': steps // 4, 'checkpoint.every_steps': steps // 4}
  leaves = {'train.num_steps': steps, **every, 'eval.max_images': 1000, 'eval.draws': 2}
  flags = fashion_mnist(plan, {} if plan.rehearse else leaves | {'checkpoint.keep': 1})
  train = (*flags, f'--workdir={workdir}')
  release = (*train, '--mode=release', f'--out={plan.out / "fashion_mnist_released"}')
  evaluate = (*flags, *scored(plan), f'--workdir={workdir}')
  name, main = 'train fashion_mnist_full', 'vdm.main'
  return [
    Part(name, main, train, seconds, seconds + 20),
    Part('release fashion_mnist_full', main, release, 10, 40, needs=name),
    Part('evaluate fashion_mnist_full', main, evaluate, 100, 150, needs=name),
  ]


def scored(plan: Plan) -> tuple[str, ...]:
  """Returns flags of the evaluation of averages: all test images, and distances of samples."""
  leaves = {'eval.params': 'ema', 'eval.fid': True, 'fid.weights': plan.out / 'classifier.npz'}
  full = {} if plan.rehearse else {'eval.max_images': 0, 'eval.draws': 4}
  return ('--mode=eval', *(f'--config.{name}={value}' for name, value in (leaves | full).items()))


def all_parts(plan: Plan, results: Mapping[str, Any]) -> Sequence[Part]:
  """Returns every part: first what benchmarks/H100.md has no figure of.

  Args:
    plan: what they depend on.
    results: of the parts so far, by name.
  """
  rehearse = plan.rehearse
  tiny = ('--width=32', '--num_blocks=1', '--batch_size=4', '--steps=1', '--dtypes=float32')
  uvit = f'--config=configs/fashion_mnist_uvit.py{":debug" if rehearse else ""}'
  short = ('--num_steps=2', '--repeats=1', '--samplers=heun')
  long = ('--num_steps=32', '--repeats=3', '--config.sample.batch_size=1024')
  little = ('--images=8', '--ode_images=8', '--groups', '4', '--repeats=1', '--tolerance=.1')
  model = ('--workdir=pretrained/fashion_mnist_full', f'--data={plan.data}')
  released = (*fashion_mnist(plan, {}), *scored(plan), f'--workdir={plan.out / "released"}')
  rates = Part(
    'likelihoods and codec',
    'benchmarks.rates',
    little if rehearse else model,
    150,
    240,
    TRUE_FLOAT32,
  )
  evaluate = Part(
    'evaluate the released model',
    'vdm.main',
    released,
    100,
    150,
  )
  train = training(plan, results)
  small = ('--only=mlp',) if rehearse else ()
  parts = [
    Part('correctness', 'benchmarks.correctness', small, 150, 240, NO_AUTOTUNING),
    Part('public step', 'benchmarks.public_step', tiny if rehearse else (), 150, 240),
    *([rates] if plan.data or rehearse else []),
    step('imagenet64', 'bfloat16', 330, 420, rehearse),
    step('fashion_mnist_uvit', 'TF32', 30, 100, rehearse),
    step('fashion_mnist_full', 'bfloat16', 32, 100, rehearse),
    *(train if plan.data else []),
    *([evaluate] if plan.data and not rehearse else []),
    Part('samplers', 'benchmarks.throughput', (uvit, *(short if rehearse else long)), 40, 100),
    step('cifar10', 'bfloat16', 72, 100, rehearse),
  ]
  if not rehearse:
    return [*parts, *(step(*of, rehearse) for of in OTHER_PRECISIONS)]
  # nearly all of it is compilation; nothing is left but in `out`
  quick = (('JAX_DISABLE_MOST_OPTIMIZATIONS', '1'), ('XDG_CACHE_HOME', str(plan.out / 'cache')))
  return [part._replace(expected=0, limit=120, environment=quick) for part in parts]


def table(parts: Sequence[Part]) -> str:
  """Returns the plan of minutes, in Markdown."""
  lines = ['| part | expected, s | limit, s | so far, min |', '|---|---|---|---|']
  total = 0.0
  for part in parts:
    total += part.expected
    lines.append(f'| {part.name} | {part.expected:.0f} | {part.limit:.0f} | {total / 60:.1f} |')
  return '\n'.join(lines)
