"""What training carries from step to step: parameters, their average, the optimizer's state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
  """All of it: randomness and data are functions of (seed, step)."""

  step: jax.Array  # int32 scalar, updates done
  params: Any  # {'network': ..., 'schedule': ...}
  ema_params: Any
  opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first step; the average starts at the parameters."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),  # a buffer of its own: the state is donated
    opt_state=optimizer.init(params),
  )


def decay_mask(params: Any) -> Any:
  """True where weight decay applies: the network's kernels, and nothing else.

  Not the schedule (decay would narrow the learned log-SNR range), biases, norms or embeddings.
  """

  def decays(path, _):
    return path[0].key == 'network' and path[-1].key == 'kernel'

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
  num_steps: int,
  learning_rate: float,
  warmup_steps: int,
  decay: str,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """AdamW with linear warm-up, then constant or cosine to zero; optional clipping to a norm."""
  rate = {
    'constant': lambda: optax.constant_schedule(learning_rate),
    'cosine': lambda: optax.cosine_decay_schedule(learning_rate, max(1, num_steps - warmup_steps)),
  }[decay]()
  if warmup_steps:
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    rate = optax.join_schedules([warmup, rate], [warmup_steps])
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
  return optax.chain(*clip, adamw)


def ema_decay(
  step: jax.Array, batch_size: int, halflife_images: float, rampup_ratio: float
) -> jax.Array:
  """Decay per step, 0.5 ** (batch_size / halflife); early on the half-life is at most a share
  `rampup_ratio` of the images seen, so that the average forgets the initial parameters (EDM)."""
  halflife = jnp.float32(halflife_images)
  if rampup_ratio:
    halflife = jnp.minimum(halflife, (step + 1) * batch_size * rampup_ratio)
  return 0.5 ** (batch_size / halflife)


def apply_gradients(
  state: TrainState, grads: Any, optimizer: optax.GradientTransformation, decay: jax.Array
) -> TrainState:
  """One optimizer update and one update of the average."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema_params, params)
  return TrainState(state.step + 1, params, ema, opt_state)
