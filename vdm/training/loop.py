"""The loop around the train step: data, evaluation, checkpoints, signals."""

import contextlib
import math
import pathlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vdm import build, cards, data
from vdm.build.state import TrainState
from vdm.evaluation import evaluate
from vdm.system import files, hosts, parallel, profile, runners, writers
from vdm.system.stopping import EXIT_PREEMPTED, Stop, Stopped, stop
from vdm.training import tags
from vdm.training.meter import Meter
from vdm.training.step import make_train_step
from vdm.workdir import checkpoint, config_file, data_file, integrity, load, lock, posthoc_ema

TENSORBOARD = 'tensorboard'  # folder of a workdir
NOT_FINITE = {'bits_per_dim': math.nan}  # the score of an evaluation that failed


class Due(NamedTuple):
  """Says what is to be done after a step."""

  evaluation: bool
  save: bool
  snapshot: bool  # of the averages from which others are made afterwards
  stop: bool


class Every(NamedTuple):
  """Holds the number of steps from one to the next; 0: never."""

  evaluation: int
  save: int
  snapshot: int


def due(step: int, num_steps: int, every: Every, stopped: bool) -> Due:
  """Returns what is due after `step`; `stopped` says whether the job was asked to end."""
  last = step == num_steps
  stop = stopped and not last
  now = Every(*(steps > 0 and step % steps == 0 for steps in every))
  return Due(
    evaluation=(now.evaluation or last) and not stop,
    save=now.save or last or stop,
    snapshot=bool(now.snapshot),
    stop=stop,
  )


class Job(NamedTuple):
  """Holds what the steps of a run work with."""

  workdir: pathlib.Path
  runner: runners.Runner
  evaluations: Sequence[evaluate.Evaluation]
  manager: checkpoint.CheckpointManager
  snapshots: checkpoint.CheckpointManager | None  # of the averages, if any are stored
  writer: writers.MetricWriter
  meter: Meter
  check_lock: Callable[[], None]  # raises where another job writes to the workdir
  every: Every
  stop: Stop


def train(config: ConfigDict, workdir: pathlib.Path) -> int:
  """Trains to config.train.num_steps, from the newest checkpoint if there is one.

  Returns:
    The process's exit status: 0 when done, EXIT_PREEMPTED when stopped and saved before.
  """
  config_file.check_run(workdir, config_file.flat(config_file.plain(config)))
  config = config_file.settled(config, workdir)
  model = build.model(config)
  build.check_devices(config, jax.device_count())
  settings, num_steps = config.train, config.train.num_steps
  traced = profile.steps(config.profile, num_steps)
  with data_file.of_run(workdir, config.data):
    source = build.within_bounds(config.decoder, data.load(config.data, 'train'))
  mesh = parallel.make_mesh(config.parallel.fsdp)
  init = build.init_state(config, model)
  abstract = parallel.abstract_state(mesh, init)  # a network refuses shapes that it cannot take
  evaluations = evaluate.in_training(config, model, mesh, workdir)
  if settings.start_from and not load.holds_run(workdir):
    load.check_start(settings.start_from, config_file.flat(config_file.plain(config)))
  with contextlib.ExitStack() as stack:
    stack.enter_context(stop.listening())
    config_file.check_writable(workdir, '--workdir', 'choose another --workdir')
    check_lock = stack.enter_context(lock.hold(workdir))
    data_file.check(workdir, source.identity)
    config_file.open_workdir(workdir, config)  # the first thing that is written
    data_file.keep(workdir, source.identity)
    manager = stack.enter_context(checkpoint.manager(workdir, config.checkpoint.keep))
    files.require_space(workdir, checkpoint.size_of(abstract), '--workdir')
    state, start = checkpoint.restore(manager, abstract) or (None, 0)
    every = Every(
      settings.eval_every_steps, config.checkpoint.every_steps, config.ema.snapshot_every_steps
    )
    owed = start > 0 and due(start, num_steps, every, False).evaluation
    owed = owed and not checkpoint.is_scored(manager, start)  # it was stopped meanwhile
    if start < num_steps or owed:
      num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
      devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
      head = f'{workdir}: step {start} of {num_steps}, {num_params:,} parameters'
      logging.info('%s, on %s', head, devices)
      step_fn = make_train_step(config, model)
      runner = runners.runner(config.parallel.mode, step_fn, mesh, abstract)
      runner = runner._replace(step=profile.traced(runner.step, traced, start, workdir))
      state = runner.put_state(state or load.first_state(settings.start_from, init, mesh))
      snapshots = None
      if every.snapshot and config.ema.power_stds:
        snapshots = checkpoint.manager(workdir, num_steps, posthoc_ema.FOLDER)
        stack.callback(snapshots.close)
      tree, silent = config.to_dict(), jax.process_index() > 0
      about = tags.describe, tags.texts(tree), tags.hparams(tree)
      writer = writers.open_writer(workdir / TENSORBOARD, start, silent, *about)
      stack.callback(writer.close)
      most_skipped = settings.most_skipped if settings.on_nan == 'skip' else 0
      meter = Meter(
        writer,
        settings.log_every_steps,
        settings.batch_size,
        start,
        num_steps,
        most_skipped,
        model.decoder.unit,
        model.decoder.suffix,
      )
      stack.callback(meter.close)
      parts = runner, evaluations, manager, snapshots, writer, meter, check_lock, every, stop
      job = Job(workdir, *parts)
      batches = train_batches(source, settings.batch_size, config.seed, start)
      if owed:
        _make_up(job, start, runner.get_state(state))
      if _take_steps(job, state, batches, start, num_steps):
        return EXIT_PREEMPTED
  at = '' if start < num_steps else f', at step {start}'
  logging.info('%s is done%s. %s', workdir, at, cards.last_result(workdir))
  if jax.process_index() == 0:
    _say_where(workdir)
  return 0


def _say_where(workdir: pathlib.Path):
  """Says where to look at what a run left."""
  pictures = sorted((epath.Path(workdir) / 'samples').glob('step_*.png'))
  if pictures:
    logging.info('samples: %s', pictures[-1])
  quoted = shlex.quote(str(workdir))
  logging.info('curves: tensorboard --logdir=%s', shlex.quote(f'{workdir}/{TENSORBOARD}'))
  logging.info('all of it on one page: python -m vdm.report %s', quoted)


def _take_steps(
  job: Job, state: TrainState, batches: Iterator[data.Batch], start: int, num_steps: int
) -> bool:
  """Takes the steps after `start`, and does what is due; returns whether it was stopped before."""
  runner, meter, manager = job.runner, job.meter, job.manager
  placed = meter.waits_for(parallel.prefetch(batches, runner.put_batch))
  try:
    for step in range(start + 1, num_steps + 1):
      state, metrics = runner.step(state, next(placed))
      job.stop.defer()
      job.check_lock()
      meter.push(step, metrics, runner.get_metrics)
      now = due(step, num_steps, job.every, job.stop.agreed())
      if now.evaluation or now.save or now.snapshot:
        with meter.pause():
          _evaluate_and_save(job, step, runner.get_state(state), now)
      if now.stop:
        _say_stopped(job, step)
        return True
    manager.wait_until_finished()
  except Stopped:  # in an evaluation, with the state saved; or before the first step was taken
    manager.wait_until_finished()
    if checkpoint.latest_step(manager) != step:
      raise
    _say_stopped(job, step)
    return True
  except FloatingPointError as error:
    manager.wait_until_finished()
    latest = checkpoint.latest_step(manager)
    kept = f'is {job.workdir}/checkpoints/{latest}' if latest else 'does not exist'
    raise FloatingPointError(f'{error}; stopped. The last good checkpoint {kept}.') from error
  return False


def _say_stopped(job: Job, step: int):
  """Waits for the last save, and says that the run was stopped."""
  job.manager.wait_until_finished()
  text = '%s: stopped and saved at step %d; the same command goes on.'
  logging.warning(text, job.stop.name, step)


def _evaluate_and_save(job: Job, step: int, state: TrainState, now: Due):
  """Evaluates and saves, as is due; whatever ends an evaluation, the state is saved."""
  integrity.require_finite(state, step)
  if now.snapshot and job.snapshots:
    # one save after the other: Orbax mixes up the processes' barriers of two at once
    job.manager.wait_until_finished()
    checkpoint.save(job.snapshots, step, posthoc_ema.power_averages(state))
    job.snapshots.wait_until_finished()
  if now.evaluation and jax.process_count() > 1:
    # before: of several processes one cannot save alone, whatever ends its part of an evaluation
    checkpoint.save(job.manager, step, state)
    job.manager.wait_until_finished()
    _make_up(job, step, state)
    return
  scores: dict[str, float] = {}
  try:
    if now.evaluation:
      with job.stop.raising():
        scores = _evaluate(job, state)
  except BaseException as error:
    failed = isinstance(error, FloatingPointError)
    job.check_lock()
    checkpoint.save(job.manager, step, state, NOT_FINITE if failed else None)
    raise
  if now.save:
    job.check_lock()  # an evaluation may have taken hours
    checkpoint.save(job.manager, step, state, scores)


def _make_up(job: Job, step: int, state: TrainState):
  """Evaluates a state that was saved before its evaluation ended; a failure is met only once."""
  try:
    scores = _evaluate(job, state)
  except FloatingPointError:
    job.check_lock()
    checkpoint.score(job.manager, step, NOT_FINITE)
    raise
  job.check_lock()
  checkpoint.score(job.manager, step, scores)


def _evaluate(job: Job, state: TrainState) -> dict[str, float]:
  """Evaluates, writes to TensorBoard, and returns the metrics by which checkpoints are ranked."""
  bins = job.meter.take_bins()
  found = evaluate.Result(curves={} if bins is None else {'train': (bins, None)})
  result = evaluate.evaluate(state, job.evaluations, found)
  step = int(state.step)
  job.writer.write_scalars(step, result.scalars)
  if result.pictures:  # on the first process
    shown = {name: picture[None] for name, picture in result.pictures.items()}
    job.writer.write_images(step, shown)
  hosts.give_back_memory()
  last = [*result.bounds.values()][-1]  # of config.eval.params
  return {last.metric: last.value}


def train_batches(
  source: data.Source, batch_size: int, seed: int, start: int = 0
) -> Iterator[data.Batch]:
  """Returns this host's rows of each global batch after `start`, with their position in it."""
  size, host = batch_size // jax.process_count(), jax.process_index()
  index = np.arange(host * size, (host + 1) * size, dtype=np.int32)
  batches = data.train_batches(
    source,
    batch_size=batch_size,
    seed=seed,
    start_step=start,
    process_index=host,
    process_count=jax.process_count(),
  )
  return (batch | {'index': index} for batch in batches)
