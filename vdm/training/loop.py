"""The loop around the train step: data, evaluation, checkpoints, signals."""

import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vdm import build, cards, data
from vdm.evaluation.evaluate import make_look
from vdm.system import parallel, profile, runners, writers
from vdm.system.hosts import EXIT_PREEMPTED, StopSignal
from vdm.training.meter import Meter
from vdm.training.step import make_train_step
from vdm.workdir import checkpoint, config_file, posthoc_ema


def train(config: ConfigDict, workdir: pathlib.Path) -> int:
  """Trains to config.train.num_steps, from the newest checkpoint if there is one.

  Returns:
    The process's exit status: 0 when done, EXIT_PREEMPTED when stopped and saved before.
  """
  model = build.model(config)
  build.check_devices(config, jax.device_count())
  traced = profile.steps(config)
  train_source = data.load(config.data, 'train')
  mesh = parallel.make_mesh(config.parallel.fsdp)
  look = make_look(config, model, mesh, workdir)
  config_file.open_workdir(workdir, config)  # the first thing that is written
  init = build.init_state(config, model)
  abstract = parallel.abstract_state(mesh, init)
  manager = checkpoint.manager(workdir, config.checkpoint.keep)
  snapshots = None
  if config.ema.snapshot_every_steps and config.ema.power_stds:
    snapshots = checkpoint.manager(workdir, config.train.num_steps, posthoc_ema.FOLDER)
  train_state, start = checkpoint.restore(manager, abstract) or (None, 0)
  num_steps = config.train.num_steps
  if start >= num_steps:
    logging.info('%s is done, at step %d. %s', workdir, start, cards.last_result(workdir))
    return 0
  logging.info(
    '%s: step %d of %d, %s parameters, %d device(s)',
    workdir,
    start,
    num_steps,
    f'{sum(leaf.size for leaf in jax.tree.leaves(abstract.params)):,}',
    jax.device_count(),
  )
  step_fn = make_train_step(config, model)
  runner = runners.runner(config.parallel.mode, step_fn, mesh, abstract)
  run_step = profile.traced(runner.step, traced, start, workdir)
  train_state = runner.put_state(train_state or parallel.initial_state(mesh, init))
  writer = writers.open_writer(workdir / 'tensorboard', start, silent=jax.process_index() > 0)
  meter = Meter(writer, config.train.log_every_steps, config.train.batch_size, start, num_steps)
  batches = meter.waits_for(
    parallel.prefetch(_batches(config, train_source, start), runner.put_batch)
  )
  stop = StopSignal()
  try:
    for step in range(start + 1, num_steps + 1):
      train_state, metrics = run_step(train_state, next(batches))
      meter.push(step, metrics, runner.get_metrics)
      last = step == num_steps
      stopped = stop.agreed(step) and not last
      evaluates = (step % config.train.eval_every_steps == 0 or last) and not stopped
      saves = step % config.checkpoint.every_steps == 0 or last or stopped
      if evaluates or saves:
        with meter.pause():
          current = runner.get_state(train_state)
          result = look(current, writer, meter.take_bins()) if evaluates else {}
          if saves:
            checkpoint.save(manager, step, current, result)
      if snapshots and step % config.ema.snapshot_every_steps == 0:
        current = runner.get_state(train_state)
        checkpoint.save(snapshots, step, posthoc_ema.power_averages(current))
      if stopped:
        manager.wait_until_finished()
        logging.warning(
          '%s: stopped and saved at step %d; the same command goes on.', stop.name, step
        )
        return EXIT_PREEMPTED
  except FloatingPointError as error:
    manager.wait_until_finished()
    latest = checkpoint.latest_step(manager)
    kept = f'is {workdir}/checkpoints/{latest}' if latest else 'does not exist'
    raise FloatingPointError(f'{error}; stopped. The last good checkpoint {kept}.') from error
  finally:
    meter.close()
    writer.close()
    manager.close()
    if snapshots:
      snapshots.close()
    stop.restore()
  logging.info('%s is done. %s', workdir, cards.last_result(workdir))
  return 0


def _batches(
  config: ConfigDict, source: data.Source, start: int
) -> Iterator[dict[str, np.ndarray]]:
  """This host's rows of each global batch, with their position in it."""
  size, host = config.train.batch_size // jax.process_count(), jax.process_index()
  index = np.arange(host * size, (host + 1) * size, dtype=np.int32)
  batches = data.train_batches(
    source,
    batch_size=config.train.batch_size,
    seed=config.seed,
    start_step=start,
    process_index=host,
    process_count=jax.process_count(),
  )
  return (batch | {'index': index} for batch in batches)
