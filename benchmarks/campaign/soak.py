"""Whether a run leaks: memory and open files of digits, killed at random, over half an hour.

  python -m benchmarks.campaign.soak --out=DIR --minutes=30

Every 100 steps the run evaluates, draws samples and scores them by FD-classifier; every 50 it
saves. Every 3 to 8 minutes it gets SIGTERM, SIGINT, SIGHUP or SIGKILL and is started again.
DIR/soak.csv has what /proc says of the process every five seconds, DIR/soak.png shows it, and what
is printed are the slopes over each life, from its fourth minute on.
"""

import argparse
import csv
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
from matplotlib.ticker import MaxNLocator

from benchmarks.campaign.runs import ROOT, SIGNALS
from vdm import style

WARM = 180.0  # seconds of a life until all has been compiled, and run


def measure(pid: int) -> tuple[float, int]:
  """Returns the resident memory of a process in MB, and its open files."""
  status = pathlib.Path(f'/proc/{pid}/status').read_text()
  (resident,) = (line.split()[1] for line in status.splitlines() if line.startswith('VmRSS'))
  return int(resident) / 1024, len(os.listdir(f'/proc/{pid}/fd'))


def soak(out: pathlib.Path, minutes: float, seed: int) -> list[tuple[float, int, float, int]]:
  """Returns rows of seconds, life, MB and open files; writes soak.csv as it goes."""
  rng, rows, began, life = random.Random(seed), [], time.monotonic(), 0
  command = [sys.executable, '-m', 'vdm.main', '--config=configs/digits.py']
  command += [f'--workdir={out}/run', '--config.train.num_steps=10000000']
  command += ['--config.optimizer.decay=constant', '--config.train.eval_every_steps=100']
  command += ['--config.fid.train_every_steps=100', '--config.checkpoint.every_steps=50']
  command += ['--config.eval.draws=2']
  env = os.environ | {'JAX_PLATFORMS': 'cpu'}
  with (out / 'soak.csv').open('w', newline='') as table, (out / 'run.log').open('ab') as log:
    writer = csv.writer(table)
    writer.writerow(['seconds', 'life', 'megabytes', 'open_files'])
    while time.monotonic() < began + 60 * minutes:
      process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
      end = min(time.monotonic() + rng.uniform(180, 480), began + 60 * minutes)
      while time.monotonic() < end and process.poll() is None:
        rows.append((time.monotonic() - began, life, *measure(process.pid)))
        writer.writerow(rows[-1])
        table.flush()
        time.sleep(5)
      if process.poll() is not None:
        raise RuntimeError(f'life {life} ended by itself with {process.returncode}: see run.log')
      process.send_signal(rng.choice(SIGNALS))
      status, life = process.wait(timeout=300), life + 1
      if status not in (75, -9):
        raise RuntimeError(f'life {life} ended with status {status}: see run.log')
  return rows


@style.paper
def plot(rows: np.ndarray, path: pathlib.Path) -> np.ndarray:
  """Plots memory and open files [N 4] (`soak`) against time, each life under its number."""
  figure, panels = style.figure(1, (7.2, 4.2), 2, sharex=True)
  lives = np.unique(rows[:, 1])
  units = ('resident memory (GB)', 'open files')
  for axes, column, unit, scale in zip(panels, (2, 3), units, (1024, 1), strict=True):
    for number, life in enumerate(lives):
      of = rows[rows[:, 1] == life]
      axes.plot(of[:, 0] / 60, of[:, column] / scale, '-', color=style.BLUE, linewidth=1.2)
      if number:
        axes.axvline(of[0, 0] / 60, color=style.REFERENCE, linestyle=':', linewidth=1)
    axes.set(ylabel=unit, ylim=(0, None), xlim=(0, rows[-1, 0] / 60))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=scale == 1))
    axes.grid(axis='x', visible=False)
  for life in lives:
    middle = rows[rows[:, 1] == life][:, 0].mean() / 60
    panels[0].annotate(
      f'life {life + 1:.0f}',
      (middle, 1),
      (0, 2),
      panels[0].get_xaxis_transform(),
      textcoords='offset points',
      ha='center',
      fontsize=8,
    )
  panels[1].set_xlabel('minutes (dotted: killed, and started again)')
  return style.save(figure, path)


def main() -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--minutes', type=float, default=30.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--table', type=pathlib.Path, help='an earlier soak.csv: draws it, no run')
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  if args.table:
    rows = np.loadtxt(args.table, delimiter=',', skiprows=1)
  else:
    rows = np.array(soak(args.out.absolute(), args.minutes, args.seed))
  for life in np.unique(rows[:, 1]):
    of = rows[rows[:, 1] == life]
    warm = of[of[:, 0] > of[0, 0] + WARM]
    if len(warm) > 2:
      slope = np.polyfit(warm[:, 0] / 60, warm[:, 2], 1)[0]
      print(
        f'life {life:.0f}, {(of[-1, 0] - of[0, 0]) / 60:.1f} minutes: {warm[0, 2]:.0f} to '
        f'{warm[-1, 2]:.0f} MB ({slope:+.2f} MB per minute), open files {warm[:, 3].min():.0f} to '
        f'{warm[:, 3].max():.0f}'
      )
  plot(rows, args.out / 'soak.png')
  return 0


if __name__ == '__main__':
  sys.exit(main())
