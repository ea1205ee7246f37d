"""`config.json` of a workdir: which run it is, and which leaves may differ between two starts."""

import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vdm.build.checks import MODEL_LEAVES
from vdm.configs import default
from vdm.data.settle import FOUND, STATISTICS, settle
from vdm.errors import require
from vdm.system import files, hosts
from vdm.workdir import released

# Leaves that may differ between two starts of one run: they do not change what is trained.
_FREE_BLOCKS = (
  'eval.',
  'likelihood.',
  'sample.',
  'fid.',
  'checkpoint.',
  'parallel.',
  'log.',
  'profile.',
)
_FREE_LEAVES = (
  'name',
  'data.eval_split',
  'data.eval_images',
  'data.dir',
  'data.path',
  'data.cache',
  'data.as_found',
  'train.log_every_steps',
  'train.eval_every_steps',
  'model.scan_blocks',
  'model.remat',
  'ema.reconstruct_std',
)
# Leaves that change the figures of a run: it may change them, but not among others in one table.
_MEASURED = (
  'eval.',
  'sample.',
  'fid.',
  'data.eval_split',
  'train.num_steps',
  'train.eval_every_steps',
  'train.log_every_steps',
)
# ... but for these of their blocks, which say where things lie, and how many are done at a time.
_NOT_MEASURED = ('batch_size', 'weights', 'embeddings', 'format')

CONFIG = 'config.json'
# What a command that only reads a run takes from the config it is given: the rest is the run's own.
READING_BLOCKS = ('eval', 'likelihood', 'sample', 'fid', 'parallel')
# ... but for what training scores, and when: it goes with the run's own evaluations.
_OF_TRAINING = {'fid': ('train_every_steps', 'train_images')}
READING_LEAVES = (
  ('data', 'dir'),
  ('data', 'path'),
  ('data', 'cache'),
  ('data', 'eval_split'),
  ('data', 'eval_images'),
  ('model', 'scan_blocks'),
  ('ema', 'reconstruct_std'),
)


def open_workdir(workdir: os.PathLike | str, config: ConfigDict) -> None:
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
  hosts.keep_compiled()
  file = path / CONFIG
  text = files.json_text(config.to_dict())
  if file.exists():
    _require_same(workdir, flat(saved_config(workdir)), flat(json.loads(text)))
  elif any((path / 'checkpoints').glob('[0-9]*')):
    raise ValueError(
      f'--workdir={workdir} holds checkpoints without {CONFIG}, which says of which run; '
      'restore that file, or choose another --workdir.'
    )
  if jax.process_index() == 0:
    files.write(file, text)


def check_run(workdir: os.PathLike | str, leaves: Mapping[str, Any]):
  """Refuses a run with other leaves, but for those that may be found in the data.

  Args:
    workdir: of the run; it may have none.
    leaves: of the whole config, as `flat` returns them.
  """
  if (epath.Path(workdir) / CONFIG).exists():
    found = {f'data.{leaf}' for leaf in (*FOUND, *itertools.chain(*STATISTICS.values()))}
    if leaves['data.resize'] or leaves['data.name'] == 'gaussian_field':
      found.remove('data.image_shape')  # it is the user's to choose
    but = lambda tree: {name: value for name, value in tree.items() if name not in found}
    _require_same(workdir, but(flat(saved_config(workdir))), but(leaves))


def _require_same(workdir: os.PathLike | str, saved: dict[str, Any], new: dict[str, Any]):
  found = differences(saved, new)
  if found:
    raise ValueError(
      f'--workdir={workdir} holds a run with {", and ".join(found)}; '
      'choose another --workdir, or restore these values.'
    )


def check_writable(folder: os.PathLike | str, flag: str, remedy: str):
  """Makes the folder that `flag` names.

  Raises:
    ValueError: nothing can be written there; `remedy` says what to do.
  """
  path = epath.Path(folder)
  probe = path / f'.probe_{uuid.uuid4().hex[:12]}'
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    cause = error.strerror or error
    raise ValueError(f'{flag}={folder} cannot be written ({cause}); {remedy}.') from error


def out_folder(workdir: os.PathLike | str, out: epath.Path | None) -> epath.Path:
  """Returns where a command that reads a run writes what it makes, --out or else the workdir.

  Raises:
    ValueError: nothing can be written there.
  """
  if out:
    check_writable(out, '--out', 'choose another --out')
    return out
  check_writable(workdir, '--workdir', 'name a folder for what is made, --out=DIR')
  return workdir


def saved_config(workdir: os.PathLike | str) -> dict[str, Any]:
  """Returns the config.json of a workdir, with lists where the config has tuples."""
  remedy = 'choose another --workdir, or restore that file'
  return files.read_json(epath.Path(workdir) / CONFIG, remedy)


def own_config(workdir: os.PathLike | str, given: ConfigDict | None = None) -> ConfigDict:
  """Returns the config of the run in a workdir, with what reading it may choose from `given`.

  That is how to evaluate, sample, score and split over devices (READING_BLOCKS), and where the data
  is. What the run is older than has its default, as in `configs/default.py`.
  """
  config = ConfigDict(_with_tuples(saved_config(workdir)))
  _fill_up(config, default.get_config(), given)
  if given is not None:
    for name in READING_BLOCKS:
      kept = {leaf: config[name][leaf] for leaf in _OF_TRAINING.get(name, ())}
      config[name] = given[name].copy_and_resolve_references()
      config[name].update(kept)
    for block, leaf in READING_LEAVES:
      if leaf in given[block] and leaf in config[block]:
        config[block][leaf] = given[block][leaf]
  return config.lock()


def _fill_up(tree: ConfigDict, defaults: ConfigDict, asked: ConfigDict | None):
  """Gives a run that is older than some leaves their defaults.

  A network, say, does not take the leaves of every other one: a block with a name gets only those
  that `asked` has, or else those that every network takes.
  """
  for name, block in defaults.items():
    if name not in tree:
      tree[name] = block
    elif isinstance(block, ConfigDict):
      if 'name' not in block or name == 'data':  # which all kinds of data read
        _fill_up(tree[name], block, None if asked is None else asked[name])
        continue
      known = MODEL_LEAVES if asked is None else asked[name]
      for leaf in block:
        if leaf not in tree[name] and leaf in known:
          tree[name][leaf] = block[leaf]


def settled(config: ConfigDict, workdir: os.PathLike | str | None = None) -> ConfigDict:
  """Returns a config with what it leaves to the data filled in (`data.settle`).

  Args:
    config: the whole config.
    workdir: of the run, if any; one that is there already has found and measured before.
  """
  known = None
  if workdir is not None and (epath.Path(workdir) / CONFIG).exists():
    known = _with_tuples(saved_config(workdir)['data'])
  config = config.copy_and_resolve_references().unlock()
  continuous = config.decoder.name != 'discrete'
  config.data = settle(config.data, continuous, known)
  labelled = known is None and config.data.as_found and config.data.num_classes
  if labelled and not config.model.class_conditional:
    flag = '--config.model.class_conditional=True'
    logging.info('%d classes are not used: %s', config.data.num_classes, flag)
  if continuous and config.data.num_values:
    said = 'integers are modelled by a density, as if they were real; for bits/dim: discrete'
    logging.warning('config.decoder.name=%s: %s', config.decoder.name, said)
  return config.lock()


def flat(tree: Mapping, prefix: str = '') -> dict[str, Any]:
  """Returns {'a.b': 1} for {'a': {'b': 1}}."""
  leaves: dict[str, Any] = {}
  for name, value in tree.items():
    leaves |= flat(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value}
  return leaves


def differences(saved: dict[str, Any], new: dict[str, Any], measured: bool = False) -> list[str]:
  """Says how `saved` differs from `new`, in leaves that belong to the run.

  Args:
    saved: leaves by name, as `flat` returns them.
    new: the same of another config.
    measured: look also at those that say how long a run is, and how it is evaluated and sampled.
  """
  free: tuple[str, ...] = _FREE_LEAVES
  if new.get('optimizer.decay') == 'constant':
    free += ('train.num_steps',)  # a cosine is stretched to num_steps: there it belongs to the run
  defaults = flat(plain(default.get_config()))
  lines = []
  for leaf in sorted(saved.keys() | new.keys()):
    matters = measured and leaf.startswith(_MEASURED) and not leaf.endswith(_NOT_MEASURED)
    if not matters and (leaf in free or leaf.startswith(_FREE_BLOCKS)):
      continue
    if leaf not in new:
      lines.append(f'config.{leaf}={typed(saved[leaf])}, which this config lacks')
    elif leaf not in saved and leaf in defaults and defaults[leaf] == new[leaf]:
      continue  # the run is older than the leaf, whose default is what was done before
    elif leaf not in saved:
      lines.append(f'no config.{leaf}, not {typed(new[leaf])}')
    elif saved[leaf] != new[leaf]:
      lines.append(f'config.{leaf}={typed(saved[leaf])}, not {typed(new[leaf])}')
  return lines


def changes(tree: Mapping) -> list[tuple[str, Any, Any]]:
  """Returns the leaves in which a plain config differs from configs/default.py.

  They are name, value and default; None if the defaults lack the leaf.
  """
  defaults, leaves = flat(plain(default.get_config())), flat(json.loads(json.dumps(tree)))
  return [
    (leaf, value, defaults[leaf] if leaf in defaults else None)
    for leaf, value in leaves.items()
    if leaf not in defaults or defaults[leaf] != value
  ]


def typed(value: Any) -> str:
  """Returns a value as it is typed behind `--config.leaf=`."""
  if isinstance(value, list):  # JSON has no tuples; configs have no lists
    value = tuple(value)
  return value if isinstance(value, str) and value else repr(value)


def plain(tree: ConfigDict) -> dict[str, Any]:
  """Returns a config as JSON has it, with lists for tuples."""
  return json.loads(json.dumps(tree.to_dict()))


def _with_tuples(value: Any) -> Any:
  """Returns tuples for lists: JSON has no tuples; configs have no lists."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def read_config(which: str | os.PathLike | ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """Returns a locked config with some leaves changed.

  Args:
    which: a packaged name, 'digits' or 'digits:debug'; a config file; or a ConfigDict, copied.
    overrides: values by the names of their leaves.

  Raises:
    ValueError: there is no such config or leaf, or a value is of another type.
  """
  if not isinstance(which, ConfigDict):
    name, preset = os.fspath(which), ''
    if not os.path.isfile(name) and ':' in name:
      name, _, preset = name.rpartition(':')
    packaged = pathlib.Path(files.configs_folder()) / f'{name}.py'
    path = packaged if packaged.is_file() else pathlib.Path(name)
    choices = f'a file, or one of {files.packaged_configs()}'
    require(path.is_file(), 'config', os.fspath(which), choices, 'choose one')
    which = files.load_config(path, preset)
  return changed(which, overrides)


def changed(tree: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """Returns a locked copy of a config with some leaves changed, by their names.

  Raises:
    ValueError: there is no such leaf, or a value is of another type.
  """
  tree = tree.copy_and_resolve_references().lock()
  for leaf, value in overrides.items():
    try:
      tree.update_from_flattened_dict({leaf: value})
    except (KeyError, TypeError, AttributeError) as error:
      text = str(error.args[0]).partition('\n')[0]
      raise ValueError(f'config.{leaf}={value!r} is refused: {text}') from error
  return tree
