"""Real multi-host JAX on one machine: processes of their own, over loopback."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image
from vdm.configs import digits

from vdm import build, cards
from vdm.system import hosts, parallel, stopping
from vdm.workdir import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
OVERRIDES = [
  '--config.train.batch_size=16',
  '--config.train.num_steps=5',
  '--config.train.eval_every_steps=5',
  '--config.checkpoint.every_steps=5',
  '--config.eval.max_images=13',  # the last batch is partial
  '--config.eval.batch_size=8',
  '--config.optimizer.warmup_steps=1',
  '--config.model.dropout=0.0',
]
STARTED = []  # processes of the test that runs
# of a run that only a signal ends
ENDLESS = [
  '--config.train.num_steps=1000000',
  '--config.train.log_every_steps=1',
  '--config.train.eval_every_steps=1000000',
  '--config.checkpoint.every_steps=1000000',
  '--config.optimizer.decay=constant',  # so that the next start may stop elsewhere
]


def start(
  workdir,
  num_processes,
  devices,
  *more,
  slurm=False,
  config='configs/digits.py:debug',
  program=('-m', 'vdm.main'),
):
  """Starts the processes of one job, by hand or as SLURM would, and returns them."""
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  cache = {'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir}
  env = os.environ | cache | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  command = [
    sys.executable,
    *program,
    f'--config={config}',
    f'--workdir={workdir}',
    *OVERRIDES,
    *more,
  ]

  def by_hand(i):
    job = [f'--coordinator=localhost:{port}', f'--num_processes={num_processes}']
    return [*job, f'--process_id={i}'] if num_processes > 1 and not slurm else []

  def by_slurm(i):
    job = {'JOB_ID': 1, 'STEP_NODELIST': 'localhost', 'NTASKS': num_processes, 'LOCALID': 0}
    names = {f'SLURM_{name}': str(value) for name, value in (job | {'PROCID': i}).items()}
    return names | {'JAX_COORDINATOR_PORT': str(port)} if slurm else {}

  STARTED.extend(
    subprocess.Popen(
      command + by_hand(i),
      cwd=ROOT,
      env=env | by_slurm(i),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(num_processes)
  )
  return STARTED[-num_processes:]


@pytest.fixture(autouse=True)
def _none_is_left_behind():
  yield
  for process in STARTED:
    process.kill()
    process.communicate()
  STARTED.clear()


def wait_for_steps(process, step):
  """Returns when a process that logs every step has logged this one, or kills it and fails."""
  lines = []
  limit = threading.Timer(300, process.kill)
  limit.start()
  try:
    for line in process.stdout:
      lines.append(line)
      if f' step {step}: ' in line:
        return
  finally:
    limit.cancel()
  raise AssertionError(''.join(lines))


def finish(processes):
  outputs = [process.communicate(timeout=500)[0] for process in processes]
  assert [process.returncode for process in processes] == [0] * len(processes), outputs
  return outputs


def params_of(workdir):
  config = digits.get_config('debug')
  config.model.dropout = 0.0
  model = build.model(config)
  abstract = parallel.abstract_state(parallel.make_mesh(), build.init_state(config, model))
  manager = checkpoint.manager(str(workdir))
  state, step = checkpoint.restore(manager, abstract, checkpoint.latest_step(manager))
  assert step == 5
  leaves = jax.tree.leaves(jax.device_get(state.params))
  return np.concatenate([np.ravel(np.float64(leaf)) for leaf in leaves])


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """The workdir of a run on one process with one device."""
  workdir = tmp_path_factory.mktemp('one')
  finish(start(workdir, 1, 1))
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
  ('num_processes', 'devices', 'mode'), [(2, 4, 'jit'), (1, 8, 'jit'), (2, 2, 'pmap')]
)
def test_many_processes_and_devices_are_one_process_of_one(
  num_processes, devices, mode, one, tmp_path, rank_promotion_allowed
):
  two = tmp_path / 'two'
  flags = [f'--config.parallel.mode={mode}', '--config.eval.batch_size=16']  # the other has 8
  outputs = finish(start(two, num_processes, devices, *flags))
  config = digits.get_config('debug')
  config.model.dropout = 0.0
  initial = build.init_state(config, build.model(config))().params
  before = np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(initial)])
  alone, together = params_of(one), params_of(two)
  moved = np.linalg.norm(alone - before)
  assert moved > 0.01
  assert np.linalg.norm(together - alone) < 1e-3 * moved
  # one checkpoint, one set of metrics and cards, whoever made them
  assert [p.name for p in (two / 'checkpoints').iterdir()] == ['5']
  files = (two / 'tensorboard').glob('events*')
  assert (
    len({re.search(r'\.(\d+)(\.\d+)?(\.v2)?$', path.name)[1] for path in files}) == 1
  )  # process
  both = [next(iter(cards.series(w).values()))[-1] for w in (one, two)]
  assert both[0]['params'] == 'ema' and both[0]['value'] == pytest.approx(
    both[1]['value'], rel=1e-4
  )
  assert both[1]['environment']['num_hosts'] == num_processes
  assert 'bits_per_dim' in outputs[0]


@pytest.mark.slow
def test_two_processes_draw_the_shard_that_one_lacks_and_the_first_writes_it(one, tmp_path):
  two, settings = tmp_path / 'two', ['--mode=sample', '--config.sample.num_images=12']
  finish(start(one, 1, 1, *settings))
  shutil.copytree(one, two)
  paths = [sorted((w / 'samples').glob('step*/*')) for w in (one, two)]
  assert [path.name for path in paths[0]] == ['00000000.npz', '00000008.npz', 'manifest.json']
  paths[1][0].unlink()
  outputs = finish(start(two, 2, 2, *settings))
  assert '4 of 12 images are there already' in outputs[0]
  for a, b in zip(*paths, strict=True):
    assert a.read_bytes() == b.read_bytes(), a.name


@pytest.mark.slow
def test_two_processes_read_a_folder_and_score_its_pictures_as_one_does(tmp_path):
  rng = np.random.default_rng(0)
  for number in range(60):
    size = (*tuple(rng.integers(9, 20, 2)), 3)
    path = tmp_path / 'pictures' / 'ab'[number % 2] / f'{number}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
  data = [f'--config.data.path={tmp_path / "pictures"}', '--config.data.image_shape=8,8,3']
  data += ['--config.data.eval_share=0.3', '--config.model.width=8', '--config.model.norm_groups=2']
  scored = ['--mode=likelihood', '--config.likelihood.draws=2', '--config.likelihood.maps=3']
  tables = []
  for count, workdir in ((2, tmp_path / 'two'), (1, tmp_path / 'one')):
    finish(start(workdir, count, 2 // count, *data, config='configs/my_folder.py:debug'))
    finish(start(workdir, count, 2 // count, *data, *scored, config='configs/my_folder.py:debug'))
    (table,) = workdir.glob('likelihood/*/table.csv')
    tables.append(np.genfromtxt(table, delimiter=',', names=True))
    assert (table.parent / 'maps_3x1.png').exists()
  assert len(tables[0]) == 13
  for name in ('label', 'log_prob', 'stderr', 'diffusion'):
    np.testing.assert_allclose(tables[0][name], tables[1][name], rtol=2e-3)


@pytest.mark.slow
def test_a_lost_process_ends_the_other_in_time_and_with_a_message(tmp_path):
  left, lost = start(tmp_path, 2, 1, *ENDLESS, '--heartbeat_seconds=5')
  wait_for_steps(left, 2)
  lost.kill()
  text = left.communicate(timeout=5 + 55)[0]  # Python itself takes a while to end
  # JAX's own end (SIGABRT), or ours where a message to the other failed first
  assert left.returncode in (-signal.SIGABRT, hosts.EXIT_LOST), text
  assert 'another process of the job was lost' in text or 'another task died' in text


# The second process meets an error of its own in the first evaluation.
FAILS_ALONE = """
import runpy, sys
from vdm.evaluation import evaluate

def fail(*_):
  raise OSError('a stale handle')

if '--process_id=1' in sys.argv:
  evaluate.evaluate = fail
runpy.run_module('vdm.main', run_name='__main__')
"""


@pytest.mark.slow
def test_an_error_of_one_process_in_an_evaluation_ends_both_and_the_state_is_saved(tmp_path):
  first, second = start(tmp_path, 2, 1, '--heartbeat_seconds=5', program=('-c', FAILS_ALONE))
  text = second.communicate(timeout=300)[0]
  assert second.returncode not in (0, None) and 'a stale handle' in text
  first.communicate(timeout=5 + 55)
  assert first.returncode in (-signal.SIGABRT, hosts.EXIT_LOST)
  (output,) = finish(start(tmp_path, 1, 1))  # what was saved is evaluated
  assert 'step 5 of 5' in output and 'bits/dim on' in output


@pytest.mark.slow
def test_a_resumed_job_stops_on_all_for_a_signal_to_one_before_its_first_step(tmp_path):
  """Where a resumed run counts steps from where it was, JAX's agreement counts calls from 1."""
  for process in start(tmp_path, 2, 1, *ENDLESS, '--config.train.num_steps=3'):
    assert process.wait(timeout=500) == 0
  for number in (signal.SIGTERM, signal.SIGINT):
    first, second = start(tmp_path, 2, 1, *ENDLESS)
    for line in first.stdout:
      if 'of 1000000, ' in line:  # it has restored, and compiles
        break
    second.send_signal(number)
    texts = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [stopping.EXIT_PREEMPTED] * 2, texts
    (_,) = {int(re.search(r'stopped and saved at step (\d+)', text)[1]) for text in texts}


@pytest.mark.slow
def test_sigterm_to_one_process_of_a_slurm_job_saves_on_both_and_one_process_goes_on(tmp_path):
  first, second = start(tmp_path, 2, 1, *ENDLESS, slurm=True)
  wait_for_steps(first, 2)
  second.send_signal(signal.SIGTERM)
  texts = [process.communicate(timeout=500)[0] for process in (first, second)]
  assert [first.returncode, second.returncode] == [stopping.EXIT_PREEMPTED] * 2, texts
  (step,) = {int(re.search(r'stopped and saved at step (\d+)', text)[1]) for text in texts}
  (output,) = finish(start(tmp_path, 1, 1, *ENDLESS, f'--config.train.num_steps={step + 2}'))
  assert f'step {step} of {step + 2}' in output and 'is done' in output
