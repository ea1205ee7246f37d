"""What training carries from step to step: parameters, their averages, the optimizer's state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from vdm.build.model import Model
from vdm.build.optimizer import ema_decays, optimizer


@struct.dataclass
class TrainState:
  """All of it: randomness and data are functions of (seed, step)."""

  step: jax.Array  # int32 scalar, updates done
  params: Any  # {'network': ..., 'schedule': ...}
  ema_params: Any
  averages: dict[str, Any]  # further ones, by name
  opt_state: Any
  adaptive: Any  # of the adaptive schedule (vdm.diffusion.adaptive); {} for any other


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


def create_state(config: ConfigDict, model: Model, params: Any) -> TrainState:
  """The state before the first step from these parameters."""
  adapts = model.adaptive.init() if model.adaptive else None
  averages = tuple(ema_decays(config, 0))[1:]
  return create(params, optimizer(config), adapts, averages)


def init_state(config: ConfigDict, model: Model) -> Callable[[], TrainState]:
  """A function without arguments, to be traced: the state before the first step."""
  return lambda: create_state(config, model, model.init(jax.random.key(config.seed)))
