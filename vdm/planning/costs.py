"""Counts what a jitted step costs on a slice of TPUs, a node of GPUs or the devices at hand.

For TPUs XLA's compiler, which needs no TPU, says what the program takes (`vdm.planning.programs`).
For others nothing is compiled: FLOPs are counted all the same, memory and traffic are estimated.
"""

import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from vdm.planning import flops as flops_lib
from vdm.planning import hlo
from vdm.planning.chips import GPUS, TPUS, Chip, of_kind
from vdm.planning.programs import Program
from vdm.system import parallel

# libtpu would ask Google's cloud for these, and complain where it is not there.
LIBTPU = {
  'TPU_SKIP_MDS_QUERY': '1',  # elsewhere it waits for nothing
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # no chip is taken: plans may run at once
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',  # any: the topology is given
}

# An H100 took 1.2 to 1.5 times the memory that is counted for a step (benchmarks/H100.md).
BEYOND = 1.3


class Target(NamedTuple):
  """Says where a run is planned to be."""

  name: str  # as it was typed: 'v5e:2x4'
  chip: Chip | None  # None: a device that no table has
  mesh: Mesh | AbstractMesh
  platform: str


class Step(NamedTuple):
  """Holds a jitted function of a run."""

  name: str
  function: Callable
  args: tuple  # abstract, with shardings
  images: int  # of one call, over all devices
  calls_per_batch: int  # until these images are done
  calls: int  # in all
  residuals: Callable[[], float] | None = None  # bytes a device keeps for the gradient, unfused
  gradient_bytes: int = 4  # of a number of the gradient, as devices exchange it


class Cost(NamedTuple):
  """Holds what one call of a step costs on one device; None stands for what is not known."""

  flops: float
  traffic: float | None = None
  collectives: dict[str, tuple[int, float]] | None = None
  temporaries: float | None = None
  memory: float | None = None  # in all
  limit: float | None = None  # what the compiler allows, where the program exceeds it
  seconds: float | None = None  # of a whole compilation
  accessed: float | None = None  # bytes by XLA's own count: loops once, on-chip memory included


def num_devices(topology: str) -> int:
  """Returns the number of devices of --topology; if empty, of those at hand."""
  if not topology:
    return jax.device_count()
  kind, _, size = topology.partition(':')
  shape = r'[1-9]\d*' if kind in GPUS else r'[1-9]\d*(x[1-9]\d*){1,2}'
  if kind not in {**GPUS, **TPUS} or not re.fullmatch(shape, size):
    raise ValueError(
      f'--topology={topology} must be {", ".join(TPUS)} with a shape, or {", ".join(GPUS)} with a '
      'number; try v5e:2x4 or h100:8.'
    )
  return math.prod(map(int, size.split('x')))


def target(topology: str, fsdp: int) -> Target:
  """Returns what --topology names, 'v5e:8x8' or 'h100:8'; if empty, the devices at hand."""
  if not topology:
    name = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    chip = of_kind(jax.devices()[0].device_kind)
    return Target(name, chip, parallel.make_mesh(fsdp), jax.default_backend())
  kind = topology.partition(':')[0]
  if kind in GPUS:
    mesh = parallel.abstract_mesh(num_devices(topology) // fsdp, fsdp)
    return Target(topology, GPUS[kind], mesh, 'gpu')
  return Target(topology, TPUS[kind], parallel.make_mesh(fsdp, tpu_devices(topology)), 'tpu')


def tpu_devices(topology: str) -> list[jax.Device]:
  """Returns the devices of a slice that is not here, one per chip, to compile for."""
  from jax.experimental import topologies

  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f"--topology={topology} needs XLA's TPU compiler; pip install 'vdm-jax[tpu]', also without a "
      'TPU.'
    )
  for name, value in LIBTPU.items():
    os.environ.setdefault(name, value)
  # libtpu would count the two cores of a v4 apart; on a TPU JAX sees the chip
  as_one = {'chip_config_name': 'megacore'} if topology.startswith('v4:') else {}
  try:
    return list(topologies.get_topology_desc(topology, 'tpu', **as_one).devices)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'--topology={topology} must be a slice that exists ({str(error).splitlines()[0]}); '
      'try v5e:2x4, v5e:8x8, v4:2x2x2 or v5p:2x2x2.'
    ) from error


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes that abstract arrays with shardings take on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if isinstance(leaf, jax.ShapeDtypeStruct)
  )


def cost(step: Step, where: Target, program: Callable[[], Program] | None = None) -> Cost:
  """Returns a step's cost: FLOPs counted in its jaxpr, all else of its program, or estimated.

  Args:
    step: whose cost it is.
    where: the devices.
    program: returns what XLA made of the step, and is called once FLOPs are counted.
  """
  traced = step.function.trace(*step.args)
  devices = where.mesh.size
  matmuls = flops_lib.matmuls(traced.jaxpr.jaxpr, where.platform)
  flops = matmuls.flops / devices
  if program:
    found = program()
    traffic = hlo.traffic(found.text, devices) if found.text else hlo.Traffic(None, None)
    return Cost(flops, *traffic, *found[1:])
  arguments = bytes_per_device(step.args)
  residuals = step.residuals() if step.residuals else 0
  moved = matmuls.bytes / devices + (2 if residuals else 1) * arguments
  if not residuals:
    return Cost(flops, moved, {})
  params = bytes_per_device(step.args[0].params)
  temporaries = BEYOND * (residuals + params)  # and the gradient
  collectives = gradient_exchange(params * step.gradient_bytes / 4, where.mesh)
  return Cost(flops, moved, collectives, temporaries, arguments + temporaries)


def gradient_exchange(params: float, mesh: Mesh | AbstractMesh) -> dict[str, tuple[int, float]]:
  """Returns what a device sends for the gradients of its `params`, which take so many bytes.

  With fsdp the shards are gathered forward and backward, and gradients scattered.
  """
  fsdp, replicas = mesh.shape['fsdp'], mesh.shape['data']
  sent = {}
  if fsdp > 1:
    sent['all-gather'] = 2, 2 * params * (fsdp - 1)
    sent['reduce-scatter'] = 1, params * (fsdp - 1)
  if replicas > 1:
    sent['all-reduce'] = 1, 2 * params * (replicas - 1) / replicas
  return sent


def roofline(chip: Chip, dtype: str, cost: Cost) -> dict[str, float]:
  """Returns the seconds at the chip's peak; what the greatest belongs to binds."""
  sent = sum(size for _, size in cost.collectives.values())
  return {
    'arithmetic': cost.flops / chip.flops(dtype),
    'HBM': cost.traffic / chip.hbm_bandwidth,
    'links': sent / chip.link_bandwidth,
  }
