"""The small run that the campaign breaks, as a process of its own."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from vdm.system import files

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from vdm.configs import default

def get_config(arg=''):
  config = default.get_config('debug')
  with config.unlocked():
    config.name = 'campaign'
    kept = ('output', 'class_conditional', 'condition_on', 'dtype')
    config.model = {k: config.model[k] for k in kept} | dict(
      name='mlp', width=16, num_blocks=1, fourier_exponents=(), dropout=0.0)
    config.schedule.name = 'learned_net'
    config.ema.update(power_stds=(0.05, 0.1), snapshot_every_steps=3)
    config.optimizer.decay = 'constant'
    config.train.update(batch_size=16, num_steps=NUM_STEPS, log_every_steps=1, eval_every_steps=4)
    config.checkpoint.update(every_steps=3, keep=3)
    config.eval.update(max_images=16, batch_size=16)
    config.sample.update(num_images=8, batch_size=8, num_steps=2)
  return config.lock()
"""
NUM_STEPS = 12
LIMIT = 240.0  # seconds that a run may take
GOOD = {0, 75, -signal.SIGKILL}  # statuses that a signal may end in
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Broken(Exception):
  """A promise was not kept: 'lost', 'wrong' or 'traceback', and how."""


def config_file(folder: pathlib.Path) -> pathlib.Path:
  """Writes the config of the run; returns its path."""
  path = folder / 'campaign.py'
  files.write(path, CONFIG.replace('NUM_STEPS', str(NUM_STEPS)))
  return path


def start(base: pathlib.Path, workdir: pathlib.Path, processes: int = 1) -> list[subprocess.Popen]:
  """Starts the run, or goes on with it; its output goes to workdir.log."""
  command = [sys.executable, '-m', 'vdm.main', f'--config={config_file(base)}']
  command += [f'--workdir={workdir}']
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_COMPILATION_CACHE_DIR': str(base / 'xla'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'XDG_CACHE_HOME': str(base / 'cache'),
  }
  job = ['--num_processes=1']
  if processes > 1:
    with socket.socket() as probe:
      probe.bind(('localhost', 0))
      port = probe.getsockname()[1]
    job = [f'--coordinator=localhost:{port}', f'--num_processes={processes}']
    job += ['--heartbeat_seconds=10']
  started = []
  for number in range(processes):
    own = [f'--process_id={number}'] if processes > 1 else []
    with log_of(workdir).open('ab') as log:
      more = dict(cwd=ROOT, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
      started.append(
        subprocess.Popen([*command, *job, *own], stdout=log, stderr=subprocess.STDOUT, **more)
      )
  return started


def log_of(workdir: pathlib.Path) -> pathlib.Path:
  """Returns where the output of the runs in a workdir goes."""
  return workdir.with_name(f'{workdir.name}.log')


def written(workdir: pathlib.Path) -> int:
  """Returns how long the output of the runs in a workdir is."""
  return log_of(workdir).stat().st_size if log_of(workdir).exists() else 0


def launcher(started: list[subprocess.Popen], workdir: pathlib.Path, since: int):
  """Stops what waits for a process that ended before it joined, as what starts jobs does.

  Args:
    started: the processes.
    workdir: of the run.
    since: the length of its output when they were started.
  """
  if len(started) == 1:
    return
  end = time.monotonic() + LIMIT
  while all(process.poll() is None for process in started) and time.monotonic() < end:
    time.sleep(0.1)
  time.sleep(1.0)  # for one that is about to say that it has joined
  if 'the job ends when' not in log_of(workdir).read_text(errors='replace')[since:]:
    for process in started:
      process.send_signal(signal.SIGTERM)


def finish(
  started: list[subprocess.Popen],
  workdir: pathlib.Path,
  good: set[int],
  limit: float = LIMIT,
  quiet_since: int = -1,
) -> list[int]:
  """Waits for the processes of a run; returns their statuses.

  Args:
    started: the processes.
    workdir: of the run.
    good: the statuses that they may have.
    limit: seconds.
    quiet_since: with no output beyond this length Python itself was stopped, in its own way.

  Raises:
    Broken: a status is none of `good`, there is a traceback, or the run hangs.
  """
  end = time.monotonic() + limit
  try:
    statuses = [process.wait(timeout=max(1, end - time.monotonic())) for process in started]
  except subprocess.TimeoutExpired as error:
    raise Broken(f'lost: still running after {limit} s') from error
  finally:
    for process in started:
      process.kill()
      process.wait()
  text = log_of(workdir).read_text(errors='replace')
  if 'Traceback' in text:
    raise Broken('traceback: ' + ' | '.join(text[text.index('Traceback') :].splitlines()[-2:]))
  if written(workdir) == quiet_since:
    good = good | {-number for number in SIGNALS} | {130}
  wrong = [status for status in statuses if status not in good]
  if wrong:
    raise Broken(f'wrong: status {wrong[0]}: {text.strip().splitlines()[-1:]}')
  return statuses


def uninterrupted(base: pathlib.Path, processes: int = 1) -> tuple[pathlib.Path, float]:
  """Makes the run that all others are compared with; returns its workdir and its seconds."""
  workdir = base / f'straight_{processes}'
  done = base / f'straight_{processes}.json'
  if not done.exists():
    for again in (False, True):  # the second finds all programs compiled
      shut(workdir)
      began = time.monotonic()
      finish(start(base, workdir, processes), workdir, {0})
      files.write(done, json.dumps(time.monotonic() - began)) if again else None
  return workdir, json.loads(done.read_text())


def shut(workdir: pathlib.Path):
  """Removes a workdir and its log."""
  import shutil

  shutil.rmtree(workdir, ignore_errors=True)
  log_of(workdir).unlink(missing_ok=True)


def storm(rng: random.Random) -> list[tuple[float, int]]:
  """Returns pauses in seconds and the signals after them: one, or several."""
  if rng.random() < 0.7:
    return [(0.0, rng.choice(SIGNALS))]
  gentle = [rng.choice(SIGNALS[1:]) for _ in range(rng.randint(2, 10))]
  return [(rng.choice((0.0, 0.01, 0.05, 0.3)), number) for number in gentle]


def kept_of(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a run leaves that must not depend on how often it was stopped."""
  manifest = json.loads(
    (workdir / 'checkpoints' / str(NUM_STEPS) / 'manifest' / 'metadata').read_text()
  )
  cards = {p.name: json.loads(p.read_text())['value'] for p in (workdir / 'cards').glob('*.json')}
  return {'leaves': manifest['leaves'], 'cards': cards, 'curves': curves_of(workdir)}


def curves_of(workdir: pathlib.Path) -> dict[str, list]:
  """Returns [step, value] of the scalars in TensorBoard that are no times, in their order."""
  from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  events = EventAccumulator(str(workdir / 'tensorboard'), size_guidance={'tensors': 0})
  events.Reload()
  timed = ('images_per_second', 'data_wait', 'minutes_left')
  tags = [tag for tag in events.Tags()['tensors'] if tag.startswith(('train/', 'eval/'))]
  return {
    tag: [[e.step, float(make_ndarray(e.tensor_proto))] for e in events.Tensors(tag)]
    for tag in tags
    if not tag.endswith(timed)
  }


def compare(workdir: pathlib.Path, straight: pathlib.Path):
  """Holds a run that was stopped beside the one that was not.

  Raises:
    Broken: they differ in a bit of the final state, in a card or in a curve.
  """
  ours, theirs = kept_of(workdir), kept_of(straight)
  if ours['leaves'] != theirs['leaves']:
    names = [n for n, leaf in theirs['leaves'].items() if ours['leaves'].get(n) != leaf]
    raise Broken(f'wrong: the final state differs in {len(names)} leaves, such as {names[0]}')
  for kind in ('cards', 'curves'):
    for name, value in theirs[kind].items():
      if ours[kind].get(name) != value:
        raise Broken(f'lost: {kind} {name} is {ours[kind].get(name)}, not {value}')
