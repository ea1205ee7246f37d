"""Breaks runs on purpose, by chance but repeatably, and says what was lost.

  python -m benchmarks.campaign --out=DIR                          60 seconds of each kind
  python -m benchmarks.campaign --out=DIR --kinds=kills --count=200 --seconds=7200
  python -m benchmarks.campaign --out=DIR --kinds=kills --only=17  one case again

Kinds: kills (signals and SIGKILL to a run, at any moment), pairs (to either process of a job of
two), corruption (damaged checkpoints), faults (values that are not finite in the state), configs
(any value of any leaf), files (damaged cards, configs, shards, references, weights, pictures) and
disks (file systems that are full). A case is a function of its kind, --seed and its number. After
every case DIR/<kind>_<seed>.json holds all of them, so that the same command goes on where it
stopped; DIR/report.md says how many held, and how to repeat those that did not, of which the
runs' output is DIR/broken_<kind>_<seed>_<number>.log. Status 1 if any.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import sys
import time

import jax

from benchmarks.campaign.cases import KINDS
from benchmarks.campaign.runs import Broken
from vdm.system import files
from vdm.system.stopping import stop


def run_case(kind: str, seed: int, number: int, base: pathlib.Path) -> dict:
  """Returns the verdict of a case, 'held' or what was broken, with what was done."""
  rng, began = random.Random(f'{kind} {seed} {number}'), time.monotonic()
  try:
    verdict, note = 'held', KINDS[kind](rng, base)
  except Broken as error:
    verdict, _, note = str(error).partition(': ')
    for log in base.glob(f'*_{os.getpid()}.log'):  # of the run that was broken
      shutil.copy(log, base / f'broken_{kind}_{seed}_{number}.log')
  return {'verdict': verdict, 'note': note, 'seconds': round(time.monotonic() - began, 1)}


def report(out: pathlib.Path, seed: int) -> tuple[str, bool]:
  """Returns the Markdown of all cases in `out`, and whether all promises held."""
  lines = [
    '| kind | cases | held | lost | wrong | traceback | hours |',
    '|---|---|---|---|---|---|---|',
  ]
  failed = []
  for kind in KINDS:
    path = out / f'{kind}_{seed}.json'
    if not path.exists():
      continue
    cases = json.loads(path.read_text())
    count = collections.Counter(case['verdict'] for case in cases.values())
    hours = sum(case['seconds'] for case in cases.values()) / 3600
    numbers = [count[verdict] for verdict in ('held', 'lost', 'wrong', 'traceback')]
    lines.append(f'| {kind} | {len(cases)} | {" | ".join(map(str, numbers))} | {hours:.2f} |')
    failed += [(kind, n, case) for n, case in cases.items() if case['verdict'] != 'held']
  for kind, number, case in failed:
    command = (
      f'python -m benchmarks.campaign --out=DIR --kinds={kind} --seed={seed} --only={number}'
    )
    lines.append(f'\n{case["verdict"]}: {case["note"]}\n\n    {command}')
  return '\n'.join(lines) + '\n', not failed


def main() -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--kinds', default=','.join(KINDS))
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--count', type=int, default=1_000_000, help='cases of each kind')
  parser.add_argument('--seconds', type=float, default=60.0, help='for each kind')
  parser.add_argument('--only', type=int, help='the number of a single case')
  args = parser.parse_args()
  unknown = set(args.kinds.split(',')) - set(KINDS)
  if unknown:
    parser.error(f'--kinds={args.kinds}: {min(unknown)} is none of {", ".join(KINDS)}')
  stop.listen()
  jax.config.update('jax_num_cpu_devices', 1)
  out = args.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  for kind in args.kinds.split(','):
    if args.only is not None:
      print(kind, args.only, run_case(kind, args.seed, args.only, out))
      continue
    path = out / f'{kind}_{args.seed}.json'
    cases = json.loads(path.read_text()) if path.exists() else {}
    end = time.monotonic() + args.seconds
    for number in range(args.count):
      if str(number) not in cases and time.monotonic() < end:
        cases[str(number)] = case = run_case(kind, args.seed, number, out)
        files.write(path, files.json_text(cases))
        if case['verdict'] != 'held':
          print(f'{kind} {number}: {case["verdict"]}: {case["note"]}', flush=True)
      elif time.monotonic() >= end:
        break
    print(f'{kind}: {len(cases)} cases', flush=True)
  text, good = report(out, args.seed)
  files.write(out / 'report.md', text)
  print(text)
  return 0 if good else 1


if __name__ == '__main__':
  sys.exit(main())
