"""Gets what XLA's TPU compiler makes of a step: the program, and the memory that it takes.

Most of a compilation for TPUs is the generation of code for a program whose memory and traffic are
settled (docs/plans.md). The compiler cannot be told to stop before, so a process of its own
compiles, which is ended once the program is written.
"""

import contextlib
import multiprocessing
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

POLL_SECONDS = 0.3
COMPILERS = 2  # processes at once, each of about one core
# Files of XLA's dump, in the order in which they are written.
MEMORY = '*.after_optimizations-buffer-assignment.txt'
TEXT = '*.after_optimizations.txt'
LAST = '*.after_optimizations_after_buffer_assignment.txt'
ERROR = 'error'
REMEDY = 'plans have been made with libtpu 0.0.42, 0.0.50 and 0.0.52: install one of them'


class Program(NamedTuple):
  """Holds what a compiled program takes on one device; None stands for what is not known."""

  text: str = ''  # HLO, on which `hlo.traffic` counts
  temporaries: float | None = None
  memory: float | None = None  # in all
  limit: float | None = None  # what the compiler allows, where the program exceeds it
  seconds: float | None = None  # of a whole compilation
  accessed: float | None = None  # bytes by XLA's own count: loops once, on-chip memory included


def compiled(lowered: jax.stages.Lowered) -> Program:
  """Returns the program of a whole compilation, in this process.

  Raises:
    RuntimeError: it failed, and not for want of the device's memory, or wrote no program.
  """
  with tempfile.TemporaryDirectory() as name:
    folder, start = pathlib.Path(name), time.perf_counter()
    found = _compile(lowered, folder)
    seconds = time.perf_counter() - start
    program = _program(folder)._replace(seconds=seconds)
    return program._replace(accessed=found.cost_analysis()['bytes accessed']) if found else program


def optimised(lower: Callable[..., jax.stages.Lowered], *args) -> Program:
  """Returns the program before code is generated, by a process that is ended then.

  Args:
    lower: a function of a module, called in the other process.
    *args: its arguments, which can be pickled.

  Raises:
    RuntimeError: the other process failed, and not for want of the device's memory, or wrote no
      program.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    context = multiprocessing.get_context('spawn')  # threads of JAX do not survive a fork
    process = context.Process(target=_compile_here, args=(folder, lower, args), daemon=True)
    process.start()
    try:
      while process.is_alive() and not _is_written(folder):
        process.join(POLL_SECONDS)
    finally:
      process.kill()
      process.join()
    written = list(folder.glob(LAST)) or (folder / ERROR).exists()
    if process.exitcode and not written:
      raise RuntimeError(
        f'the process that compiles ended with status {process.exitcode} before the program was '
        'written; -9 is mostly want of memory on this machine.'
      )
    return _program(folder)


@contextlib.contextmanager
def compilers() -> Iterator[ThreadPoolExecutor]:
  """Yields threads that call `optimised`; whatever they have left at the end is dropped."""
  pool = ThreadPoolExecutor(COMPILERS)
  try:
    yield pool
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
      process.kill()


def _compile_here(folder: pathlib.Path, lower: Callable, args: tuple):
  """Compiles in the other process, which ends with the one that asked, however that ends."""
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _compile(lower(*args), folder)


def _end_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)


def _compile(lowered: jax.stages.Lowered, folder: pathlib.Path) -> jax.stages.Compiled | None:
  """Compiles, and has the program written into the folder; or the error, and returns None."""
  options = {'xla_dump_to': str(folder), 'xla_dump_hlo_as_text': True}
  enabled = jax.config.jax_enable_compilation_cache
  # what is found in the cache is not written, and only a device could read it
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # it has decided once for all, else
  try:
    return lowered.compile(options)
  except jax.errors.JaxRuntimeError as error:
    (folder / ERROR).write_text(str(error))
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


def _program(folder: pathlib.Path) -> Program:
  """Returns what is written in the folder."""
  if (folder / ERROR).exists():
    used, limit = exceeded((folder / ERROR).read_text())
    return Program(memory=used, limit=limit)
  found = [next(folder.glob(pattern), None) for pattern in (TEXT, MEMORY)]
  if None in found:
    raise RuntimeError(f'this libtpu has written no program; {REMEDY}.')
  text, buffers = (path.read_text() for path in found if path)
  return Program(text, *assigned(buffers))


def _is_written(folder: pathlib.Path) -> bool:
  """Returns whether the program is there, and no longer grows."""
  sizes = lambda: [path.stat().st_size for path in sorted(folder.glob('*.after_optimizations*'))]
  if not list(folder.glob(LAST)):
    return False
  before = sizes()
  time.sleep(POLL_SECONDS)
  return all(before) and sizes() == before


def assigned(text: str) -> tuple[float, float]:
  """Returns a program's temporaries, and its memory in all, in bytes, by XLA's buffers.

  Arguments, results and temporaries in HBM are counted, not constants, nor what is on the chip,
  whose allocations have a color.

  Raises:
    RuntimeError: no argument, result or temporary is found.
  """
  sizes = {'parameter': 0, 'live-out': 0, 'preallocated-temp': 0}
  for size, rest in re.findall(r'^allocation \d+: size (\d+), (?!color)(.*)', text, re.M):
    kind = next((kind for kind in sizes if kind in rest), None)  # what is both is a parameter
    if kind:
      sizes[kind] += int(size)
  if not any(sizes.values()):
    raise RuntimeError(f'this libtpu writes its buffers in a way that is not known; {REMEDY}.')
  return sizes['preallocated-temp'], sum(sizes.values())


def exceeded(message: str) -> tuple[float, float]:
  """Returns what the compiler says that a program takes and may take, in bytes.

  It says 'Used 20.5G of 15.75G hbm', of all of it, or, of temporaries alone, '(54.47G) exceeds
  available HBM (15.75G)'. Any other error is not ours, and is raised.
  """
  found = re.search(r'Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm', message) or re.search(
    r'\(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)', message
  )
  if not found:
    raise RuntimeError(message)
  unit = {'K': 2**10, 'M': 2**20, 'G': 2**30}
  return float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
