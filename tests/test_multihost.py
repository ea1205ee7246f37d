"""Real multi-host JAX on one machine: processes of their own, over loopback."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from vdm.configs import digits

from vdm import build, checkpoint, parallel

ROOT = pathlib.Path(__file__).parents[1]
OVERRIDES = [
  '--config.train.batch_size=16',
  '--config.train.num_steps=5',
  '--config.train.eval_every_steps=5',
  '--config.checkpoint.every_steps=5',
  '--config.eval.max_images=16',
  '--config.eval.batch_size=8',
  '--config.optimizer.warmup_steps=1',
  '--config.model.dropout=0.0',
]


def start(workdir, num_processes, devices, *more):
  """Starts the processes of one job; returns them."""
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  flags = f'--xla_force_host_platform_device_count={devices}'
  cache = {'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir}
  env = os.environ | cache | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  command = [
    sys.executable,
    '-m',
    'vdm.main',
    '--config=configs/digits.py:debug',
    f'--workdir={workdir}',
    *OVERRIDES,
    *more,
  ]
  by_hand = [f'--coordinator=localhost:{port}', f'--num_processes={num_processes}']
  return [
    subprocess.Popen(
      command + ([*by_hand, f'--process_id={i}'] if num_processes > 1 else []),
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(num_processes)
  ]


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
@pytest.mark.xdist_group('multihost')
@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_two_processes_of_two_devices_are_one_process_of_one(
  mode, one, tmp_path, rank_promotion_allowed
):
  two = tmp_path / 'two'
  outputs = finish(start(two, 2, 2, f'--config.parallel.mode={mode}'))
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
  assert len(list((two / 'tensorboard').glob('events*'))) == 1
  cards = [
    json.loads((w / 'cards' / 'bits_per_dim_ema_continuous_step00000005.json').read_text())
    for w in (one, two)
  ]
  assert cards[0]['value'] == pytest.approx(cards[1]['value'], rel=1e-4)
  assert cards[1]['environment']['num_hosts'] == 2
  assert 'bits_per_dim' in outputs[0]


@pytest.mark.slow
@pytest.mark.xdist_group('multihost')
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
