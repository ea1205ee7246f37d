"""Chains of equal blocks: unrolled, or one block in a loop with its parameters stacked.

The unrolled layout holds the parameters of `down_0`, `down_1`, ...; the stacked one those of
`down_*`, whose leaves have a leading axis over the blocks. The star says which parts of a tree are
stacked: no other key of a tree of parameters has one.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# Products and attention are expensive to compute again. Norms, activations, masks, sums and casts
# are not, and in a loop every array kept for the gradient goes to memory and back.
KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
  jax.checkpoint_policies.dots_saveable,
  jax.checkpoint_policies.save_only_these_names('attention'),
)


def chain(
  make: Callable[[str], nn.Module],
  name: str,
  length: int,
  h: jax.Array,
  xs: Any,
  *args: jax.Array,
  scan: bool,
  remat: bool,
) -> tuple[jax.Array, Any]:
  """Passes h through `length` blocks: h, y_i = make(name with i for its star)(h, x_i, *args).

  Args:
    make: a block by the name of its parameters, which has one star or one number.
    name: such as 'down_*'.
    length: of the chain.
    h: what the blocks pass on, of one shape and dtype throughout.
    xs: arrays, all of one shape, that the blocks read in turn, as another chain or `last_first`
      returned them: stacked if `scan`, else a list. None: x_i is None.
    *args: what every block reads.
    scan: compiles one block, in a loop, instead of `length` of them.
    remat: computes a block again in the gradient, instead of keeping the results of its products,
      from which the rest is computed again in any case.

  Returns:
    The last h, and the y of all blocks, stacked if `scan`, else in a list.
  """

  def run(block, h, x, *args):
    return block(h, x, *args)

  # Where a loop keeps the two computations apart nothing else has to; unrolled, XLA merges again
  # what it would rather keep than compute twice, unless `remat` forbids.
  run = nn.remat(run, prevent_cse=remat and not scan, policy=None if remat else KEEP_PRODUCTS)
  if scan:
    axes = dict(variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True})
    run = nn.scan(run, in_axes=(0, *(nn.broadcast for _ in args)), length=length, **axes)
    return run(make(name), h, xs, *args)
  ys = []
  for i in range(length):
    h, y = run(make(numbered(name, i)), h, None if xs is None else xs[i], *args)
    ys.append(y)
  return h, ys


def last_first(first: jax.Array, rest: Any) -> Any:
  """Returns `first` and a chain's outputs `rest` in reverse, for a chain that reads them back."""
  if isinstance(rest, list):
    return [first, *rest][::-1]
  return jnp.concatenate([first[None], rest])[::-1]


def numbered(name: str, i: int) -> str:
  """Returns the name with i for its star: 'down_3' for ('down_*', 3)."""
  return name.replace('*', str(i))


def stacked_names(names: Iterable[str]) -> set[str]:
  """Returns those dict keys that hold stacked parameters."""
  return {name for name in names if '*' in name}


def stack(tree: Any, names: Iterable[str], join: Callable = lambda *leaves: jnp.stack(leaves)):
  """Joins the parts name_0, name_1, ... of a pytree to name_*, with a leading axis, bit for bit.

  Args:
    tree: a pytree; wherever in it a dict has all of `names` with 0 for their stars, these are
      stacked. It may be parameters, averages, moments of an optimizer, or all of them.
    names: such as {'down_*', 'up_*'}.
    join: what makes one leaf of many.
  """
  names = tuple(names)
  if not names:
    return tree

  def has_groups(node):
    return isinstance(node, dict) and {numbered(name, 0) for name in names} <= node.keys()

  def stack_groups(node):
    if not has_groups(node):
      return node
    node = dict(node)
    for name in names:
      parts = itertools.takewhile(node.__contains__, (numbered(name, i) for i in itertools.count()))
      node[name] = jax.tree.map(join, *[node.pop(part) for part in list(parts)])
    return node

  return jax.tree.map(stack_groups, tree, is_leaf=has_groups)


def unstack(tree: Any, take: Callable = lambda leaf, i: leaf[i]):
  """Undoes `stack`: returns every name_* of a pytree as name_0, name_1, ...

  Args:
    tree: a pytree; in any dict of it keys may have a star. A part without arrays, as in an
      optimizer's state of other parameters, is as long as those of its name elsewhere.
    take: what picks the i-th of a leaf.
  """
  lengths: dict[str, int] = {}

  def has_groups(node):
    return isinstance(node, dict) and bool(stacked_names(node))

  def measure(node):
    for name in stacked_names(node) if has_groups(node) else ():
      for leaf in jax.tree.leaves(node[name])[:1]:
        lengths[name] = leaf.shape[0]

  def unstack_groups(node):
    if not has_groups(node):
      return node
    node = dict(node)
    for name in stacked_names(node):
      group = node.pop(name)
      for i in range(lengths[name]):
        node[numbered(name, i)] = jax.tree.map(lambda leaf, i=i: take(leaf, i), group)
    return node

  jax.tree.map(measure, tree, is_leaf=has_groups)
  return jax.tree.map(unstack_groups, tree, is_leaf=has_groups)
