"""Reads what a workdir says of its run, and writes nothing."""

import json
import os
import pathlib
import shlex
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath

from vdm import cards
from vdm.data.settle import FOUND, STATISTICS
from vdm.system import files, writers
from vdm.workdir import released
from vdm.workdir.config_file import CONFIG, flat, plain, saved_config, typed

Card = dict[str, Any]


class Run(NamedTuple):
  """Holds what was found in a workdir."""

  workdir: epath.Path
  name: str  # on the page: the folder's, or its whole path if another has the same
  settings: dict[str, Any]  # config.json
  series: dict[str, list[Card]]  # `cards.series`
  scalars: dict[str, dict[int, float]]  # of TensorBoard, by tag and step
  damaged: list[str]  # a line per file that could not be read
  is_released: bool

  @property
  def leaves(self) -> dict[str, Any]:
    """Returns the config by the names of its leaves."""
    return flat(self.settings)

  @property
  def headline(self) -> list[Card]:
    """Returns the series of the number that the run is known by; [] before the first evaluation."""
    return cards.headline(self.series)

  @property
  def step(self) -> int:
    """Returns the newest step that anything was written of; 0 if there is none."""
    steps = [step for values in self.scalars.values() for step in values]
    steps += [series[-1]['step'] for series in self.series.values()]
    saved = (self.workdir / 'checkpoints').glob('*')
    return max(steps + [int(path.name) for path in saved if path.name.isdecimal()], default=0)

  @property
  def num_steps(self) -> int:
    """Returns config.train.num_steps."""
    return self.settings['train']['num_steps']

  def pictures(self, folder: str, pattern: str = '*') -> list[epath.Path]:
    """Returns the PNG files of a folder of the workdir, by name."""
    return sorted((self.workdir / folder).glob(f'{pattern}.png'))


def read(workdirs: Iterable[os.PathLike | str]) -> list[Run]:
  """Returns the runs of some workdirs, each once, in their order.

  Raises:
    ValueError: one is no workdir, or its config cannot be read.
  """
  paths = list(dict.fromkeys(map(files.path_of, workdirs)))
  names = [files.absolute(path).name for path in paths]
  return [
    _read(path, name if names.count(name) == 1 else str(path))
    for path, name in zip(paths, names, strict=True)
  ]


def _read(workdir: epath.Path, name: str) -> Run:
  if not (workdir / CONFIG).exists():
    inside = sorted(path.parent.name for path in workdir.glob(f'*/{CONFIG}'))
    remedy = f'it holds {", ".join(inside)}: give {workdir}/*' if inside else 'give that of a run'
    raise ValueError(f'{workdir} is no workdir, as it has no {CONFIG}; {remedy}.')
  settings = saved_config(workdir)
  with files.reading(workdir / CONFIG, 'restore that file'):
    int(settings['train']['num_steps']), settings['name']
  series, damaged = cards.read(workdir)
  scalars, more = writers.read_scalars(workdir / 'tensorboard')
  return Run(workdir, name, settings, series, scalars, damaged + more, released.exists(workdir))


def varying(runs: list[Run]) -> list[tuple[str, list[Any]]]:
  """Returns the leaves in which runs differ, with each run's value; None if it lacks the leaf."""
  leaves = [run.leaves for run in runs]
  names = dict.fromkeys(name for own in leaves for name in own if name != 'name')
  rows = [(name, [own[name] if name in own else None for own in leaves]) for name in names]
  return [(name, values) for name, values in rows if any(v != values[0] for v in values)]


def command(run: Run) -> str:
  """Returns the command that trains the run again, in a new workdir.

  If its config came with the package, that is the main command with what was changed; else the
  workdir's own config is read.
  """
  again = f'runs/{files.absolute(run.workdir).name}_again'
  stem, debug, _ = run.settings['name'].partition('_debug')
  path = pathlib.Path(files.configs_folder()) / f'{stem}.py'
  changes = _changes(run.leaves, path, 'debug' if debug else '') if path.is_file() else None
  if changes is None:
    own, again = json.dumps(str(run.workdir)), json.dumps(again)
    return shlex.join(['python', '-c', f'import vdm; vdm.load({own})[0].train({again})'])
  parts = [f'--config=configs/{stem}.py{":debug" if debug else ""}', *changes]
  return shlex.join(['python', '-m', 'vdm.main', *parts, f'--workdir={again}'])


def _changes(leaves: dict[str, Any], path: pathlib.Path, preset: str) -> list[str] | None:
  """Returns the flags that make a packaged config that of `leaves`; None if no flags do."""
  given = flat(plain(files.load_config(path, preset)))
  if leaves.keys() - given.keys():
    return None
  # what the run itself filled in
  measured = [f'data.{leaf}' for pair in STATISTICS.values() for leaf in pair]
  own = {leaf for leaf in measured if not given[leaf]}
  own |= {f'data.{leaf}' for leaf in FOUND if given['data.as_found']}
  differing = [leaf for leaf in leaves if leaf not in own and leaves[leaf] != given[leaf]]
  for block in (leaf.removesuffix('name') for leaf in differing if leaf.endswith('.name')):
    if any(leaf.startswith(block) for leaf in given.keys() - leaves.keys()):
      return None  # it is replaced by one with leaves of its own
  return [f'--config.{leaf}={typed(leaves[leaf])}' for leaf in differing]
