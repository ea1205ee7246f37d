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
  averages: dict[str, Any]  # further ones, by name
  opt_state: Any
  adaptive: Any  # of the adaptive schedule (vdm.adaptive); {} for any other


def create(
  params: Any,
  optimizer: optax.GradientTransformation,
  adaptive: Any = None,
  averages: tuple[str, ...] = (),
) -> TrainState:
  """The state before the first step; the averages, of these names, start at the parameters."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema_params=jax.tree.map(jnp.copy, params),  # a buffer of its own: the state is donated
    averages={name: jax.tree.map(jnp.copy, params) for name in averages},
    opt_state=optimizer.init(params),
    adaptive={} if adaptive is None else adaptive,
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
  schedule_rate: float,
) -> optax.GradientTransformation:
  """AdamW with linear warm-up, then constant or cosine to zero; optional clipping to a norm.

  Update number k of a warm-up over N, k = 1 .. N, has k/N of the learning rate: none is in vain.

  The schedule's parameters move `schedule_rate` times as fast: Adam moves any parameter by about
  the learning rate, and end points are a hundred times as large as weights.
  """
  rate = {
    'constant': lambda: optax.constant_schedule(learning_rate),
    'cosine': lambda: optax.cosine_decay_schedule(learning_rate, max(1, num_steps - warmup_steps)),
  }[decay]()
  if warmup_steps:
    warmup = lambda count: learning_rate * (count + 1) / warmup_steps
    rate = optax.join_schedules([warmup, rate], [warmup_steps])
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
  faster = []
  if schedule_rate != 1:
    faster = [optax.masked(optax.scale(schedule_rate), is_schedule)]
  return optax.chain(*clip, adamw, *faster)


def is_schedule(params: Any) -> Any:
  """True for the schedule's parameters, False for the network's."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == 'schedule', params)


def apply_gradients(
  state: TrainState, grads: Any, optimizer: optax.GradientTransformation, decays: dict[str, Any]
) -> TrainState:
  """One optimizer update and one of each average: `decays` has theirs by name, the main one's
  under 'ema'."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)

  def average(old, decay):
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), old, params)

  return state.replace(
    step=state.step + 1,
    params=params,
    ema_params=average(state.ema_params, decays['ema']),
    averages={name: average(old, decays[name]) for name, old in state.averages.items()},
    opt_state=opt_state,
  )


def named_params(state: TrainState, name: str) -> Any:
  """The parameters called 'raw', 'ema' or by the name of a further average."""
  return {'raw': state.params, 'ema': state.ema_params, **state.averages}[name]
