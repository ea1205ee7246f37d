"""What config.train.on_nan='skip' costs in the train step: paired ratios, one JSON line.

  python -m benchmarks.on_nan --config=configs/digits.py --steps=200

Both steps are compiled, then run in turn, the other first in every second round; a ratio is that
of two steps one after the other, so that a drift of the machine's speed cancels. `stop`, the
default, adds nothing to the step: the host looks at the loss that it fetches anyway, and a save at
the state.
"""

import json
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from benchmarks.train_step import random_batch
from vdm import build
from vdm.system import hosts, parallel, runners
from vdm.training.step import make_train_step


def make_call(config: ConfigDict, on_nan: str):
  """Returns a function that runs one step, blocked on, of a config with another on_nan."""
  config = config.copy_and_resolve_references()
  config.train.on_nan = on_nan
  model = build.model(config)
  mesh = parallel.make_mesh(config.parallel.fsdp)
  init = build.init_state(config, model)
  abstract = parallel.abstract_state(mesh, init)
  runner = runners.runner(config.parallel.mode, make_train_step(config, model), mesh, abstract)
  batch = runner.put_batch(random_batch(config))
  state = runner.put_state(parallel.initial_state(mesh, init))

  def call():
    nonlocal state
    state, metrics = runner.step(state, batch)
    jax.block_until_ready((state, metrics))

  return call


def measure(config: ConfigDict, steps: int, warmup: int) -> dict:
  """Returns the ratio of the two steps' times: its median, its standard error, the times in ms."""
  calls = {name: make_call(config, name) for name in ('stop', 'skip')}
  times = {name: [] for name in calls}
  for number in range(warmup + steps):
    for name in sorted(calls, reverse=number % 2 == 0):
      start = time.perf_counter()
      calls[name]()
      times[name].append(1000 * (time.perf_counter() - start))
  stop, skip = (np.array(times[name][warmup:]) for name in ('stop', 'skip'))
  ratios, rng = skip / stop, np.random.default_rng(0)
  drawn = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)  # the bootstrap
  return {
    'config': config.name,
    'device_kind': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'jax': jax.__version__,
    'steps': steps,
    'ratio': round(float(np.median(ratios)), 4),
    'stderr': round(float(drawn.std()), 4),
    'step_ms': {'stop': round(float(np.median(stop)), 3), 'skip': round(float(np.median(skip)), 3)},
  }


def main(_):
  """Prints the JSON line."""
  values = flags.FLAGS
  hosts.use_cores(lambda count: build.works_on(values.config, count))
  print(json.dumps(measure(values.config, values.steps, values.warmup)))


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', 'configs/digits.py', 'Config file.')
  flags.DEFINE_integer('steps', 200, 'Rounds timed.', lower_bound=2)
  flags.DEFINE_integer('warmup', 5, 'Rounds before those, not timed.', lower_bound=0)
  app.run(main)
