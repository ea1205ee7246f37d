"""The layouts in which parameters are saved, and how to bring one to another."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vdm.nn import blocks


def as_written(saved: dict[str, list], wanted: Any) -> tuple[Any, Callable[[Any], Any]]:
  """The abstract state `wanted` in the layout of `saved`, and what brings a state from there."""
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
  """What stacking them gives: sharded as each of them is."""
  leaf, sharding = leaves[0], leaves[0].sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
  return jax.ShapeDtypeStruct((len(leaves), *leaf.shape), leaf.dtype, sharding=sharding)


def _abstract_take(leaf: jax.ShapeDtypeStruct, i: int) -> jax.ShapeDtypeStruct:
  """What one of a stack is: sharded as the stack is, but for its first axis."""
  del i
  sharding = leaf.sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def named(tree: Any) -> dict[str, Any]:
  """{'params.dense.kernel': leaf}, in the order of `jax.tree.leaves`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
