"""The train step, written for the global batch, and the loop around it."""

import functools
import pathlib
import signal
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vdm import (
  build,
  cards,
  checkpoint,
  data,
  evaluate,
  parallel,
  profile,
  reconstruct,
  report,
  state,
  writers,
)
from vdm.adaptive import predicted_reduction
from vdm.gaussian import fold_in, standard_normal
from vdm.guidance import drop_labels
from vdm.likelihood import bits_per_dim
from vdm.look import make_look
from vdm.losses import interior_gradient, moments, variational_bound
from vdm.times import stratified

EXIT_PREEMPTED = 75  # saved after SIGTERM, not done: run the same command again


def augment(
  key_flip: jax.Array, key_rotate: jax.Array, images: jax.Array, flip: bool, rotate: bool
) -> tuple[jax.Array, jax.Array]:
  """Random flips and turns of images [B H W C], and a flag [B], 1 where an image was changed.

  `flip` mirrors left and right with probability one half; `rotate` then, with probability one half,
  turns by one, two or three quarters, each as likely (VDM's public code does both). One key of each
  kind per example.
  """
  flag = jnp.zeros(len(images), bool)
  if flip:
    flipped = jax.vmap(jax.random.bernoulli)(key_flip)
    images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    flag |= flipped
  if rotate:
    sixth = jax.vmap(lambda key: jax.random.randint(key, (), 0, 6))(key_rotate)
    quarters = jnp.maximum(sixth - 2, 0)  # none three times in six
    turns = [functools.partial(jnp.rot90, k=k) for k in range(4)]
    images = jax.vmap(lambda k, image: jax.lax.switch(k, turns, image))(quarters, images)
    flag |= quarters > 0
  return images, flag


def make_loss(config: ConfigDict, model: build.Model) -> Callable:
  """loss(params, probe, adaptive, batch, key, key_dropout) -> (mean, (metrics, (t, diffusion))).

  Losses are in nats per dimension, t and the diffusion loss [B]. The interior of a learned schedule
  gets no gradient in continuous time, where `probe` collects what `interior_gradient` needs. The
  metrics are means over examples, so that they average over parts of a batch.
  """
  num_dims = int(np.prod(model.image_shape))

  def loss_fn(params, probe, adaptive, batch, key, key_dropout):
    if learns_interior(config, params):
      interior = jax.lax.stop_gradient(params['schedule']['interior'])
      params = params | {'schedule': params['schedule'] | {'interior': interior}}
    schedule = model.training_schedule(params, adaptive)
    key_t, key_eps, key_recon, key_flip, key_rotate, key_label = jax.random.split(key, 6)
    index, label = batch['index'], batch['label']
    u, flag = augment(
      fold_in(key_flip, index),
      fold_in(key_rotate, index),
      batch['image'].astype(jnp.int32),
      config.data.flip,
      config.data.rotate,
    )
    if config.train.label_dropout:
      label = drop_labels(fold_in(key_label, index), label, config.train.label_dropout)
    t = stratified(key_t, index, config.train.batch_size)
    bound = variational_bound(
      model.denoiser(params, label, flag, train=True, key_dropout=key_dropout),
      schedule,
      model.weighting,
      u,
      t,
      standard_normal(fold_in(key_recon, index), model.image_shape),
      standard_normal(fold_in(key_eps, index), model.image_shape),
      model.num_values,
      config.train.num_timesteps,
      probe,
    )
    diffusion = bound.diffusion._replace(loss=bound.diffusion.loss / num_dims)
    loss = ((bound.recon + bound.prior) / num_dims + diffusion.loss).mean()
    terms = {
      'recon_bpd': bound.recon,
      'prior_bpd': bound.prior,
      'diffusion_bpd': bound.diffusion.elbo,
    }
    metrics = {k: bits_per_dim(v.mean(), num_dims) for k, v in terms.items()}
    metrics['bits_per_dim'] = sum(metrics.values())
    metrics['loss'] = loss
    metrics['log_snr_max'], metrics['log_snr_min'] = ends = schedule(jnp.array([0.0, 1.0]))
    metrics['moments'] = moments(diffusion, ends[0] - ends[1]).mean(axis=0)
    metrics['bins'] = evaluate.log_snr_bins(diffusion, ends, num_dims, jnp.ones(len(u)))
    if model.adaptive:
      error = 2 * bound.diffusion.loss / -bound.diffusion.slope  # w |eps_hat - eps|^2
      hits = model.adaptive.hits(bound.diffusion.log_snr, error)
      metrics['hits'] = jax.tree.map(lambda a: a / len(u), hits)
    return loss, (metrics, (t, diffusion.loss))

  return loss_fn


def learns_interior(config: ConfigDict, params: dict) -> bool:
  """Whether the schedule has an interior that the variance of the loss trains, not the bound.

  In discrete time the bound itself depends on the interior, and trains it.
  """
  return 'interior' in params['schedule'] and not config.train.num_timesteps


def make_train_step(
  config: ConfigDict, model: build.Model, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[state.TrainState, dict]]:
  """step(train_state, batch, axis_name=None) -> (train_state, metrics).

  `batch` holds 'image' uint8 [B H W C], 'label' [B] and 'index' [B], the position in the global
  batch; with an axis name it is one device's part. Every random number is a function of
  (config.seed, step, purpose, index), so that any split over devices and microbatches draws the
  same ones; dropout alone is drawn per call.
  """
  grad_fn = jax.grad(make_loss(config, model), argnums=(0, 1), has_aux=True)
  microbatches = config.train.microbatches

  def step(train_state, batch, axis_name=None):
    key = jax.random.fold_in(jax.random.key(config.seed), train_state.step)
    key, key_dropout = jax.random.split(key)
    if axis_name:
      key_dropout = jax.random.fold_in(key_dropout, jax.lax.axis_index(axis_name))

    def part_grads(number, part):
      params, zeros = train_state.params, jnp.zeros(len(part['index']))
      probe = (zeros, zeros)
      (grads, probe_grads), (metrics, (t, loss)) = grad_fn(
        params, probe, train_state.adaptive, part, key, jax.random.fold_in(key_dropout, number)
      )
      if learns_interior(config, params):
        as_schedule = lambda schedule: model.schedule({'schedule': schedule})
        grads['schedule']['interior'] = interior_gradient(
          as_schedule, params['schedule'], t, loss, probe_grads
        )
      return grads, metrics

    if microbatches == 1:
      grads, metrics = part_grads(0, batch)
    else:
      # Every k-th row, so that each part is spread over all devices.
      parts = jax.tree.map(
        lambda a: a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1), batch
      )

      def body(total, numbered):
        return jax.tree.map(jnp.add, total, part_grads(*numbered)), None

      numbered = (jnp.arange(microbatches), parts)
      zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(part_grads, *jax.tree.map(lambda a: a[0], numbered)),
      )
      total, _ = jax.lax.scan(body, zero, numbered)
      grads, metrics = jax.tree.map(lambda a: a / microbatches, total)
    if axis_name:
      grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
    metrics['grad_norm'] = optax.tree.norm(grads)
    if model.adaptive:
      hits = jax.tree.map(lambda a: a * config.train.batch_size, metrics.pop('hits'))
      metrics['square_reduction_predicted'] = predicted_reduction(
        model.adaptive.density(train_state.adaptive)
      )
      train_state = train_state.replace(adaptive=model.adaptive.update(train_state.adaptive, hits))
    decays = build.ema_decays(config, train_state.step)
    return state.apply_gradients(train_state, grads, optimizer, decays), metrics

  return step


class _StopSignal:
  """Notes SIGTERM, Ctrl-C and SIGHUP, for the loop to save and stop.

  A second SIGTERM or Ctrl-C acts at once. A terminal that closes sends SIGHUP more than once, and
  under nohup it is to be ignored. In a job of several processes JAX has a SIGTERM handler of its
  own, which tells all hosts.
  """

  def __init__(self):
    self.name = 'preemption notice'
    self.noted = False
    signals = []
    if jax.process_count() == 1:
      hangup = [s for s in signal.Signals if s.name == 'SIGHUP']  # not on Windows
      kept = [s for s in hangup if signal.getsignal(s) != signal.SIG_IGN]
      signals = [signal.SIGTERM, signal.SIGINT, *kept]
    self._old = {s: signal.signal(s, self._note) for s in signals}

  def _note(self, number, _):
    self.name, self.noted = signal.Signals(number).name, True
    for again in (signal.SIGTERM, signal.SIGINT):
      signal.signal(again, self._old[again])

  def restore(self):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def agreed(self, step: int) -> bool:
    """Whether to stop after `step`: the same answer on every host."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.noted


def train(config: ConfigDict, workdir: pathlib.Path) -> int:
  """Trains to config.train.num_steps, from the newest checkpoint if there is one.

  Returns:
    The process's exit status: 0 when done, EXIT_PREEMPTED when stopped and saved before.
  """
  model, optimizer = build.model(config), build.optimizer(config)
  build.check_devices(config, jax.device_count())
  traced = profile.steps(config)
  train_source = data.load(config.data, 'train')
  mesh = parallel.make_mesh(config.parallel.fsdp)
  look = make_look(config, model, mesh, workdir)
  checkpoint.open_workdir(workdir, config)  # the first thing that is written
  init = build.init_state(config, model)
  abstract = parallel.abstract_state(mesh, init)
  manager = checkpoint.manager(workdir, config.checkpoint.keep)
  snapshots = None
  if config.ema.snapshot_every_steps and config.ema.power_stds:
    snapshots = checkpoint.manager(workdir, config.train.num_steps, reconstruct.FOLDER)
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
  step_fn = make_train_step(config, model, optimizer)
  runner = parallel.runner(config.parallel.mode, step_fn, mesh, abstract)
  run_step = profile.traced(runner.step, traced, start, workdir)
  train_state = runner.put_state(train_state or parallel.initial_state(mesh, init))
  writer = writers.open_writer(workdir / 'tensorboard', start, silent=jax.process_index() > 0)
  meter = report.Meter(
    writer, config.train.log_every_steps, config.train.batch_size, start, num_steps
  )
  batches = meter.waits_for(
    parallel.prefetch(_batches(config, train_source, start), runner.put_batch)
  )
  stop = _StopSignal()
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
        checkpoint.save(snapshots, step, reconstruct.power_averages(current))
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
