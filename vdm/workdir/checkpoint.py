"""Saves and restores `checkpoints/<step>` in the workdir of a run, by Orbax.

A checkpoint is two items: `state`, the arrays, and `manifest`, the metrics with the shape, dtype
and checksum of every leaf. Orbax itself notices a file that is missing or cut short, but neither it
nor TensorStore checks the array bytes, so a flipped bit would restore as a wrong weight.

Parameters are saved as they are, unrolled or stacked (`vdm.nn.blocks`): the manifest says which,
and a restore that wants the other layout converts, once the checksums of what was saved are right.
So a save moves nothing, and only a restore that changes the layout pays for it: it holds the state
twice for a moment.
"""

import itertools
import json
import math
import os
import types
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vdm.system import files
from vdm.workdir import integrity
from vdm.workdir.layouts import as_written, named

METRICS = 'bits_per_dim', 'nats_per_dim'  # by which checkpoints are ranked
# Devices share the work of saving a replicated array only if it is large: to slice it costs more.
_SHARED_BYTES = 2**20


class CheckpointManager(ocp.CheckpointManager):
  """Keeps Orbax from asking JAX about preemption, by the step: `stopping` does, by its calls."""

  def reached_preemption(self, step: int) -> bool:
    """Returns False: the loop says when to save."""
    del step
    return False


def manager(
  workdir: os.PathLike | str, keep: int | None = None, folder: str = 'checkpoints'
) -> CheckpointManager:
  """Opens `workdir/checkpoints`. Close it at the end: `close()` waits for the last save.

  Args:
    workdir: the run's directory.
    keep: how many of the newest checkpoints stay, besides the one with the best likelihood.
      None opens the directory for reading only, which is safe beside a run that writes there.
    folder: of the workdir.

  Raises:
    Damaged: what Orbax notes of a step is no JSON object.
  """
  if keep is not None and keep < 1:
    raise ValueError(f'config.checkpoint.keep={keep} must be at least 1.')
  directory = files.absolute(workdir) / folder

  def should_preserve(checkpoints, *, context):
    del context
    ranks = {c.step: _rank(directory, c.step, c.metrics) for c in checkpoints}
    kept = {*sorted(ranks)[-(keep or 0) :], _best(ranks)}
    return [c.step in kept for c in checkpoints]

  options = ocp.CheckpointManagerOptions(
    create=keep is not None,
    cleanup_tmp_directories=keep is not None,  # what a killed save left behind
    preservation_policy=types.SimpleNamespace(should_preserve=should_preserve),
  )
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SHARED_BYTES)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
  handlers = {
    'state': ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
    'manifest': ocp.JsonCheckpointHandler(),
  }
  notes = directory / '*' / '_CHECKPOINT_METADATA'  # Orbax's own, of each step
  try:
    return CheckpointManager(directory, options=options, item_handlers=handlers)
  except ValueError as error:
    remedy = 'remove the one that is no JSON object: it holds no array'
    raise files.Damaged(f'{notes} cannot be read ({error}); {remedy}.') from error


def save(
  manager: CheckpointManager, step: int, state: Any, metrics: Mapping[str, float] | None = None
) -> bool:
  """Starts to save `state`; returns False if `step` is there already.

  It returns once the arrays are copied; the checkpoint appears, whole, when all is written. A later
  call, or `manager.close()`, raises an error of writing.

  Args:
    manager: opened for writing.
    step: the training steps done.
    state: a pytree of arrays, the same on every process.
    metrics: of this very state, if it was evaluated; one of METRICS decides which checkpoint is
      the best, and one that is not finite, of an evaluation that failed, is kept as null.

  Raises:
    FloatingPointError: the state is not finite.
    NoSpace: there is no room for it.
  """
  if step in manager.all_steps():
    return False
  integrity.require_finite(state, step)
  files.require_space(manager.directory, size_of(state), 'checkpoints')
  found = _plain(metrics or {})
  leaves = {
    name: [*_signature(leaf), checksum]
    for (name, leaf), checksum in zip(named(state).items(), integrity.checksums(state), strict=True)
  }
  body = {'metrics': found, 'leaves': leaves}
  return manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.PyTreeSave(state),
      manifest=ocp.args.JsonSave(body | {'crc32': _crc32(body)}),
    ),
    metrics=found,
    force=True,  # at any step: the caller's loop knows when
  )


def size_of(state: Any) -> float:
  """Returns the bytes of a checkpoint of a state, abstract or not, and some room besides."""
  leaves = jax.tree.leaves(state)
  return 1.1 * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) + 2e6


def is_scored(manager: CheckpointManager, step: int) -> bool:
  """Returns whether the state of `step` was evaluated, to a finite end or not."""
  return any(name in METRICS for name in _metrics(manager.directory, step))


def score(manager: CheckpointManager, step: int, metrics: Mapping[str, float]):
  """Gives the checkpoint of `step` its metrics, which were measured after it was saved."""
  if jax.process_index() == 0:
    path = manager.directory / str(step)
    body = _manifest(path) | {'metrics': _plain(metrics)}
    files.write(path / 'manifest' / 'metadata', json.dumps(body | {'crc32': _crc32(body)}))


def latest_step(manager: CheckpointManager) -> int | None:
  """Returns the newest step, or None."""
  return manager.latest_step()


def best_step(manager: CheckpointManager) -> int | None:
  """Returns the step with the best likelihood, or None if no checkpoint has one."""
  manager.wait_until_finished()
  return _best({step: _rank(manager.directory, step) for step in manager.all_steps()})


def restore(
  manager: CheckpointManager,
  abstract_state: Any,
  step: int | None = None,
  set_aside: bool = True,
) -> tuple[Any, int] | None:
  """Reads the newest checkpoint that is whole, or exactly that of `step`.

  On the way to the newest whole one, broken ones are logged and then renamed `<step>.corrupt`: out
  of the way of the saves to come, and there to be looked at.

  Args:
    manager: opened for writing, where broken ones are renamed.
    abstract_state: a pytree of `jax.ShapeDtypeStruct` with the shardings wanted now.
    step: reads this one or fails, and renames nothing; None takes the newest.
    set_aside: whether broken ones are renamed, to go on from the one that is read.

  Returns:
    The state and its step, or None if there is no checkpoint yet.

  Raises:
    ValueError: `step` is not there or is broken, or there are checkpoints and all are broken, or
      the checkpoint is of another model.
  """
  manager.wait_until_finished()
  steps = sorted(manager.all_steps(), reverse=True)
  if step is not None and step not in steps:
    raise ValueError(f'{manager.directory} holds the steps {steps[::-1]}, not {step}.')
  broken: list[epath.Path] = []
  for candidate in steps if step is None else [step]:
    path = manager.directory / str(candidate)
    state, cause = _read(path, abstract_state)
    if not cause:
      _set_aside(manager, broken if set_aside else [])
      return state, candidate
    logging.warning('%s is broken and is passed over (%s).', path, cause)
    broken.append(path)
  if not broken:
    return None
  if step is not None:
    raise ValueError(f'{path} is broken ({cause}); put back a whole copy, or choose another step.')
  raise ValueError(
    f'{manager.directory} holds no checkpoint that can be restored, of {len(broken)} tried '
    f'({path.name}: {cause}); put back a whole copy, or choose another --workdir.'
  )


def _read(path: epath.Path, abstract_state: Any) -> tuple[Any, str]:
  """Returns the state at `path` and '', or None and what is wrong, the same on every process."""

  def checked_manifest():
    _check_files(path)
    return _manifest(path)

  manifest, cause = _attempt(checked_manifest)
  if cause:
    return None, cause
  written, convert = as_written(manifest['leaves'], abstract_state)
  _check_same_model(path, manifest['leaves'], named(written))
  # The handler itself, not the manager: on its way there is no barrier at which a process whose
  # part of the checkpoint is whole would wait for one that has failed.
  handler = ocp.StandardCheckpointHandler()
  state, cause = _attempt(
    lambda: handler.restore(path / 'state', args=ocp.args.StandardRestore(written))
  )
  if cause:
    return None, cause
  for name, checksum in zip(named(state), integrity.checksums(state), strict=True):
    if manifest['leaves'][name][-1] != checksum:
      return None, f'{name} differs from its checksum'
  if bad := integrity.not_finite(state):
    return None, f'{" and ".join(bad)} not finite'
  return convert(state), ''


def _attempt(read) -> tuple[Any, str]:
  """Returns the value of `read()` and '', or None and why it failed, here or on another process."""
  value, cause = None, ''
  try:
    value = read()
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise  # the machine's failure, not the checkpoint's
  except Exception as error:  # Orbax raises ValueError, KeyError, JSONDecodeError, bare Exception
    cause = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
  if multihost_utils.process_allgather(np.bool_(cause)).any():
    return None, cause or 'another process could not read its part'
  return value, ''


def _check_files(path: epath.Path) -> None:
  """Parses the JSON files and reads the last byte of every chunk of the arrays at `path`.

  Orbax finds a file that is cut or missing as well, but reads all arrays at once and, when one
  fails, leaves the others hanging: each then prints a traceback of its own. An object store never
  holds half a file, so only local paths are checked.
  """
  if jax.process_index() or '://' in str(path):
    return
  for file in (path / 'state' / '_METADATA', *(path / 'state' / 'array_metadatas').glob('*')):
    json.loads(file.read_text())
  base = {'driver': 'file', 'path': f'{path}/state/'}
  store = ts.KvStore.open({'driver': 'ocdbt', 'base': base}).result()
  reads = [store.read(key, byte_range=slice(-1, None)) for key in store.list().result()]
  if not reads or not all(read.result().value for read in reads):  # a missing file reads as empty
    raise FileNotFoundError('array files are missing')


def _set_aside(manager: CheckpointManager, paths: list[epath.Path]) -> None:
  """Renames each `<step>` to `<step>.corrupt`, which Orbax does not take for a checkpoint."""
  if not paths:
    return
  if jax.process_index() == 0:
    for path in paths:
      names = (
        f'{path.name}.corrupt{suffix}' for suffix in itertools.chain([''], itertools.count(2))
      )
      path.rename(next(p for p in map(path.with_name, names) if not p.exists()))
  multihost_utils.sync_global_devices('vdm.workdir.checkpoint: set aside')
  manager.reload()


def _check_same_model(path: epath.Path, saved: dict[str, list], wanted: dict[str, Any]) -> None:
  """Raises ValueError naming the first leaf that differs in name, shape or dtype."""
  says = f'{path} is a checkpoint of another model: it holds'
  remedy = 'restore the config it was trained with, or choose another --workdir.'
  for name, leaf in wanted.items():
    shape, dtype = _signature(leaf)
    if name not in saved:
      raise ValueError(f'{says} no {name} {dtype}{shape}; {remedy}')
    if saved[name][:2] != [shape, dtype]:
      raise ValueError(
        f'{says} {name} {saved[name][1]}{saved[name][0]}, not {dtype}{shape}; {remedy}'
      )
  for name in sorted(saved.keys() - wanted.keys()):
    raise ValueError(f'{says} {name}, which this model lacks; {remedy}')


def _signature(leaf: Any) -> list:
  """Returns [shape, dtype] as JSON has them."""
  return [list(leaf.shape), jnp.dtype(leaf.dtype).name]


def _manifest(path: epath.Path) -> dict[str, Any]:
  """Reads the manifest of the checkpoint at `path`."""
  body = json.loads((path / 'manifest' / 'metadata').read_text())
  if not isinstance(body, dict):
    raise ValueError('the manifest is no JSON object')
  if body.pop('crc32') != _crc32(body):
    raise ValueError('the manifest differs from its checksum')
  return body


def _crc32(body: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
  """Returns metrics as JSON has them, which has no number that is not finite."""
  values = {name: float(value) for name, value in metrics.items()}
  return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _metrics(directory: epath.Path, step: int) -> Mapping[str, float | None]:
  """Returns the metrics of a checkpoint; none if its manifest is broken."""
  try:
    return _manifest(directory / str(step))['metrics']
  except (OSError, ValueError, KeyError):
    return {}


def _rank(directory: epath.Path, step: int, metrics: Mapping | None = None) -> float:
  """Returns by what a checkpoint is ranked, the lowest first; inf without a finite one.

  Orbax hands over the metrics of saves by this process only.
  """
  found = metrics or _metrics(directory, step)
  values = [found.get(name) for name in METRICS]
  return next((value for value in values if value is not None), math.inf)


def _best(ranks: dict[int, float]) -> int | None:
  """Returns the step of the lowest finite value, the newest of equals."""
  finite = {step: bpd for step, bpd in ranks.items() if math.isfinite(bpd)}
  return min(finite, key=lambda step: (finite[step], -step)) if finite else None
