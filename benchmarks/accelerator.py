"""All that is to be measured on an accelerator, in the order of its worth, in so many minutes.

  python -m benchmarks.accelerator --minutes=9 --out=OUT
  python -m benchmarks.accelerator --rehearse --out=OUT      # the same parts, tiny, on a CPU

Each part is a process of its own with a limit of its own. OUT/results.json and OUT/RESULTS.md are
written after each, and a second start with the same OUT goes on where the first stopped. A part for
which too little time is left is passed over. Status 1 if a part has failed.
"""

import argparse
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Part(NamedTuple):
  """python -m `module` `arguments`, for at most `seconds`."""

  name: str
  module: str
  arguments: tuple[str, ...]
  seconds: float
  environment: tuple[tuple[str, str], ...] = ()

  def shown(self) -> str:
    """The command as one types it."""
    variables = [f'{k}={v}' for k, v in self.environment]
    return ' '.join([*variables, 'python -m', self.module, *self.arguments])


def step_parts(rehearse: bool) -> list[Part]:
  """The train step of each config in each precision."""
  configs = {  # name: images per step
    'cifar10': 128,
    'imagenet64': 64,
    'fashion_mnist_uvit': 512,
    'fashion_mnist_full': 256,
  }
  true = (('JAX_DEFAULT_MATMUL_PRECISION', 'highest'),)
  precisions = {'bfloat16': ('bfloat16', ()), 'TF32': ('float32', ()), 'float32': ('float32', true)}
  parts = []
  for config, size in configs.items():
    for title, (dtype, environment) in precisions.items():
      if config == 'fashion_mnist_full' and title != 'bfloat16':
        continue  # it is there for the speed that a training run will have
      if config != 'cifar10' and title == 'float32':
        continue
      size_of = size // 2 if (config, title) == ('imagenet64', 'TF32') else size
      shape = ('--steps=1', '--warmup=1') if rehearse else ('--steps=15', '--trace_steps=3')
      batch = () if rehearse else (f'--config.train.batch_size={size_of}',)
      arguments = (
        f'--config=configs/{config}.py{":debug" if rehearse else ""}',
        f'--config.model.dtype={dtype}',
        '--nobreakdown',
        *batch,
        *shape,
      )
      limit = 240 if config == 'imagenet64' else 100  # more than 100 s are compilation
      name = f'step {config} {title}'
      parts.append(Part(name, 'benchmarks.train_step', arguments, limit, environment))
  order = list(precisions)  # of worth
  return sorted(parts, key=lambda part: order.index(part.name.split()[-1]))


def all_parts(rehearse: bool) -> list[Part]:
  """Every part, in the order of worth."""
  tiny = ('--width=32', '--num_blocks=1', '--batch_size=4', '--steps=1')
  debug = ':debug' if rehearse else ''
  uvit = f'--config=configs/fashion_mnist_uvit.py{debug}'
  short = ('--num_steps=2', '--repeats=1') if rehearse else ('--num_steps=32', '--repeats=3')
  batch = () if rehearse else ('--config.sample.batch_size=1024',)
  steps = step_parts(rehearse)
  return [
    *steps[:-1],
    Part('correctness', 'benchmarks.correctness', (), 600 if rehearse else 120),
    Part('public step', 'benchmarks.public_step', tiny if rehearse else (), 150),
    steps[-1],
    Part('samplers', 'benchmarks.throughput', (uvit, *batch, *short), 100),
  ]


def run(part: Part, seconds: float) -> dict[str, Any]:
  """Runs a part; what it printed last, as JSON if it is, its status, seconds and last errors.

  At its limit it gets SIGTERM, then, after ten seconds, SIGKILL.
  """
  env = os.environ | dict(part.environment)
  command = [sys.executable, '-m', part.module, *part.arguments]
  start = time.monotonic()
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
  )
  try:
    printed, errors = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGTERM)
    try:
      printed, errors = process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      printed, errors = process.communicate()
  lines = printed.strip().splitlines()
  try:
    value = json.loads(lines[-1]) if lines else None
  except ValueError:
    value = printed.strip()
  result = {
    'command': part.shown(),
    'status': process.returncode,
    'seconds': round(time.monotonic() - start, 1),
    'result': value,
  }
  return result | ({} if process.returncode == 0 else {'errors': errors[-3000:]})


def step_row(name: str, r: dict[str, Any]) -> str:
  """A line of the table of steps."""
  ms, share, memory = r['step_ms'], r['flop_utilisation'], r['memory_bytes_per_device']
  cells = (
    name.removeprefix('step '),
    r['batch_size'],
    f'{ms["median"]:.1f} ({ms["q25"]:.1f} to {ms["q75"]:.1f})',
    f'{r["images_per_s"]:.0f}',
    f'{r["matmul_flops"] / r["devices"] / ms["median"] / 1e9:.0f}',
    f'{share:.0%}' if share else '',
    f'{memory["total"] / 1e9:.1f}',
    f'{r["trace_and_lower_s"]:.1f} + {r["compile_s"]:.1f}',
  )
  return f'| {" | ".join(map(str, cells))} |'


def kernel_table(steps: dict[str, Any]) -> str:
  """Milliseconds per step of each class of kernel; empty where no trace has any."""
  columns = {k.removeprefix('step '): v['kernels']['ms'] for k, v in steps.items()}
  columns = {name: ms for name, ms in columns.items() if ms}
  classes = sorted({c for ms in columns.values() for c in ms}, key=lambda c: c == 'rest')
  rows = [['kernels, ms per step', *columns], ['---'] * (1 + len(columns))]
  rows += [[c, *(f'{ms[c]:.2f}' if c in ms else '' for ms in columns.values())] for c in classes]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows) if columns else ''


def markdown(results: dict[str, Any]) -> str:
  """The results as a page."""
  parts = results['parts'].items()
  steps = {k: v['result'] for k, v in parts if k.startswith('step ') and v['status'] == 0}
  head = '| config, precision | batch | step, ms (quartiles) | images/s | TFLOP/s | of peak '
  head += '| memory, GB | trace + compile, s |\n|---|---|---|---|---|---|---|---|'
  one = next(iter(steps.values()), None)
  on = f'{one["devices"]} x {one["device_kind"]}, jax {one["jax"]}, ' if one else ''
  texts = ['# Results of `python -m benchmarks.accelerator`', f'{on}{results["written"]}.']
  if steps:
    texts += ['\n'.join([head, *(step_row(*item) for item in steps.items())])]
    texts += [table] if (table := kernel_table(steps)) else []
  commands = [
    f'| {name} | `{part["command"]}` | {status_of(part)} | {part["seconds"]} |'
    for name, part in parts
  ]
  texts += ['\n'.join(['| part | command | | seconds |\n|---|---|---|---|', *commands])]
  for name, part in parts:
    if not name.startswith('step ') and part['result']:
      result = part['result']
      text = result if isinstance(result, str) else f'```json\n{json.dumps(result, indent=1)}\n```'
      texts += [f'## {name.capitalize()}\n\n{text}']
  return '\n\n'.join(texts) + '\n'


def status_of(part: dict[str, Any]) -> str:
  """How a part ended, in a word or two."""
  if part['status'] == -signal.SIGTERM:
    return 'stopped at its limit'
  return 'done' if part['status'] == 0 else f'failed, status {part["status"]}'


def main(argv: list[str] | None = None) -> int:
  """Runs what is left; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.accelerator', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--minutes', type=float, default=9.0, help='for all parts together')
  parser.add_argument('--out', type=pathlib.Path, required=True, help='where results are written')
  parser.add_argument('--only', default='', help='only parts whose name begins with one of these')
  parser.add_argument('--rehearse', action='store_true', help='tiny sizes, for any device')
  args = parser.parse_args(argv)
  end = time.monotonic() + 60 * args.minutes
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / 'results.json'
  results = json.loads(path.read_text()) if path.exists() else {'parts': {}}
  for part in all_parts(args.rehearse):
    done = part.name in results['parts'] and results['parts'][part.name]['status'] == 0
    if done or not part.name.startswith(tuple(args.only.split(','))):
      continue
    left = end - time.monotonic()
    if left < 20:
      print(f'{part.name}: no time is left', file=sys.stderr, flush=True)
      continue
    print(f'{part.shown()}  ({left:.0f} s left)', file=sys.stderr, flush=True)
    result = run(part, min(left - 10, part.seconds))
    results['parts'][part.name] = result
    results['written'] = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
    path.write_text(json.dumps(results, indent=1))
    (args.out / 'RESULTS.md').write_text(markdown(results))
    why = result['errors'].strip().splitlines()[-1:] if result['status'] else ''
    print(f'  status {result["status"]}, {result["seconds"]} s {why}', file=sys.stderr, flush=True)
  return int(any(part['status'] for part in results['parts'].values()))


if __name__ == '__main__':
  sys.exit(main())
