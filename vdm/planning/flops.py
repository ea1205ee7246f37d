"""Multiplications of matrices in a traced program."""

import math
from typing import NamedTuple

from jax.extend import core


class Matmuls(NamedTuple):
  """Counts all matrix products and convolutions."""

  flops: float = 0.0
  bytes: float = 0.0  # of operands and results

  def plus(self, other: 'Matmuls', times: float = 1) -> 'Matmuls':
    return Matmuls(*(a + times * b for a, b in zip(self, other, strict=True)))


def matmuls(jaxpr: core.Jaxpr, platform: str) -> Matmuls:
  """Counts the matrix products and convolutions of one run of `jaxpr`, over all devices.

  Of what depends on the platform, `platform`'s branch counts; of any other choice the most
  expensive. The body of a `while` of unknown length counts once; products with a convolution's
  padding count.
  """
  total = Matmuls()
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name in ('dot_general', 'conv_general_dilated'):
      arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
      flops = 2 * arrays[-1].size * _products(eqn)
      total = total.plus(Matmuls(flops, sum(a.size * a.dtype.itemsize for a in arrays)))
    elif name == 'scan':
      total = total.plus(matmuls(params['jaxpr'].jaxpr, platform), params['length'])
    elif name == 'cond':
      branches = [matmuls(branch.jaxpr, platform) for branch in params['branches']]
      platforms = params.get('branches_platforms')
      if platforms:  # None: all others
        chosen = next(i for i, names in enumerate(platforms) if not names or platform in names)
        branches = branches[chosen : chosen + 1]
      total = total.plus(max(branches))
    else:
      times = math.prod(params['grid_mapping'].grid) if name == 'pallas_call' else 1
      times *= params['mesh'].size if name == 'shard_map' else 1  # inside is one device's part
      for inner in core.jaxprs_in_params(params):
        total = total.plus(matmuls(inner, platform), times)
  return total


def _products(eqn) -> int:
  """Returns the multiplications for one element of what a matrix product or convolution gives."""
  left, right = (v.aval.shape for v in eqn.invars)
  if eqn.primitive.name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    return math.prod(left[i] for i in contracted)
  _, of_inputs, *of_space = eqn.params['dimension_numbers'].rhs_spec
  return right[of_inputs] * math.prod(right[i] for i in of_space)
