"""How far an evaluation's value spreads over seeds, against the error that it states.

  python -m benchmarks.evaluation            prints the tables of docs/evaluation.md

A small network is trained on the digits for some steps. Its averaged parameters are then evaluated
on the first images of the test split at every batch size, on 1, 2 and 8 devices of a CPU and in two
processes, and with many seeds. Each number of devices is a process of its own, and so is each
process of a job.
"""

import json
import math
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from vdm.configs import digits

from vdm import build, cards, data
from vdm.evaluation.bound import BitsPerDim, make_evaluator
from vdm.system import files, hosts, parallel, runners
from vdm.training.step import make_train_step

IMAGES = (16, 64, 100, 360)
BATCHES = (64, 100, 128, 200, 256, 360, 512)
JOBS = {'1 device': (1, 1), '2 devices': (1, 2), '8 devices': (1, 8), '2 processes': (2, 1)}
SEEDS, DRAWS, FEW_DRAWS = 200, 4, 2

_SEEDS = flags.DEFINE_integer('seeds', SEEDS, 'Evaluations that a spread is taken over.')
_FIRST_SEED = flags.DEFINE_integer('first_seed', 0, 'The first of them.')
_STEPS = flags.DEFINE_integer('steps', 100, 'Of training.')
_PART = flags.DEFINE_string('part', '', 'Of a process that this command starts for itself.')
_COORDINATOR = flags.DEFINE_string('coordinator', '', 'The same.')
_PROCESS = flags.DEFINE_integer('process', 0, 'The same.')


def config_of(steps: int) -> ConfigDict:
  """Returns a small network on the digits."""
  config = digits.get_config()
  with config.unlocked():
    config.model = ConfigDict(
      dict(
        name='mlp',
        output='eps',
        width=16,
        num_blocks=1,
        fourier_exponents=(3, 4),
        dropout=0.0,
        class_conditional=False,
        condition_on='live',
        dtype='float32',
      )
    )
    config.train.num_steps = steps
    config.optimizer.warmup_steps = 10
    config.eval.draws = DRAWS
  return config


def trained(config: ConfigDict, model: build.Model) -> Any:
  """Returns parameters after config.train.num_steps steps, without a workdir."""
  mesh = parallel.make_mesh()
  step = make_train_step(config, model)
  init = build.init_state(config, model)
  runner = runners.runner('jit', step, mesh, parallel.abstract_state(mesh, init))
  state = runner.put_state(parallel.initial_state(mesh, init))
  source, size = data.load(config.data, 'train'), config.train.batch_size
  batches = data.train_batches(
    source, batch_size=size, seed=0, start_step=0, process_index=0, process_count=1
  )
  for _ in range(config.train.num_steps):
    batch = next(batches) | {'index': np.arange(size, dtype=np.int32)}
    state, _ = runner.step(state, runner.put_batch(batch))
  return jax.device_get(state.averages['ema'])


class Bench:
  """Evaluations of one set of parameters, each by batch size, images, draws and seed."""

  def __init__(self, params_file: str, steps: int):
    self.config = config_of(steps)
    self.model, self.mesh = build.model(self.config), parallel.make_mesh()
    abstract = jax.eval_shape(self.model.init, jax.random.key(0))
    with np.load(params_file) as arrays:
      leaves = [arrays[f'{i}'] for i in range(len(jax.tree.leaves(abstract)))]
    self.params = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    self.source, self.evaluators = data.load(self.config.data, 'eval'), {}

  def evaluate(self, batch: int, images: int, draws: int, seed: int) -> BitsPerDim:
    """Returns what --mode=eval would write to its card."""
    config = self.config
    config.eval.update(batch_size=batch, max_images=images, draws=draws, seed=seed)
    if draws not in self.evaluators:  # which reads the seed at each call
      self.evaluators[draws] = make_evaluator(self.model, self.mesh, config.eval)
    batches = data.eval_batches(
      self.source,
      batch_size=batch,
      max_images=images,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    return self.evaluators[draws](self.params, batches, images)


def values(bench: Bench) -> list[dict[str, Any]]:
  """Returns value and error for every batch size that the devices divide, and number of images."""
  found = []
  for batch in BATCHES:
    if batch % jax.device_count() == 0:
      for images in IMAGES:
        result = bench.evaluate(batch, images, DRAWS, 0)
        row = dict(batch=batch, images=images, value=result.value, stderr=result.stderr)
        found.append(row)
  return found


def spreads(bench: Bench, seeds: range) -> list[dict[str, Any]]:
  """Returns the spread over seeds beside the errors stated, at a small batch and a large one."""
  found = []
  for images in IMAGES:
    mean = bench.evaluate(360, images, 1024, 10**6).value
    for draws in (FEW_DRAWS, DRAWS):
      for batch in (100, 360, 512):
        results = [bench.evaluate(batch, images, draws, seed) for seed in seeds]
        intervals = [cards.error_fields(r.value, r.stderr, r.dof)['interval_95'] for r in results]
        found.append(
          dict(
            draws=draws,
            images=images,
            batch=batch,
            spread=float(np.std([r.value for r in results], ddof=1)),
            stated=math.sqrt(np.mean([r.stderr**2 for r in results])),
            covered=sum(low <= mean <= high for low, high in intervals) / len(seeds),
          )
        )
  return found


def _seeds() -> range:
  return range(_FIRST_SEED.value, _FIRST_SEED.value + _SEEDS.value)


def start(part: str, processes: int, devices: int, params: str) -> list[subprocess.Popen]:
  """Starts this file again, as one process or a job of several."""
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  flag = f'--xla_force_host_platform_device_count={devices}'
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flag}
  command = [sys.executable, '-m', 'benchmarks.evaluation', f'--part={part}:{params}']
  command += [f'--steps={_STEPS.value}', f'--seeds={_SEEDS.value}']
  command += [f'--first_seed={_FIRST_SEED.value}']
  jobs = [[f'--coordinator=localhost:{port}', f'--process={i}'] for i in range(processes)]
  return [
    subprocess.Popen(command + (job if processes > 1 else []), env=env, stdout=subprocess.PIPE)
    for job in jobs
  ]


def asked(part: str, processes: int, devices: int, params: str) -> list[dict[str, Any]]:
  """Returns what the first process of `start` prints."""
  started = start(part, processes, devices, params)
  outputs = [process.communicate()[0] for process in started]
  if any(process.returncode for process in started):
    raise RuntimeError(f'{part} on {processes} x {devices} devices failed')
  return json.loads(outputs[0].decode().splitlines()[-1])


def table(head: list[str], rows: list[list[str]]) -> str:
  """Returns a Markdown table."""
  return '\n'.join(f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *rows])


def main(_):
  """Prints the tables, or, in a process of a part, its JSON."""
  if _PART.value:
    if _COORDINATOR.value:
      hosts.initialize(_COORDINATOR.value, 2, _PROCESS.value, 100)
    part, _, params = _PART.value.partition(':')
    bench = Bench(params, _STEPS.value)
    found = values(bench) if part == 'values' else spreads(bench, _seeds())
    print(files.json_text(found, indent=None).rstrip())
    return
  params, config = f'/tmp/vdm_evaluation_{os.getpid()}.npz', config_of(_STEPS.value)
  leaves = jax.tree.leaves(trained(config, build.model(config)))
  np.savez(params, **{f'{i}': leaf for i, leaf in enumerate(leaves)})
  try:
    found = {name: asked('values', *job, params) for name, job in JOBS.items()}
    of_seeds = asked('spreads', 1, 1, params)
  finally:
    os.unlink(params)
  by_key = {}
  for name, rows in found.items():
    for row in rows:
      by_key.setdefault((row['images'], row['batch']), {})[name] = row
  rows = []
  for (images, batch), cells in sorted(by_key.items()):
    texts = [
      f'{cells[name]["value"]:.7f} ± {cells[name]["stderr"]:.7f}' if name in cells else ''
      for name in JOBS
    ]
    rows.append([str(images), str(batch), *texts])
  print(table(['images', 'batch', *JOBS], rows), '\n')
  of_full = {(r['images'], r['draws']): r['spread'] for r in of_seeds if r['batch'] == 360}
  rows = [
    [
      *(str(r[k]) for k in ('draws', 'images', 'batch')),
      f'{r["spread"]:.4f}',
      f'{r["stated"]:.4f}',
      f'{r["spread"] / r["stated"]:.3f}',
      f'{r["spread"] / of_full[r["images"], r["draws"]]:.3f}',
      f'{100 * r["covered"]:.1f} %',
    ]
    for r in of_seeds
  ]
  head = ['draws', 'images', 'batch', 'spread over seeds', 'error stated', 'ratio']
  print(table([*head, 'spread / that of a full batch', '95 % intervals that cover'], rows))


if __name__ == '__main__':
  app.run(main)
