"""Holds what training carries from step to step: parameters, averages, the optimizer's state."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from vdm.build.model import Model
from vdm.build.optimizer import ema_shares, optimizer
from vdm.errors import require


@struct.dataclass
class TrainState:
  """Holds all that training carries: randomness and data are functions of (seed, step)."""

  step: jax.Array  # int32 scalar, updates done
  params: Any  # {'network': ..., 'schedule': ...}
  averages: dict[str, Any]  # of the parameters, by name; 'ema' is the main one
  opt_state: Any
  adaptive: Any  # of the adaptive schedule (vdm.diffusion.adaptive); {} for any other


def create(
  params: Any,
  optimizer: optax.GradientTransformation,
  adaptive: Any = None,
  averages: tuple[str, ...] = ('ema',),
) -> TrainState:
  """Returns the state before the first step; the averages, of these names, start at `params`."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # buffers of their own: the state is donated
    averages={name: jax.tree.map(jnp.copy, params) for name in averages},
    opt_state=optimizer.init(params),
    adaptive={} if adaptive is None else adaptive,
  )


def apply_gradients(
  state: TrainState, grads: Any, optimizer: optax.GradientTransformation, shares: dict[str, Any]
) -> TrainState:
  """Returns the state after an update of the optimizer and one of each average, by its share."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)

  def average(old, share):
    return jax.tree.map(lambda e, p: e + share * (p - e), old, params)

  return dataclasses.replace(
    state,
    step=state.step + 1,
    params=params,
    averages={name: average(old, shares[name]) for name, old in state.averages.items()},
    opt_state=opt_state,
  )


def named_params(state: TrainState, name: str) -> Any:
  """Returns the parameters called 'raw', or the average of that name.

  Raises:
    ValueError: no such average is kept.
  """
  kept = ['raw', *state.averages]
  require(
    name in kept, 'params', name, f'one of {", ".join(kept)}', 'config.ema says which there are'
  )
  return state.params if name == 'raw' else state.averages[name]


class InitState(Protocol):
  """Returns the state before the first step; it is to be traced."""

  def __call__(self, params: Any = None) -> TrainState:
    """Returns the state that starts from `params`; None: from those that the seed draws."""


def init_state(config: ConfigDict, model: Model) -> InitState:
  """Returns the function that makes the state before the first step."""

  def init(params=None):
    params = model.init(jax.random.key(config.seed)) if params is None else params
    adapts = model.adaptive.init() if model.adaptive else None
    averages = tuple(ema_shares(config.ema, config.train.batch_size, 0))
    return create(params, optimizer(config.train.num_steps, **config.optimizer), adapts, averages)

  return init
