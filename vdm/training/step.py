"""The train step, written for the global batch: read from the bottom up, `train_step` first."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from vdm import build
from vdm.build.state import TrainState, apply_gradients
from vdm.data import Batch, conditions_of
from vdm.data.augment import augment
from vdm.diffusion.adaptive import predicted_reduction
from vdm.diffusion.elbo import interior_gradient, moments, variational_bound
from vdm.diffusion.gaussian import count_dims, end_levels, fold_in, standard_normal
from vdm.diffusion.guidance import drop
from vdm.diffusion.ode import PROBES
from vdm.diffusion.times import stratified
from vdm.evaluation.bound import log_snr_bins
from vdm.nn.attention import differentiated_twice


class Recipe(NamedTuple):
  """Holds what a train step needs to know, constants all."""

  model: build.Model
  optimizer: optax.GradientTransformation
  shares: Callable[[Array], dict[str, Array]]  # step -> of the newest parameters in each average
  seed: int
  batch_size: int  # of the global batch
  microbatches: int
  num_timesteps: int  # T, 0 for continuous time
  second_order: float  # the weight of `elbo.second_order`; 0: it is not computed
  label_dropout: float
  flip: bool
  rotate: bool
  skips_nan: bool  # whether a step with a loss or gradient that is not finite changes nothing

  def learns_interior(self, params: dict) -> bool:
    """Returns whether the loss's variance trains the schedule's interior, and the bound does not.

    In discrete time the bound itself depends on the interior, and trains it.
    """
    return 'interior' in params['schedule'] and not self.num_timesteps


class StepMetrics(NamedTuple):
  """Holds what a step measured: means over its examples, which average over parts of a batch."""

  scalars: dict[str, Array]  # by the name in the log
  moments: Array  # [3], of the diffusion loss (`elbo.moments`)
  bins: dict[str, Array]  # bits/dim by log-SNR (`evaluation.bound.log_snr_bins`)
  hits: Any = ()  # of the adaptive schedule, per example


def recipe(config: ConfigDict, model: build.Model) -> Recipe:
  """Returns the recipe of a config."""
  train = config.train
  return Recipe(
    model=model,
    optimizer=build.optimizer(train.num_steps, **config.optimizer),
    shares=functools.partial(build.ema_shares, config.ema, train.batch_size),
    seed=config.seed,
    batch_size=train.batch_size,
    microbatches=train.microbatches,
    num_timesteps=train.num_timesteps,
    second_order=train.second_order,
    label_dropout=train.label_dropout,
    flip=config.data.flip,
    rotate=config.data.rotate,
    skips_nan=train.on_nan == 'skip',
  )


def loss(
  recipe: Recipe,
  params: dict,
  probe: tuple[Array, Array],
  adaptive: Any,
  batch: Batch,
  key: Array,
  key_dropout: Array,
) -> tuple[Array, tuple[StepMetrics, tuple[Array, Array, dict[str, Array]]]]:
  """Returns the mean loss in nats/dim, metrics, and t [B], diffusion loss [B] and conditions.

  Args:
    recipe: of the step.
    params: {'network', 'schedule'}.
    probe: zeros of log_snr's shape, twice, whose gradients `interior_gradient` needs: the interior
      of a learned schedule gets none from the loss itself in continuous time.
    adaptive: the state of the adaptive schedule, if any.
    batch: a batch, or a part of one.
    key: of the step; every random number but dropout's is a function of it and the example's index.
    key_dropout: of this call.
  """
  model = recipe.model
  if recipe.learns_interior(params):
    interior = jax.lax.stop_gradient(params['schedule']['interior'])
    params = params | {'schedule': params['schedule'] | {'interior': interior}}
  key_t, key_eps, key_recon, key_flip, key_rotate, key_label = jax.random.split(key, 6)
  index = batch['index']
  pictures = {name: batch[name] for name in ('image', 'condition', 'valid') if name in batch}
  pictures, flag = augment(
    fold_in(key_flip, index), fold_in(key_rotate, index), pictures, recipe.flip, recipe.rotate
  )
  u, valid = pictures['image'], pictures.get('valid')
  conditions = conditions_of({**batch, **pictures})
  if recipe.label_dropout:
    conditions = drop(fold_in(key_label, index), conditions, recipe.label_dropout)
  schedule, signs = model.training_schedule(params, adaptive, conditions), None
  if recipe.second_order:
    signs = PROBES['rademacher'](fold_in(jax.random.fold_in(key, 6), index), model.image_shape)
  t = stratified(key_t, index, recipe.batch_size)
  with differentiated_twice(bool(recipe.second_order)):
    bound = variational_bound(
      model.denoiser(params, conditions, flag, train=True, key_dropout=key_dropout),
      schedule,
      model.decoder_of(params),
      model.weighting,
      u,
      t,
      standard_normal(fold_in(key_recon, index), model.image_shape),
      standard_normal(fold_in(key_eps, index), model.image_shape),
      recipe.num_timesteps,
      probe,
      valid,
      signs,
    )
  num_dims, decoder = count_dims(model.image_shape, valid), model.decoder
  diffusion = bound.diffusion._replace(loss=bound.diffusion.loss / num_dims)
  value = ((bound.recon + bound.prior) / num_dims + diffusion.loss).mean()
  terms = {'recon': bound.recon, 'prior': bound.prior, 'diffusion': bound.diffusion.elbo}
  scalars = {
    f'{name}_{decoder.suffix}': decoder.per_dim(nats, num_dims).mean()
    for name, nats in terms.items()
  }
  scalars[decoder.metric] = sum(scalars.values())
  if recipe.second_order:
    scalars['second_order'] = (bound.diffusion.second / num_dims).mean()
    value += recipe.second_order * scalars['second_order']
  scalars['loss'] = value
  scalars['log_snr_max'], scalars['log_snr_min'] = ends = end_levels(schedule)
  hits = ()
  if model.adaptive:
    error = 2 * bound.diffusion.loss / -bound.diffusion.slope  # w |eps_hat - eps|^2
    hits = jax.tree.map(lambda a: a / len(u), model.adaptive.hits(bound.diffusion.log_snr, error))
  metrics = StepMetrics(
    scalars,
    moments(diffusion, ends[0] - ends[1]).mean(axis=0),
    log_snr_bins(
      diffusion, ends, decoder.per_dim(bound.diffusion.elbo, num_dims), jnp.ones(len(u))
    ),
    hits,
  )
  return value, (metrics, (t, diffusion.loss, conditions))


def gradients(
  recipe: Recipe, state: TrainState, batch: Batch, key: Array, key_dropout: Array
) -> tuple[Any, StepMetrics]:
  """Returns the gradients of the mean loss of a batch, or of a part of one, and the metrics."""
  times = jnp.zeros(len(batch['index']))
  zeros = jnp.zeros(jax.eval_shape(recipe.model.schedule(state.params), times).shape)
  grad = jax.grad(functools.partial(loss, recipe), argnums=(0, 1), has_aux=True)
  (grads, probe_grads), (metrics, (t, diffusion_loss, conditions)) = grad(
    state.params, (zeros, zeros), state.adaptive, batch, key, key_dropout
  )
  if recipe.learns_interior(state.params):
    as_schedule = lambda schedule: recipe.model.schedule({'schedule': schedule}, conditions)
    grads['schedule']['interior'] = interior_gradient(
      as_schedule, state.params['schedule'], t, diffusion_loss, probe_grads
    )
  return grads, metrics


def mean_over_parts(of_part: Callable[[Array, Batch], Any], batch: Batch, parts: int) -> Any:
  """Returns the mean of of_part(number, part) over `parts` equal parts, computed one by one.

  A part is every `parts`-th row, so that each is spread over all devices.
  """
  split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
  numbered = (jnp.arange(parts), split)
  shapes = jax.eval_shape(of_part, *jax.tree.map(lambda a: a[0], numbered))
  zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

  def body(total, numbered):
    return jax.tree.map(jnp.add, total, of_part(*numbered)), None

  total, _ = jax.lax.scan(body, zero, numbered)
  return jax.tree.map(lambda a: a / parts, total)


def train_step(
  recipe: Recipe, state: TrainState, batch: Batch, axis_name: str | None = None
) -> tuple[TrainState, StepMetrics]:
  """Returns the state after one step, and what it measured.

  Every random number is a function of (seed, step, purpose, index in the global batch), so that any
  split over devices and microbatches draws the same ones; dropout alone is drawn per call.

  Args:
    recipe: of the run.
    state: before the step.
    batch: with 'index' [B], the position in the global batch; with an axis name it is one
      device's part.
    axis_name: of the devices' axis under pmap.
  """
  key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
  key, key_dropout = jax.random.split(key)
  if axis_name:
    key_dropout = jax.random.fold_in(key_dropout, jax.lax.axis_index(axis_name))

  def of_part(number, part):
    return gradients(recipe, state, part, key, jax.random.fold_in(key_dropout, number))

  if recipe.microbatches == 1:
    grads, metrics = of_part(0, batch)
  else:
    grads, metrics = mean_over_parts(of_part, batch, recipe.microbatches)
  if axis_name:
    grads, metrics = jax.lax.pmean((grads, metrics), axis_name)

  scalars = metrics.scalars | {'grad_norm': optax.tree.norm(grads)}
  after, adaptive = state, recipe.model.adaptive
  if adaptive:
    scalars['square_reduction_predicted'] = predicted_reduction(adaptive.density(state.adaptive))
    hits = jax.tree.map(lambda a: a * recipe.batch_size, metrics.hits)
    after = state.replace(adaptive=adaptive.update(state.adaptive, hits))
  after = apply_gradients(after, grads, recipe.optimizer, recipe.shares(state.step))
  if recipe.skips_nan:
    good = jnp.isfinite(scalars['loss']) & jnp.isfinite(scalars['grad_norm'])
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
    after = kept.replace(step=after.step)
  return after, metrics._replace(scalars=scalars, hits=())


def make_train_step(
  config: ConfigDict, model: build.Model
) -> Callable[..., tuple[TrainState, StepMetrics]]:
  """Returns `train_step` of a config: (state, batch, axis_name=None) -> (state, metrics)."""
  return functools.partial(train_step, recipe(config, model))
