"""Checks the arrays of a state: finite values, and checksums that show a change."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def require_finite(state: Any, step: int):
  """Refuses a state that holds values that are not finite; what it asks for is a scalar per tree.

  Raises:
    FloatingPointError: the message names the trees, such as 'params' or 'averages.ema'.
  """
  bad = not_finite(state)
  if bad:
    raise FloatingPointError(f'step {step}: {" and ".join(bad)} not finite')


def not_finite(state: Any) -> list[str]:
  """Returns the names of the trees of a state that hold values that are not finite."""
  finite = jax.device_get(_finite(state))
  return [name for name, good in finite.items() if not good]


@jax.jit
def _finite(state: Any) -> dict[str, jax.Array]:
  """Returns whether all values of each tree are finite: of a state's fields, or of a dict's."""
  trees: dict[str, list] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
      names = [jax.tree_util.keystr((part,), simple=True) for part in path[:2]]
      tree = '.'.join(names if names[0] == 'averages' else names[:1])
      trees.setdefault(tree, []).append(jnp.isfinite(leaf).all())
  return {name: jnp.stack(parts).all() for name, parts in trees.items()}


def checksums(tree: Any) -> list[int]:
  """Returns one checksum per leaf, the same on every process and for any sharding.

  It is the sum mod 2**64 of each element's bits times its row number: integers, so that shards add
  up in any order, and exactly. It is computed on the host, because a kernel per shape would take
  seconds to compile.
  """
  leaves = jax.tree.leaves(tree)
  sums = np.zeros(len(leaves), np.uint64)
  for i, leaf in enumerate(leaves):
    for shard in leaf.addressable_shards:
      if shard.replica_id == 0:
        bits = np.asarray(shard.data).view(f'u{leaf.dtype.itemsize}')
        rows = np.atleast_1d(bits.sum(axis=tuple(range(1, bits.ndim)), dtype=np.uint64))
        first = (shard.index[0].start or 0) if leaf.ndim else 0
        sums[i] += rows @ np.arange(first + 1, first + 1 + len(rows), dtype=np.uint64)
  # As uint32: JAX would cut uint64 down to that.
  every = multihost_utils.process_allgather(sums.view(np.uint32)).view(np.uint64)
  return every.reshape(-1, len(leaves)).sum(axis=0, dtype=np.uint64).tolist()


def fingerprint(tree: Any) -> str:
  """Returns eight hexadecimal digits of arrays, the same on every process and for any sharding."""
  return f'{zlib.crc32(json.dumps(checksums(tree)).encode()):08x}'
