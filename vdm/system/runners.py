"""How a train step runs: by jit over a mesh, or by pmap."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vdm.system.parallel import batch_sharding, jit, replicated, to_devices

# Steps that are under way at most: an accelerator waits for none, and XLA:CPU, whose devices share
# as many threads as there are cores, may wait for ever where more are than it lets in (32).
AHEAD = 16


class Runner(NamedTuple):
  """Holds how a train step runs: what it takes, the step, and the state back as the mesh's.

  Attributes:
    put_batch: a host's rows of a batch -> what the step takes.
    put_state: the mesh's state -> what the step takes.
    step: (state, batch) -> (state, metrics); it may donate the state, and waits for the step AHEAD
      before it.
    program: the same by itself, which JAX can lower and compile.
    get_state: the step's state -> the mesh's.
    get_metrics: the step's metrics -> the host's.
  """

  put_batch: Callable[[Any], Any]
  put_state: Callable[[Any], Any]
  step: Callable[[Any, Any], tuple[Any, Any]]
  program: Any
  get_state: Callable[[Any], Any]
  get_metrics: Callable[[Any], Any]


def bounded(step: Callable) -> Callable:
  """Returns a step of (state, batch) -> (state, metrics) that waits for the one AHEAD before it."""
  under_way: collections.deque[jax.Array] = collections.deque()

  def call(state, batch):
    if len(under_way) == AHEAD:
      under_way.popleft().block_until_ready()
    state, metrics = step(state, batch)
    under_way.append(jax.tree.leaves(metrics)[0])
    return state, metrics

  return call


def jit_runner(step: Callable, mesh: Mesh, abstract: Any, donate: bool = True) -> Runner:
  """Returns jit over the mesh: the step sees the global batch, and with `donate` eats the state."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  compiled = jit(
    step,
    mesh,
    donate_argnums=(0,) if donate else (),
    in_shardings=(shardings, batch_sharding(mesh)),
    out_shardings=(shardings, replicated(mesh)),
  )
  same = lambda tree: tree
  put_batch = lambda batch: to_devices(mesh, batch)
  return Runner(put_batch, same, bounded(compiled), compiled, same, jax.device_get)


def pmap_runner(step: Callable, mesh: Mesh) -> Runner:
  """Returns pmap: each device sees its rows of the batch, and means are over the devices' axis.

  The state has a leading device axis inside; it enters and leaves as the mesh's replicated arrays.
  """
  devices = list(mesh.devices.flat)
  local = [d for d in devices if d.process_index == jax.process_index()]
  mapped = jax.pmap(
    lambda state, batch: step(state, batch, axis_name='devices'),
    axis_name='devices',
    devices=devices,
    donate_argnums=0,
  )
  stacked = NamedSharding(Mesh(np.asarray(devices), ('devices',)), PartitionSpec('devices'))

  def put_batch(batch):
    def rows_by_device(rows):
      return rows.reshape(len(local), -1, *rows.shape[1:])

    return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(
        stacked, rows_by_device(np.asarray(rows))
      ),
      batch,
    )

  def put_state(state):
    def stack(leaf):
      shards = [s.data[None] for s in leaf.addressable_shards]
      return jax.make_array_from_single_device_arrays((len(devices), *leaf.shape), stacked, shards)

    return jax.tree.map(stack, state)

  def get_state(state):
    def unstack(leaf):
      shards = [s.data[0] for s in leaf.addressable_shards]
      return jax.make_array_from_single_device_arrays(leaf.shape[1:], replicated(mesh), shards)

    return jax.tree.map(unstack, state)

  def get_metrics(metrics):
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data)[0], metrics)

  return Runner(put_batch, put_state, bounded(mapped), mapped, get_state, get_metrics)


def runner(mode: str, step: Callable, mesh: Mesh, abstract: Any) -> Runner:
  """Returns the runner of config.parallel.mode, 'jit' or 'pmap'."""
  return jit_runner(step, mesh, abstract) if mode == 'jit' else pmap_runner(step, mesh)
