"""Devices and hosts: one mesh, and the two ways to run the one train step over it."""

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vdm import files

BATCH_AXES = ('data', 'fsdp')  # the batch is split over every device of the mesh
MOST_CORES = 8  # used as devices: with more, little of a batch is left to each, and of the memory
# Seconds until XLA aborts the process because one of its devices is behind the others: 40 without.
PATIENCE = '--xla_cpu_collective_call_terminate_timeout_seconds'


def initialize(
  coordinator: str, num_processes: int | None, process_id: int | None, heartbeat_seconds: int
):
  """Joins the processes of one job; to be called before anything asks JAX for a device.

  JAX itself finds the jobs of Cloud TPU, GKE, SLURM and Open MPI; where it finds none, this process
  is alone. A job that is started by hand says its coordinator, num_processes and process_id;
  num_processes=1 and no coordinator looks for no job.

  From then on JAX ends every process (SIGABRT, status 134) once one has been silent for
  `heartbeat_seconds`, wherever the others wait for it.

  Raises:
    ValueError: the arguments do not name one process of a job.
  """
  _check_job(coordinator, num_processes, process_id, heartbeat_seconds)
  job = dict(heartbeat_timeout_seconds=heartbeat_seconds)
  if coordinator:
    by_hand = dict(coordinator_address=coordinator, cluster_detection_method='deactivate')
    job |= dict(num_processes=num_processes, process_id=process_id) | by_hand
    logging.info('process %d of %d joins %s', process_id, num_processes, coordinator)
  elif num_processes == 1:
    return
  try:
    jax.distributed.initialize(**job)
  except ValueError as error:
    if 'coordinator_address should be defined' not in str(error):  # JAX for: found no job
      raise
    return
  if jax.process_count() > 1:
    logging.info(
      'process %d of %d; the job ends when one is silent for %d s',
      jax.process_index(),
      jax.process_count(),
      heartbeat_seconds,
    )


def _check_job(
  coordinator: str, num_processes: int | None, process_id: int | None, heartbeat_seconds: int
):
  """Raises ValueError where the flags of the same names do not belong together."""
  if heartbeat_seconds < 1:
    raise ValueError(f'--heartbeat_seconds={heartbeat_seconds} must be at least 1; try 100.')
  if not coordinator:
    if process_id is not None or num_processes not in (None, 1):
      given = f'{num_processes=}' if process_id is None else f'{process_id=}'
      raise ValueError(
        f'--{given} needs --coordinator=host:port; leave both out where JAX finds the job itself.'
      )
    return
  host, _, port = coordinator.rpartition(':')
  if not (host and port.isdigit()):
    raise ValueError(f'--coordinator={coordinator} must be host:port; try {host or port}:8476.')
  if num_processes is None or process_id is None:
    raise ValueError(
      f'--coordinator={coordinator} needs --num_processes and --process_id, the same command on '
      'each process but for --process_id=0, 1, ...'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id} must be in 0 .. --num_processes={num_processes} - 1; '
      'start each process with its own.'
    )


def use_cores(works: Callable[[int], bool]):
  """Makes a CPU as many devices as it has cores; fewer where `works` of their number is false.

  XLA:CPU runs much of a step on one core, such as convolutions with 64 output channels or fewer;
  devices run side by side. To be called before anything asks JAX for a device, and without effect
  on accelerators, in a job that JAX has joined, and where $JAX_NUM_CPU_DEVICES or XLA's
  --xla_force_host_platform_device_count has a number already.
  """
  xla_flags = os.environ.get('XLA_FLAGS', '')
  in_flags = '--xla_force_host_platform_device_count' in xla_flags
  if in_flags or jax.config.jax_num_cpu_devices > 0 or jax.distributed.is_initialized():
    return
  pinned = hasattr(os, 'sched_getaffinity')  # not on macOS
  cores = len(os.sched_getaffinity(0)) if pinned else os.cpu_count() or 1
  numbers = filter(works, range(1, min(cores, MOST_CORES) + 1))
  jax.config.update('jax_num_cpu_devices', max(numbers, default=1))
  if PATIENCE not in xla_flags:
    os.environ['XLA_FLAGS'] = f'{xla_flags} {PATIENCE}=3600'.strip()


def keep_compiled(directory: epath.Path):
  """Keeps what took a second or more to compile in `directory`, for the next start of a run.

  $JAX_COMPILATION_CACHE_DIR, or what an earlier call said, comes first. The directory is made when
  there is something to keep.
  """
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(files.absolute(directory)))


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] = ()) -> Mesh:
  """All devices of all hosts, or these, as (data, fsdp)."""
  return Mesh(np.asarray(devices or jax.devices()).reshape(-1, fsdp), BATCH_AXES)


def abstract_mesh(data: int, fsdp: int, device: AbstractDevice | None = None) -> AbstractMesh:
  """The mesh (data, fsdp) of devices that are not here, to trace for.

  As with `make_mesh` the compiler divides the work, which an AbstractMesh leaves to the program by
  default from JAX 0.12 on.
  """
  types = (AxisType.Auto,) * len(BATCH_AXES)
  return AbstractMesh((data, fsdp), BATCH_AXES, axis_types=types, abstract_device=device)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis split over all devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


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
  """What init() would return, as shapes with shardings: nothing is computed."""
  shapes = jax.eval_shape(init)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    state_sharding(mesh, shapes),
  )


def initial_state(mesh: Mesh, init: Callable[[], Any]) -> Any:
  """init(), computed and placed in its shards at once: never whole on one device."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, init))
  return jax.jit(init, out_shardings=shardings)()


def jit(function: Callable, mesh: Mesh | AbstractMesh, **kwargs) -> Callable:
  """jax.jit, of a function that can ask `jax.sharding.get_abstract_mesh()` for its mesh."""
  abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh

  @functools.wraps(function)
  def on_mesh(*args):
    with jax.sharding.use_abstract_mesh(abstract):
      return function(*args)

  return jax.jit(on_mesh, **kwargs)


def to_devices(mesh: Mesh, batch: Any) -> Any:
  """A batch of which every host holds its rows, as one global array over the mesh."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
  )


def prefetch(batches: Iterable[Any], put: Callable[[Any], Any], depth: int = 2) -> Iterator[Any]:
  """put(batch) of each batch, in a thread that stays `depth` batches ahead of the one in use.

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


class Runner(NamedTuple):
  """How a train step runs: what it takes, the step itself, and the state back as the mesh's."""

  put_batch: Callable[[Any], Any]
  put_state: Callable[[Any], Any]
  step: Callable[[Any, Any], tuple[Any, Any]]  # (state, batch) -> (state, metrics); donates state
  get_state: Callable[[Any], Any]
  get_metrics: Callable[[Any], Any]


def jit_runner(step: Callable, mesh: Mesh, abstract: Any) -> Runner:
  """jit over the mesh: the step sees the global batch."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  compiled = jit(
    step,
    mesh,
    donate_argnums=0,
    in_shardings=(shardings, batch_sharding(mesh)),
    out_shardings=(shardings, replicated(mesh)),
  )
  same = lambda tree: tree
  return Runner(lambda batch: to_devices(mesh, batch), same, compiled, same, jax.device_get)


def pmap_runner(step: Callable, mesh: Mesh) -> Runner:
  """pmap: each device sees its rows of the batch, and means are taken over the devices' axis.

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

  return Runner(put_batch, put_state, mapped, get_state, get_metrics)


def runner(mode: str, step: Callable, mesh: Mesh, abstract: Any) -> Runner:
  """config.parallel.mode: 'jit' or 'pmap'."""
  return jit_runner(step, mesh, abstract) if mode == 'jit' else pmap_runner(step, mesh)
