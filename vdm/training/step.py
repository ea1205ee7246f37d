"""The train step, written for the global batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vdm import build
from vdm.build.state import TrainState, apply_gradients
from vdm.data.augment import augment
from vdm.diffusion.adaptive import predicted_reduction
from vdm.diffusion.decoders import bits_per_dim
from vdm.diffusion.elbo import interior_gradient, moments, variational_bound
from vdm.diffusion.gaussian import end_points, fold_in, standard_normal
from vdm.diffusion.guidance import drop_labels
from vdm.diffusion.times import stratified
from vdm.evaluation.bound import log_snr_bins


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
      batch['image'],
      config.data.flip,
      config.data.rotate,
    )
    if config.train.label_dropout:
      label = drop_labels(fold_in(key_label, index), label, config.train.label_dropout)
    t = stratified(key_t, index, config.train.batch_size)
    bound = variational_bound(
      model.denoiser(params, label, flag, train=True, key_dropout=key_dropout),
      schedule,
      model.decoder,
      model.weighting,
      u,
      t,
      standard_normal(fold_in(key_recon, index), model.image_shape),
      standard_normal(fold_in(key_eps, index), model.image_shape),
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
    metrics['log_snr_max'], metrics['log_snr_min'] = ends = end_points(schedule)
    metrics['moments'] = moments(diffusion, ends[0] - ends[1]).mean(axis=0)
    metrics['bins'] = log_snr_bins(diffusion, ends, num_dims, jnp.ones(len(u)))
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
) -> Callable[..., tuple[TrainState, dict]]:
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
    return apply_gradients(train_state, grads, optimizer, decays), metrics

  return step
