"""All that is to be measured on an accelerator, in the order of its worth, in so many minutes.

  python -m benchmarks.accelerator --pack=fashion_mnist.npz --data_dir=DIR   # at home: the data
  python -m benchmarks.accelerator --minutes=9 --out=OUT --data=fashion_mnist.npz
  python -m benchmarks.accelerator --rehearse --out=OTHER    # the same parts, tiny, on a CPU
  python -m benchmarks.accelerator --plan                    # the minutes of every part

Each part is a process of its own with a limit of its own. OUT/results.json and OUT/RESULTS.md are
written after each, and a second start with the same OUT goes on where the first stopped: what is
done is not repeated, and the training run continues. A part for which too little time is left is
passed over; without --data those of Fashion-MNIST are left out. Status 1 if a part has failed, or,
in a rehearsal, has not been done.
"""

import argparse
import datetime
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from benchmarks.accelerator import page
from benchmarks.accelerator.parts import EXIT_SAVED, Part, Plan, all_parts, arrays, table
from vdm.system import files

ROOT = pathlib.Path(__file__).parents[2]
DONE = 'done'
GRACE = 15  # seconds from SIGTERM to SIGKILL


def run(part: Part, seconds: float) -> dict[str, Any]:
  """Runs a part; what it printed last, as JSON if it is, its status, seconds and log.

  At its limit it gets SIGTERM, then, after GRACE seconds, SIGKILL.
  """
  env = os.environ | dict(part.environment)
  command = [sys.executable, '-m', part.module, *part.arguments]
  start, busy = time.monotonic(), cpu_seconds()
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
      printed, errors = process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      printed, errors = process.communicate()
  except BaseException:  # Ctrl-C: the part has a session of its own, and would keep the device
    os.killpg(process.pid, signal.SIGKILL)
    raise
  lines = printed.strip().splitlines()
  try:
    value = json.loads(lines[-1]) if lines else None
  except ValueError:
    value = printed.strip()
  result = {
    'status': process.returncode,
    'seconds': round(time.monotonic() - start, 1),
    'cpu_seconds': round(cpu_seconds() - busy, 1),
    'result': value,
  }
  # a run says on stderr what it found
  return result | ({'log': errors[-3000:]} if result['status'] or not value else {})


def cpu_seconds() -> float:
  """Returns the CPU time of all parts that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def pack(path: pathlib.Path, data_dir: str):
  """Writes Fashion-MNIST, training images before test images, as the NPZ file of --data."""
  from vdm.configs import fashion_mnist

  from vdm import data

  config = fashion_mnist.get_config()
  config.data.dir = data_dir
  splits = [data.load(config.data, split) for split in ('train', 'eval')]
  batches = [split.fetch(np.arange(len(split))) for split in splits]
  x, label = (np.concatenate([batch[name] for batch in batches]) for name in ('image', 'label'))
  np.savez_compressed(path, x=x, label=label.astype(np.uint8))
  print(f'{path}: {len(x):,} images, {path.stat().st_size / 2**20:.1f} MiB')


def released_model(folder: pathlib.Path, data: str):
  """Copies the released model, whose own config then names the file of --data."""
  shutil.copytree(ROOT / 'pretrained' / 'fashion_mnist_full', folder, dirs_exist_ok=True)
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  config['data'] |= arrays(data)
  path.write_text(json.dumps(config, indent=2))


def rehearsal_data(path: pathlib.Path):
  """Writes 96 random images of ten classes as such a file."""
  random = np.random.default_rng(0)
  x = random.integers(0, 256, (96, 28, 28, 1), np.uint8)
  np.savez_compressed(path, x=x, label=np.arange(96, dtype=np.uint8) % 10)


def left_out(part: Part, results: dict[str, Any], left: float) -> str:
  """Returns why a part is not to be run, if it is not."""
  status = {name: result['status'] for name, result in results.items()}
  if status.get(part.name) == 0:
    return DONE
  if part.needs and status.get(part.needs) not in (0, EXIT_SAVED):
    return f'{part.needs!r} is not done'
  wanted = max(part.expected, 5) + GRACE
  return '' if left >= wanted else f'{left:.0f} s are left, and it takes {wanted:.0f}'


def main(argv: list[str] | None = None) -> int:
  """Runs what is left; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.accelerator',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--minutes', type=float, default=9.0, help='for all parts together')
  parser.add_argument('--train_minutes', type=float, default=4.0, help='of the training run')
  parser.add_argument('--out', type=pathlib.Path, help='where results are written')
  parser.add_argument('--data', default='', help='Fashion-MNIST, as --pack writes it')
  parser.add_argument('--only', default='', help='only parts whose name begins with one of these')
  parser.add_argument('--rehearse', action='store_true', help='tiny sizes, for any device')
  parser.add_argument('--plan', action='store_true', help='prints the minutes of every part')
  parser.add_argument('--pack', type=pathlib.Path, help='writes the file of --data')
  parser.add_argument('--data_dir', default='', help='of TensorFlow Datasets, for --pack')
  args = parser.parse_args(argv)
  end = time.monotonic() + 60 * args.minutes
  if args.pack:
    pack(args.pack, args.data_dir)
    return 0
  if args.plan:
    print(table(all_parts(Plan(pathlib.Path('OUT'), 'DATA', args.train_minutes, False), {})))
    return 0
  if not args.out:
    parser.error('--out is missing; give a folder for the results')
  out = args.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  path = out / 'results.json'
  results = json.loads(path.read_text()) if path.exists() else {'parts': {}}
  if results.setdefault('rehearsal', args.rehearse) != args.rehearse:
    kind = 'a rehearsal' if results['rehearsal'] else 'a measurement'
    parser.error(f'--out={args.out} has the results of {kind}; give another folder')
  data = str(pathlib.Path(args.data).absolute()) if args.data else ''
  if args.rehearse:
    data = str(out / 'rehearsal.npz')
    rehearsal_data(pathlib.Path(data))
  elif data:
    released_model(out / 'released', data)
  plan = Plan(out, data, args.train_minutes, args.rehearse)
  undone = 0
  for number in range(len(all_parts(plan, {}))):
    parts = all_parts(plan, results['parts'])  # the run's length depends on the step's rate
    part, left = parts[number], end - time.monotonic()
    if not part.name.startswith(tuple(args.only.split(','))):
      continue
    if why := left_out(part, results['parts'], left):
      undone += why != DONE
      print(f'{part.name}: {why}', file=sys.stderr, flush=True)
      continue
    print(f'{plan.shown(part)}  ({left:.0f} s left)', file=sys.stderr, flush=True)
    result = run(part, min(left - GRACE, part.limit))
    undone += result['status'] != 0
    for other in parts:
      if other.needs == part.name:  # what was made of an earlier state is made again
        results['parts'].pop(other.name, None)
    results['parts'][part.name] = {'command': plan.shown(part)} | result
    results['written'] = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC')
    files.write(path, json.dumps(results, indent=1))
    files.write(out / 'RESULTS.md', page.markdown(results))
    why = ''.join(result['log'].splitlines()[-1:]) if page.failed(result) else ''
    took = f'{result["seconds"]} s, {result["cpu_seconds"]} of CPU'
    print(f'  {page.status_of(result)}, {took} {why}', file=sys.stderr, flush=True)
  failed = any(page.failed(part) for part in results['parts'].values())
  return int(failed or (args.rehearse and undone > 0))


if __name__ == '__main__':
  sys.exit(main())
