"""What a run keeps in its workdir: `config.json`, and `checkpoints/<step>` written by Orbax.

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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vdm import build, files, parallel, released
from vdm.configs import default
from vdm.errors import require
from vdm.nn import blocks

# Leaves that may differ between two starts of one run: they do not change what is trained.
_FREE_BLOCKS = (
  'eval.',
  'sample.',
  'fid.',
  'checkpoint.',
  'parallel.',
  'log.',
  'profile.',
  'data.eval_',
)
_FREE_LEAVES = (
  'name',
  'data.dir',
  'train.log_every_steps',
  'train.eval_every_steps',
  'model.scan_blocks',
  'model.remat',
  'ema.reconstruct_std',
)


CONFIG = 'config.json'
# What a command that only reads a run takes from the config it is given: the rest is the run's own.
READING_BLOCKS = ('eval', 'sample', 'fid', 'parallel')
READING_LEAVES = (
  ('data', 'dir'),
  ('data', 'eval_split'),
  ('data', 'eval_images'),
  ('model', 'scan_blocks'),
  ('ema', 'reconstruct_std'),
)


class Run(NamedTuple):
  """A run as it was read."""

  config: ConfigDict  # its own, but for what reading may choose
  model: build.Model
  mesh: Mesh
  state: Any


def open_workdir(workdir: str, config: ConfigDict) -> None:
  """Creates the workdir, or finds the same run in it, and writes `config` to its `config.json`.

  Call it on every process, before anything is compiled.

  Args:
    workdir: the directory, local or `gs://`, as the user typed it.
    config: the whole config of this start.

  Raises:
    ValueError: the workdir cannot be written, or holds a run with another config: another value of
      any leaf that changes what is trained.
  """
  check_writable(workdir, '--workdir', 'choose another --workdir')
  path = epath.Path(workdir)
  if released.exists(path):
    raise ValueError(
      f'--workdir={workdir} holds a released model, which has no optimizer to train on with; '
      'choose another --workdir.'
    )
  parallel.keep_compiled(path / 'xla_cache')
  file = path / CONFIG
  text = files.json_text(config.to_dict())
  if file.exists():
    differences = _differences(_flat(_saved_config(workdir)), _flat(json.loads(text)))
    if differences:
      raise ValueError(
        f'--workdir={workdir} holds a run with {", and ".join(differences)}; '
        'choose another --workdir, or restore these values.'
      )
  if jax.process_index() == 0:
    files.write(file, text)


def check_writable(folder: str, flag: str, remedy: str):
  """Makes the folder that `flag` names.

  Raises:
    ValueError: nothing can be written there; `remedy` says what to do.
  """
  path = epath.Path(folder)
  probe = path / f'.probe_{jax.process_index()}'
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    cause = error.strerror or error
    raise ValueError(f'{flag}={folder} cannot be written ({cause}); {remedy}.') from error


def out_folder(workdir: epath.Path, out: epath.Path | None) -> epath.Path:
  """Returns where a command that reads a run writes what it makes, --out or else the workdir.

  Raises:
    ValueError: nothing can be written there.
  """
  if out:
    check_writable(out, '--out', 'choose another --out')
    return out
  check_writable(workdir, '--workdir', 'name a folder for what is made, --out=DIR')
  return workdir


def _saved_config(workdir: str) -> dict[str, Any]:
  """The config.json of a workdir, with lists where the config has tuples."""
  try:
    saved = json.loads((epath.Path(workdir) / CONFIG).read_text())
    _flat(saved)
  except (OSError, ValueError, AttributeError) as error:
    cause = (isinstance(error, OSError) and error.strerror) or error
    raise ValueError(
      f'--workdir={workdir} holds a {CONFIG} that cannot be read ({cause}); '
      'choose another --workdir, or restore that file.'
    ) from error
  return saved


def own_config(workdir: str, given: ConfigDict) -> ConfigDict:
  """Returns the config of the run in a workdir, with what reading it may choose from `given`.

  That is how to evaluate, sample, score and split over devices (READING_BLOCKS), and where the data
  is. What the run is older than has its default, as in `configs/default.py`.
  """
  config, defaults = ConfigDict(_with_tuples(_saved_config(workdir))), default.get_config()
  for name, block in defaults.items():
    if name not in config:
      config[name] = block
    elif isinstance(block, ConfigDict):
      # a network, say, does not take the leaves of every other one
      mine = [leaf for leaf in block if 'name' not in block or leaf in given[name]]
      for leaf in mine:
        if leaf not in config[name]:
          config[name][leaf] = block[leaf]
  for name in READING_BLOCKS:
    config[name] = given[name].copy_and_resolve_references()
  for block, leaf in READING_LEAVES:
    if leaf in given[block] and leaf in config[block]:
      config[block][leaf] = given[block][leaf]
  return config.lock()


def _flat(tree: Mapping, prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  leaves = {}
  for name, value in tree.items():
    leaves |= (
      _flat(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value}
    )
  return leaves


def _differences(saved: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Says how `saved` differs from `new`, in leaves that belong to the run."""
  free = _FREE_LEAVES
  if new.get('optimizer.decay') == 'constant':
    free += ('train.num_steps',)  # a cosine is stretched to num_steps: there it belongs to the run
  defaults = _flat(_plain(default.get_config()))
  lines = []
  for leaf in sorted(saved.keys() | new.keys()):
    if leaf in free or leaf.startswith(_FREE_BLOCKS):
      continue
    if leaf not in new:
      lines.append(f'config.{leaf}={_typed(saved[leaf])}, which this config lacks')
    elif leaf not in saved and leaf in defaults and defaults[leaf] == new[leaf]:
      continue  # the run is older than the leaf, whose default is what was done before
    elif leaf not in saved:
      lines.append(f'no config.{leaf}, not {_typed(new[leaf])}')
    elif saved[leaf] != new[leaf]:
      lines.append(f'config.{leaf}={_typed(saved[leaf])}, not {_typed(new[leaf])}')
  return lines


def _typed(value: Any) -> str:
  """A value as it is typed behind `--config.leaf=`."""
  if isinstance(value, list):  # JSON has no tuples; configs have no lists
    value = tuple(value)
  return value if isinstance(value, str) and value else repr(value)


def manager(
  workdir: str, keep: int | None = None, folder: str = 'checkpoints'
) -> ocp.CheckpointManager:
  """Opens `workdir/checkpoints`. Close it at the end: `close()` waits for the last save.

  Args:
    workdir: the run's directory.
    keep: how many of the newest checkpoints stay, besides the one with the lowest bits_per_dim.
      None opens the directory for reading only, which is safe beside a run that writes there.
    folder: of the workdir.
  """
  if keep is not None and keep < 1:
    raise ValueError(f'config.checkpoint.keep={keep} must be at least 1.')
  directory = files.absolute(workdir) / folder

  def should_preserve(checkpoints, *, context):
    del context
    bpds = {c.step: _bits_per_dim(directory, c.step, c.metrics) for c in checkpoints}
    kept = {*sorted(bpds)[-(keep or 0) :], _best(bpds)}
    return [c.step in kept for c in checkpoints]

  options = ocp.CheckpointManagerOptions(
    create=keep is not None,
    cleanup_tmp_directories=keep is not None,  # what a killed save left behind
    preservation_policy=types.SimpleNamespace(should_preserve=should_preserve),
  )
  return ocp.CheckpointManager(directory, options=options)


def save(
  manager: ocp.CheckpointManager, step: int, state: Any, metrics: Mapping[str, float] | None = None
) -> bool:
  """Starts to save `state`; False where `step` is there already.

  Returns as soon as the arrays are copied; the checkpoint appears, whole, when all is written. An
  error while writing is raised by the next call, or by `manager.close()`.

  Args:
    manager: opened for writing.
    step: the training steps done.
    state: a pytree of arrays, the same on every process.
    metrics: of this very state; 'bits_per_dim' decides which checkpoint is the best.
  """
  if step in manager.all_steps():
    return False
  metrics = {name: float(value) for name, value in (metrics or {}).items()}
  metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # for JSON
  leaves = {
    name: [*_signature(leaf), checksum]
    for (name, leaf), checksum in zip(_named(state).items(), _checksums(state), strict=True)
  }
  body = {'metrics': metrics, 'leaves': leaves}
  return manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      manifest=ocp.args.JsonSave(body | {'crc32': _crc32(body)}),
    ),
    metrics=metrics,
    force=True,  # at any step: the caller's loop knows when
  )


def latest_step(manager: ocp.CheckpointManager) -> int | None:
  """The newest step, or None."""
  return manager.latest_step()


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """The step with the lowest bits_per_dim, or None where no checkpoint has one."""
  manager.wait_until_finished()
  return _best({step: _bits_per_dim(manager.directory, step) for step in manager.all_steps()})


def restore(
  manager: ocp.CheckpointManager, abstract_state: Any, step: int | None = None
) -> tuple[Any, int] | None:
  """Reads the newest checkpoint that is whole, to resume from it, or exactly that of `step`.

  On the way to the newest whole one, broken ones are logged and then renamed `<step>.corrupt`: out
  of the way of the saves to come, and there to be looked at.

  Args:
    manager: opened for writing, where `step` is None.
    abstract_state: a pytree of `jax.ShapeDtypeStruct` with the shardings wanted now.
    step: reads this one or fails, and renames nothing; None takes the newest.

  Returns:
    The state and its step, or None where there is no checkpoint yet.

  Raises:
    ValueError: `step` is not there or is broken, or there are checkpoints and all are broken, or
      the checkpoint is of another model.
  """
  manager.wait_until_finished()
  steps = sorted(manager.all_steps(), reverse=True)
  if step is not None and step not in steps:
    raise ValueError(f'{manager.directory} holds the steps {steps[::-1]}, not {step}.')
  broken = []
  for candidate in steps if step is None else [step]:
    path = manager.directory / str(candidate)
    state, cause = _read(path, abstract_state)
    if not cause:
      _set_aside(manager, broken)
      return state, candidate
    logging.warning('%s is broken and is passed over (%s).', path, cause)
    broken.append(path)
  if not broken:
    return None
  raise ValueError(
    f'{manager.directory} holds no checkpoint that can be restored, of {len(broken)} tried '
    f'({path.name}: {cause}); put back a whole copy, or choose another --workdir.'
  )


def read_run(config: ConfigDict, workdir: str, step: str = 'newest') -> Run:
  """Reads a run, to evaluate it or to sample from it, by its own config (`own_config`).

  Nothing is written, so that the workdir may be read-only, or be trained in meanwhile.

  Args:
    config: as the user gave it.
    workdir: of the run.
    step: 'newest', 'best' (the lowest bits/dim among the checkpoints), or a number.

  Raises:
    ValueError: there is no such checkpoint, it cannot be restored, or config.json cannot.
  """
  if not _holds_run(workdir):
    raise ValueError(f'--workdir={workdir} holds no checkpoint; train first, or name another.')
  own = own_config(workdir, config)
  differences = _differences(_flat(_saved_config(workdir)), _flat(_plain(config)))
  if differences:
    logging.info('%s is read by its own config: it has %s', workdir, ', and '.join(differences))
  parallel.keep_compiled(files.cache_folder() / 'xla')
  model = build.model(own)
  build.check_devices(own, jax.device_count())
  mesh = parallel.make_mesh(own.parallel.fsdp)
  return Run(own, model, mesh, _state(workdir, own, model, mesh, step))


def read_guide(config: ConfigDict, model: build.Model, mesh: Mesh) -> tuple[build.Model, Any]:
  """The model and newest state of the run config.sample.guidance.checkpoint, by its own config.

  Raises:
    ValueError: there is no such run, it cannot be restored, or its network is of another kind or
      makes other images than the model of `config`.
  """
  workdir = config.sample.guidance.checkpoint
  folder = epath.Path(workdir)
  if not ((folder / CONFIG).exists() and _holds_run(folder)):
    raise ValueError(
      f'config.sample.guidance.checkpoint={workdir!r} must be the workdir of a run, '
      f'with {CONFIG} and checkpoints; train it first, or name another.'
    )
  guide_config = own_config(workdir, config)
  own, other = config.model.name, guide_config.model.name
  field, remedy = 'sample.guidance.checkpoint', 'name another run'
  # A guide is to make the model's own mistakes, only more of them (arXiv 2406.02507, section 3).
  require(
    own == other, f'config.{field}', workdir, f'a run of model.name={own!r}, not {other!r}', remedy
  )
  guide = build.model(guide_config)
  require(
    (guide.image_shape, guide.num_values) == (model.image_shape, model.num_values),
    f'config.{field}',
    workdir,
    f'a model of {model.num_values} values and images {model.image_shape}, '
    f'not {guide.num_values} and {guide.image_shape}',
    remedy,
  )
  return guide, _state(workdir, guide_config, guide, mesh, 'newest')


def _holds_run(workdir: os.PathLike | str) -> bool:
  """Whether there are checkpoints to read, or a released model."""
  return (epath.Path(workdir) / 'checkpoints').exists() or released.exists(workdir)


def _state(workdir: str, config: ConfigDict, model: build.Model, mesh: Mesh, step: str) -> Any:
  """The state at `step`, which is 'newest', 'best' or a number; a released model has but one."""
  if released.exists(workdir):
    state = released.read(workdir, config, model, mesh)
    if step not in ('newest', 'best', str(int(state.step))):
      raise ValueError(f'--step={step} is not there: {workdir} was released at {int(state.step)}.')
    return state
  with manager(workdir) as reader:
    steps, lowest = sorted(reader.all_steps()), best_step(reader)
    if not steps:
      raise ValueError(f'--workdir={workdir} holds no finished checkpoint yet; wait for the first.')
    named = {'newest': steps[-1], 'best': lowest} | {str(number): number for number in steps}
    there = f'--workdir={workdir} holds the steps {", ".join(map(str, steps))}'
    if step not in named:
      raise ValueError(f'--step={step} is not there: {there}; choose one, or newest, or best.')
    if named[step] is None:
      raise ValueError(f'--step=best is not known: {there}, none of them evaluated; choose one.')
    best = 'none was evaluated' if lowest is None else f'the best by bits/dim is {lowest}'
    logging.info('%s: step %d of %s; %s', workdir, named[step], ', '.join(map(str, steps)), best)
    abstract = parallel.abstract_state(mesh, build.init_state(config, model))
    return restore(reader, abstract, named[step])[0]


def _plain(config: ConfigDict) -> dict[str, Any]:
  """As JSON has it, with lists for tuples."""
  return json.loads(json.dumps(config.to_dict()))


def _with_tuples(value: Any) -> Any:
  """JSON has no tuples; configs have no lists."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _read(path: epath.Path, abstract_state: Any) -> tuple[Any, str]:
  """The state at `path` and '', or None and what is wrong with it, the same on every process."""
  manifest, cause = _attempt(lambda: (_check_files(path), _manifest(path))[1])
  if cause:
    return None, cause
  written, convert = _as_written(manifest['leaves'], abstract_state)
  _check_same_model(path, manifest['leaves'], _named(written))
  # The handler itself, not the manager: on its way there is no barrier at which a process whose
  # part of the checkpoint is whole would wait for one that has failed.
  handler = ocp.StandardCheckpointHandler()
  state, cause = _attempt(
    lambda: handler.restore(path / 'state', args=ocp.args.StandardRestore(written))
  )
  if cause:
    return None, cause
  for name, checksum in zip(_named(state), _checksums(state), strict=True):
    if manifest['leaves'][name][-1] != checksum:
      return None, f'{name} differs from its checksum'
  return convert(state), ''


def _attempt(read) -> tuple[Any, str]:
  """The value of `read()` and '', or None and why it failed, here or on another process."""
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


def _set_aside(manager: ocp.CheckpointManager, paths: list[epath.Path]) -> None:
  """Renames each `<step>` to `<step>.corrupt`, which Orbax does not take for a checkpoint."""
  if not paths:
    return
  if jax.process_index() == 0:
    for path in paths:
      names = (
        f'{path.name}.corrupt{suffix}' for suffix in itertools.chain([''], itertools.count(2))
      )
      path.rename(next(p for p in map(path.with_name, names) if not p.exists()))
  multihost_utils.sync_global_devices('vdm.checkpoint: set aside')
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


def _as_written(saved: dict[str, list], wanted: Any) -> tuple[Any, Callable[[Any], Any]]:
  """The abstract state `wanted` in the layout of `saved`, and what brings a state from there."""
  parts = [
    {part for name in names for part in name.split('.')} for names in (saved, _named(wanted))
  ]
  stacked, stacked_wanted = map(blocks.stacked_names, parts)
  if bool(stacked) == bool(stacked_wanted):
    return wanted, lambda state: state
  shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
  if stacked:
    written = blocks.stack(wanted, stacked, _abstract_join)
    return written, jax.jit(blocks.unstack, out_shardings=shardings)
  written = blocks.unstack(wanted, _abstract_take)
  stack = lambda state: blocks.stack(state, stacked_wanted)
  return written, jax.jit(stack, out_shardings=shardings)


def _abstract_join(*leaves: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """What stacking them gives: sharded as each of them is."""
  leaf, sharding = leaves[0], leaves[0].sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
  return jax.ShapeDtypeStruct((len(leaves), *leaf.shape), leaf.dtype, sharding=sharding)


def _abstract_take(leaf: jax.ShapeDtypeStruct, i: int) -> jax.ShapeDtypeStruct:
  """What one of a stack is: sharded as the stack is, but for its first axis."""
  del i
  sharding = leaf.sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _named(tree: Any) -> dict[str, Any]:
  """{'params.dense.kernel': leaf}, in the order of `jax.tree.leaves`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def _signature(leaf: Any) -> list:
  """[shape, dtype] as JSON has them."""
  return [list(leaf.shape), jnp.dtype(leaf.dtype).name]


def _checksums(tree: Any) -> list[int]:
  """One checksum per leaf, the same on every process and for any sharding.

  The sum mod 2**64 of each element's bits times its row number: integers, so that shards add up in
  any order, and exactly. On the host, because a kernel per shape would take seconds to compile.
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
  """Eight hexadecimal digits of arrays, the same on every process and for any sharding."""
  return f'{zlib.crc32(json.dumps(_checksums(tree)).encode()):08x}'


def _manifest(path: epath.Path) -> dict[str, Any]:
  """Reads the manifest of the checkpoint at `path`."""
  body = json.loads((path / 'manifest' / 'metadata').read_text())
  if body.pop('crc32') != _crc32(body):
    raise ValueError('the manifest differs from its checksum')
  return body


def _crc32(body: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _bits_per_dim(directory: epath.Path, step: int, metrics: Mapping | None = None) -> float:
  """bits_per_dim of a checkpoint; inf where it was saved without, or its manifest is broken."""
  if not metrics:  # Orbax hands over those of saves by this process only
    try:
      metrics = _manifest(directory / str(step))['metrics']
    except (OSError, ValueError, KeyError):
      metrics = {}
  return metrics.get('bits_per_dim', math.inf)


def _best(bpds: dict[int, float]) -> int | None:
  """The step of the lowest finite value, the newest of equals."""
  finite = {step: bpd for step, bpd in bpds.items() if math.isfinite(bpd)}
  return min(finite, key=lambda step: (finite[step], -step)) if finite else None
