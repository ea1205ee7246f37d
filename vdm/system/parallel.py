"""Devices and hosts: one mesh, and the two ways to run the one train step over it."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ('data', 'fsdp')  # the batch is split over every device of the mesh


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] = ()) -> Mesh:
  """Returns the mesh (data, fsdp) of all devices of all hosts, or of these."""
  return Mesh(np.asarray(devices or jax.devices()).reshape(-1, fsdp), BATCH_AXES)


def abstract_mesh(data: int, fsdp: int, device: AbstractDevice | None = None) -> AbstractMesh:
  """Returns the mesh (data, fsdp) of devices that are not here, to trace for.

  As with `make_mesh` the compiler divides the work, which an AbstractMesh leaves to the program by
  default from JAX 0.12 on.
  """
  types = (AxisType.Auto,) * len(BATCH_AXES)
  return AbstractMesh((data, fsdp), BATCH_AXES, axis_types=types, abstract_device=device)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that puts the whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Returns the sharding that splits an axis, the first by default, over all devices."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def on_host(tree: Any) -> Any:
  """Returns arrays as NumPy's, whole on every process; call it on all of them."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def state_sharding(mesh: Mesh, abstract_state: Any) -> Any:
  """Splits each array's largest axis over `fsdp` where it divides; all else is replicated."""
  fsdp = mesh.shape['fsdp']

  def spec(leaf):
    axes = [None] * leaf.ndim
    divisible = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
    if fsdp > 1 and leaf.ndim > 1 and divisible:
      axes[max(divisible, key=lambda i: leaf.shape[i])] = 'fsdp'
    return NamedSharding(mesh, PartitionSpec(*axes))

  return jax.tree.map(spec, abstract_state)


def abstract_state(mesh: Mesh, init: Callable[[], Any]) -> Any:
  """Returns what init() would return, as shapes with shardings: nothing is computed."""
  shapes = jax.eval_shape(init)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    state_sharding(mesh, shapes),
  )


def initial_state(mesh: Mesh, init: Callable[[], Any]) -> Any:
  """Returns init(), computed and placed in its shards at once: never whole on one device."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, init))
  return jax.jit(init, out_shardings=shardings)()


def jit(function: Callable, mesh: Mesh | AbstractMesh, **kwargs) -> Callable:
  """Returns jax.jit of a function that can ask `jax.sharding.get_abstract_mesh()` for its mesh."""
  abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh

  @functools.wraps(function)
  def on_mesh(*args):
    with jax.sharding.use_abstract_mesh(abstract):
      return function(*args)

  return jax.jit(on_mesh, **kwargs)


def to_devices(mesh: Mesh, batch: Any) -> Any:
  """Returns a batch, of which every host holds its rows, as one global array over the mesh."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
  )


def prefetch(batches: Iterable[Any], put: Callable[[Any], Any], depth: int = 2) -> Iterator[Any]:
  """Yields put(batch) of each batch, made by a thread that stays `depth` batches ahead of its use.

  Neither may run a collective: hosts would not agree on its place among those of the caller.
  """
  batches, done, thread = iter(batches), object(), ThreadPoolExecutor(1)

  def fetch():
    batch = next(batches, done)
    return batch if batch is done else put(batch)

  try:
    queue = collections.deque(thread.submit(fetch) for _ in range(depth))
    while (batch := queue.popleft().result()) is not done:
      queue.append(thread.submit(fetch))
      yield batch
  finally:  # nobody who is interrupted waits for the data
    thread.shutdown(wait=False, cancel_futures=True)
