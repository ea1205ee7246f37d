"""The processes and cores of a job: how they join, and what they keep."""

import concurrent.futures
import ctypes
import os
from collections.abc import Callable

import jax
from absl import logging

from vdm.system import files
from vdm.system.stopping import stop

MOST_CORES = 8  # used as devices: with more, little of a batch is left to each, and of the memory
CPU_FLAGS = {
  # seconds until XLA aborts the process because one of its devices is behind the others: 40 without
  '--xla_cpu_collective_call_terminate_timeout_seconds': '3600',
  # with it, two devices may meet collectives in different orders, and wait for each other for ever
  '--xla_cpu_enable_concurrency_optimized_scheduler': 'false',
}
JOIN_SECONDS = 300  # that processes of a job may start apart
EXIT_LOST = 134  # as JAX ends a process whose job has lost another one


def initialize(
  coordinator: str, num_processes: int | None, process_id: int | None, heartbeat_seconds: int
):
  """Joins the processes of one job; call it before anything asks JAX for a device.

  JAX itself finds the jobs of Cloud TPU, GKE, SLURM and Open MPI; if it finds none, this process
  is alone, as is the one task of a SLURM job, which JAX would give one GPU of its node. A job that
  is started by hand says its coordinator, num_processes and process_id; num_processes=1 and no
  coordinator looks for no job.

  Processes may start JOIN_SECONDS apart; what waits longer ends with EXIT_LOST, in one line. Once
  all are there, JAX ends every process (SIGABRT, status 134) when one has been silent for
  `heartbeat_seconds`, wherever the others wait for it.

  Raises:
    ValueError: the arguments do not name one process of a job.
  """
  _check_job(coordinator, num_processes, process_id, heartbeat_seconds)
  if num_processes == 1:  # nobody is to be told of a signal, which JAX would take over
    jax.config.update('jax_enable_preemption_service', False)
  job = dict(heartbeat_timeout_seconds=heartbeat_seconds)
  job |= dict(initialization_timeout=JOIN_SECONDS + 60)  # when JAX aborts, in a hundred lines
  if coordinator:
    by_hand = dict(coordinator_address=coordinator, cluster_detection_method='deactivate')
    job |= dict(num_processes=num_processes, process_id=process_id) | by_hand
    logging.info('process %d of %d joins %s', process_id, num_processes, coordinator)
  elif num_processes == 1 or _is_only_task():
    return
  try:
    # until all are there JAX waits in C++, where no signal is heard: not in the main thread
    with stop.joining(), concurrent.futures.ThreadPoolExecutor(1) as other:
      joined = other.submit(jax.distributed.initialize, **job)
      if not concurrent.futures.wait([joined], JOIN_SECONDS).done:
        logging.error(
          'the other processes of the job have not come within %d s; see what they say, or start '
          'them all again.',
          JOIN_SECONDS,
        )
        os._exit(EXIT_LOST)
      joined.result()
      stop.joined()
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


def _is_only_task() -> bool:
  """Returns whether this is the one task of a SLURM job, and none of those that mpirun starts."""
  environment = os.environ
  return environment.get('SLURM_NTASKS') == '1' and 'OMPI_MCA_orte_hnp_uri' not in environment


def _check_job(
  coordinator: str, num_processes: int | None, process_id: int | None, heartbeat_seconds: int
):
  """Raises ValueError if the flags of the same names do not belong together."""
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
  """Makes a CPU as many devices as it has cores; fewer if `works` of their number is false.

  XLA:CPU runs much of a step on one core, such as convolutions with 64 output channels or fewer;
  devices run side by side. Call it before anything asks JAX for a device. It has no effect on
  accelerators, in a job that JAX has joined, and where $JAX_NUM_CPU_DEVICES or XLA's
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
  more = [f'{name}={value}' for name, value in CPU_FLAGS.items() if name not in xla_flags]
  os.environ['XLA_FLAGS'] = ' '.join([xla_flags, *more]).strip()


def keep_compiled():
  """Keeps what took a second or more to compile in the user's cache, for the next start of a run.

  Not in the workdir: JAX runs what it finds there, and a workdir may be a stranger's.
  $JAX_COMPILATION_CACHE_DIR comes first. The directory is made when there is something to keep.
  Of several processes JAX has the first one alone write: where each has a disk of its own the
  others would compile what it does not, and on GPUs those that compile wait for all to measure
  kernels. So they keep nothing but in $JAX_COMPILATION_CACHE_DIR, on a disk that they share.
  """
  alone = not jax.distributed.is_initialized() or jax.process_count() == 1
  if alone and not jax.config.jax_compilation_cache_dir:
    directory = files.absolute(files.cache_folder() / 'xla')
    jax.config.update('jax_compilation_cache_dir', str(directory))


def give_back_memory():
  """Returns the memory that was freed to the system, where the C library keeps it (glibc).

  An evaluation frees hundreds of megabytes in pieces among others that stay, and glibc gives back
  only what lies at an end of its heaps: the process would grow for hours without holding more.
  """
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim is not None:
    trim(0)
