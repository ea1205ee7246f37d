"""Every benchmark in turn, each a process of its own, and benchmarks/RESULTS.md of what they print.

  python -m benchmarks --data_dir=DIR                  # DIR as config.data.dir
  python -m benchmarks --only=train_step,checkpoint
  python -m benchmarks --quick --output=/tmp/quick.md  # does each work? its numbers mean nothing

An accelerator runs the full-size CIFAR-10 and ImageNet 64 configs in float32, with the matrix
products of jax_default_matmul_precision=highest (true float32) and of the default (TF32 on NVIDIA,
bfloat16 on TPU), and in bfloat16; a CPU a smaller CIFAR-10. Status 1 where a part has failed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ('train_step', 'samplers', 'features', 'data', 'checkpoint', 'parameters')
SMALL = ('--config.model.num_blocks=4', '--config.model.width=64', '--config.train.batch_size=16')
PRECISIONS = {  # title: dtype of activations, precision of products
  'float32, highest precision': ('float32', 'highest'),
  'float32, default precision': ('float32', ''),
  'bfloat16': ('bfloat16', ''),
}
IMAGES_PER_DEVICE = {'cifar10': 128, 'imagenet64': 32}  # of a train step: what 80 GB hold


class Part(NamedTuple):
  """python -m benchmarks.`module` `arguments`, with jax_default_matmul_precision=`precision`."""

  title: str
  module: str
  arguments: tuple[str, ...] = ()
  precision: str = ''

  def shown(self) -> str:
    """The command as one types it, with DIR for the directory of the data."""
    variable = f'JAX_DEFAULT_MATMUL_PRECISION={self.precision} ' if self.precision else ''
    arguments = (re.sub(r'^(--config\.data\.dir=).*', r'\1DIR', a) for a in self.arguments)
    return f'{variable}{" ".join(("python", "-m", f"benchmarks.{self.module}", *arguments))}'


def train_steps(quick: bool, platform: str, num_devices: int) -> Iterator[Part]:
  """A train step for every config and precision."""
  if quick:
    yield Part('digits:debug', 'train_step', (_config('digits:debug'), '--steps=1', '--warmup=1'))
  elif platform == 'cpu':
    arguments = (_config('cifar10'), *SMALL, '--steps=10', '--nobreakdown')
    yield Part('cifar10, reduced, float32', 'train_step', arguments)
  for name, size in {} if quick or platform == 'cpu' else IMAGES_PER_DEVICE.items():
    for title, (dtype, precision) in PRECISIONS.items():
      batch = f'--config.train.batch_size={size * num_devices}'
      arguments = (_config(name), batch, f'--config.model.dtype={dtype}', '--nobreakdown')
      yield Part(f'{name}, {title}', 'train_step', arguments, precision)


def parts(quick: bool, data_dir: str, environment: dict[str, Any]) -> dict[str, list[Part]]:
  """What each of PARTS runs on these devices."""
  platform, num_devices = environment['platform'], environment['num_devices']
  cpu, debug = platform == 'cpu', ':debug' if quick else ''
  sizes = SMALL[:2] if cpu and not quick else ()
  model = _config('digits:debug' if quick else 'cifar10')
  state = ['digits:debug'] if quick else ['cifar10'] if cpu else ['cifar10', 'imagenet64']
  sample = () if quick else (f'--config.sample.batch_size={16 if cpu else 128 * num_devices}',)
  short = ('--num_steps=2', '--repeats=1') if quick else ()
  images = num_devices if quick else 16 if cpu else 256 * num_devices
  features = ('--samplers=', f'--features_images={images}', *short[1:])
  where = (f'--config.data.dir={data_dir}',) if data_dir else ()
  few = ('--seconds=0.1', '--repeats=1') if quick else ()
  sets = ['digits'] if quick and not data_dir else ['cifar10', 'imagenet64']
  counted = ('digits',) if quick else ()
  return {
    'train_step': list(train_steps(quick, platform, num_devices)),
    'samplers': [Part('', 'throughput', (model, *sizes, *sample, *short))],
    'features': [Part('', 'throughput', (_config('digits'), *features))],
    'data': [Part(n, 'data', (_config(n + debug), *where, *few)) for n in sets],
    'checkpoint': [Part(n, 'checkpoint', (_config(n), *sizes, *few[1:])) for n in state],
    'parameters': [Part('', 'parameters', counted)],
  }


def _config(name: str) -> str:
  file, _, arg = name.partition(':')
  return f'--config=configs/{file}.py{arg and ":" + arg}'


def run(part: Part) -> tuple[str, str]:
  """What a part has printed, and '' or the cause of its failure in one line."""
  command = [sys.executable, '-m', f'benchmarks.{part.module}', *part.arguments]
  env = os.environ | ({'JAX_DEFAULT_MATMUL_PRECISION': part.precision} if part.precision else {})
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
  return done.stdout, cause(done.stderr, done.returncode) if done.returncode else ''


def cause(stderr: str, status: int) -> str:
  """The line that says why a process ended with this status: of a traceback the last error's."""
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  errors = [line for line in lines if re.match(r'[\w.]*(Error|Exception|Interrupt)\b', line)]
  return f'{(errors or lines or ["it said nothing"])[-1][:300]} (status {status})'


def step_table(line: str) -> str:
  """The JSON line of benchmarks.train_step as a table."""
  r = json.loads(line)
  time, share, flops = r['step_ms'], r['flop_utilisation'], r['matmul_flops']
  cells = {
    'batch size': r['batch_size'],
    'trace, s': f'{r["trace_and_lower_s"]:.3g}',
    'compile, s': f'{r["compile_s"]:.3g}',
    'step, ms (quartiles)': f'{time["median"]:.4g} ({time["q25"]:.4g} to {time["q75"]:.4g})',
    'images/s': f'{r["images_per_s"]:.4g}',
    'TFLOP/s a device': f'{flops / r["devices"] / time["median"] / 1e9:.3g}',
    'FLOP utilisation': f'{share:.1%}' if share else 'peak not known',
    'memory a device, GB': f'{r["memory_bytes_per_device"]["total"] / 1e9:.3g}',
  }
  rows = (cells, ['---'] * len(cells), map(str, cells.values()))
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def heading(environment: dict[str, Any]) -> str:
  """Device, versions, revision, cores and date."""
  versions = environment['versions']
  try:
    versions['libtpu'] = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    pass
  lines = {
    'device': f'{environment["num_devices"]} x {environment["device"]} ({environment["platform"]})',
    'cores': f'{os.cpu_count()}, load average {os.getloadavg()[0]:.1f} at the start',
    'versions': ', '.join(f'{k} {v}' for k, v in versions.items()),
    'Python': environment['python'],
    'revision': environment['git_revision'] or 'not a checkout',
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
  }
  table = '\n'.join(f'| {name} | {text} |' for name, text in lines.items())
  note = (
    'FLOPs are those of matrix products and convolutions. FLOP utilisation is their share of the '
    "device's peak as its vendor states it, of float32 of TF32's, whatever the precision. What one "
    'H100 gave is in [H100.md](H100.md).'
  )
  return f'# Results of `python -m benchmarks`\n\n| | |\n|---|---|\n{table}\n\n{note}'


def main(argv: list[str] | None = None) -> int:
  """Runs the parts, and writes the results after each; returns the exit status."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__.split('\n')[0])
  parser.add_argument('--data_dir', default='', help='TFDS data_dir; default: as config.data.dir')
  parser.add_argument('--only', default=','.join(PARTS), help='some of the default: %(default)s')
  parser.add_argument('--quick', action='store_true', help='the smallest of each')
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'benchmarks' / 'RESULTS.md')
  args = parser.parse_args(argv)
  chosen = args.only.split(',')
  if unknown := set(chosen) - set(PARTS):
    parser.error(f'--only={args.only} has {min(unknown)!r}; choose from {", ".join(PARTS)}.')
  # In a process of its own: this one takes no accelerator.
  ask = (
    'import json; from vdm import cards; from vdm.system import hosts; '
    'hosts.use_cores(lambda n: 16 % n == 0); '
    'print(json.dumps(cards.environment()))'
  )
  asked = subprocess.run([sys.executable, '-c', ask], cwd=ROOT, stdout=subprocess.PIPE, check=True)
  environment, failed = json.loads(asked.stdout), 0
  texts = [heading(environment)]
  for name, members in parts(args.quick, args.data_dir, environment).items():
    for part in members if name in chosen else ():
      print(part.shown(), file=sys.stderr, flush=True)
      printed, why = run(part)
      failed += bool(why)
      if name == 'train_step' and not why:
        printed = step_table(printed)
      title = name.replace('_', ' ').capitalize() + (part.title and f': {part.title}')
      texts += [f'## {title}', f'```\n{part.shown()}\n```', printed.strip()]
      texts += [f'**Failed**: `{why}`'] if why else []
      args.output.write_text('\n\n'.join(text for text in texts if text) + '\n')
      print(f'  {why or "done"}', file=sys.stderr, flush=True)
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
