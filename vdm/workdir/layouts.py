"""The layouts in which parameters are saved, and how to bring one to another."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vdm.build.state import TrainState
from vdm.nn import blocks

_OLD_EMA = 'ema_params.'  # until version 0.1 the main average was not among the others


def as_written(saved: dict[str, list], wanted: Any) -> tuple[Any, Callable[[Any], Any]]:
  """Returns the abstract state `wanted` in the layout of `saved`, and what brings it back.

  Args:
    saved: the leaves of a checkpoint, by name.
    wanted: a pytree of abstract arrays, with the shardings of today.

  Returns:
    What to restore, and a function from that to a state like `wanted`.
  """
  blocks_as_written, from_blocks = _blocks_as_written(saved, wanted)
  if not (isinstance(wanted, TrainState) and any(name.startswith(_OLD_EMA) for name in saved)):
    return blocks_as_written, from_blocks
  leaves = {field.name: getattr(blocks_as_written, field.name) for field in fields(TrainState)}
  others = dict(leaves['averages'])
  older = leaves | {'ema_params': others.pop('ema'), 'averages': others}

  def from_older(state):
    averages = {'ema': state.pop('ema_params'), **state.pop('averages')}
    return from_blocks(TrainState(**state, averages=averages))

  return older, from_older


def _blocks_as_written(saved, wanted):
  """Returns the same for blocks alone, unrolled or stacked for a loop."""
  parts = [{part for name in names for part in name.split('.')} for names in (saved, named(wanted))]
  stacked, stacked_wanted = map(blocks.stacked_names, parts)
  if bool(stacked) == bool(stacked_wanted):
    return wanted, lambda state: state
  shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
  if stacked:
    written = blocks.stack(wanted, stacked, _abstract_join)
    return written, jax.jit(blocks.unstack, out_shardings=shardings)
  written = blocks.unstack(wanted, _abstract_take)
  stack = lambda state: blocks.stack(state, stacked_wanted)
  return written, jax.jit(stack, out_shardings=shardings)


def _abstract_join(*leaves: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns what stacking them gives, sharded as each of them is."""
  leaf, sharding = leaves[0], leaves[0].sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
  return jax.ShapeDtypeStruct((len(leaves), *leaf.shape), leaf.dtype, sharding=sharding)


def _abstract_take(leaf: jax.ShapeDtypeStruct, i: int) -> jax.ShapeDtypeStruct:
  """Returns what one of a stack is, sharded as the stack is, but for its first axis."""
  del i
  sharding = leaf.sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def named(tree: Any) -> dict[str, Any]:
  """Returns {'params.dense.kernel': leaf}, in the order of `jax.tree.leaves`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
