"""`data.json` of a workdir: which examples its run was trained on, by the hash of the first."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from vdm.data.settle import FOUND
from vdm.system import files
from vdm.workdir.config_file import CONFIG

DATA = 'data.json'


@contextlib.contextmanager
def of_run(workdir: os.PathLike | str, data: ConfigDict) -> Iterator[None]:
  """Says of data that contradict what the run in a workdir found in its own that they are others.

  Args:
    workdir: of the run; it may have none.
    data: config.data.
  """
  try:
    yield
  except ValueError as error:
    fact = str(error).rpartition('; ')[0]
    leaves = tuple(f'config.data.{leaf}=' for leaf in FOUND)
    if not (data.as_found and (epath.Path(workdir) / CONFIG).exists() and fact.startswith(leaves)):
      raise
    what = f'--workdir={workdir} holds a run on other data: {fact}'
    raise ValueError(f'{what}; choose another --workdir.') from error


def check(workdir: os.PathLike | str, identity: Mapping[str, Any]):
  """Refuses examples, or conditions of examples, that the run in a workdir was not trained on.

  Args:
    workdir: of the run; it may have none, or one that is older than the file.
    identity: `Source.identity` of the training split.

  Raises:
    ValueError: their hashes differ.
  """
  file = epath.Path(workdir) / DATA
  if not file.exists():
    return
  saved = files.read_json(file, 'remove it, if the data are those of the run')
  for name in ('sha256_first_64', 'sha256_conditions_first_64'):
    before, now = (of.get(name, '') or 'none' for of in (saved, identity))
    if before != now:
      what = 'conditions' if 'conditions' in name else 'examples'
      fact = f'the first {what} had the hash {before}, those of {identity["full_name"]} have {now}'
      remedy = f'choose another --workdir, or remove {file} if a library decodes them otherwise now'
      raise ValueError(f'--workdir={workdir} holds a run on other data: {fact}; {remedy}.')


def keep(workdir: os.PathLike | str, identity: Mapping[str, Any]):
  """Writes the file, if there is none; call it on every process.

  Args:
    workdir: of the run.
    identity: as in `check`.
  """
  file = epath.Path(workdir) / DATA
  if jax.process_index() == 0 and not file.exists():
    files.write(file, files.json_text(dict(identity)))
