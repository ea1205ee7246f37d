"""Files of a run, in a local directory or on gs://: whole, or not there."""

import csv
import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from etils import epath


def absolute(path: os.PathLike | str) -> epath.Path:
  """The path from the root; one on gs:// is (and epath would take it for a relative one)."""
  path = epath.Path(path)
  return path if '://' in str(path) else path.absolute()


def cache_folder() -> pathlib.Path:
  """Returns where this user's weights, references and compiled code are kept by default."""
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'vdm'


def content(save: Callable[[BinaryIO], Any]) -> bytes:
  """What `save(file)` writes, for a library that has to seek, which files on gs:// cannot."""
  file = io.BytesIO()
  save(file)
  return file.getvalue()


def json_text(tree: Any, indent: int | None = 2) -> str:
  """Returns plain values as JSON that every reader takes: it has no NaN and no infinity.

  Raises:
    ValueError: a number is not finite; what may lack a number holds None instead.
  """
  for field, value in _leaves(tree, ''):
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'{field}={value} must be a finite number: JSON has no other.')
  return json.dumps(tree, indent=indent, allow_nan=False) + '\n'


def _leaves(tree: Any, field: str) -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict | list | tuple):
    for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
      yield from _leaves(part, f'{field}.{name}' if field else str(name))
  else:
    yield field, tree


def short_hash(settings: dict[str, Any]) -> str:
  """Returns eight hexadecimal digits that distinguish settings of plain values."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def write(path: os.PathLike | str, data: bytes | str):
  """Writes the file, and makes its directories.

  A reader finds the old file or the new one, never half of one.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.part')
  part.write_bytes(data.encode() if isinstance(data, str) else data)
  part.replace(path)


def write_table(path: os.PathLike, header: tuple[str, ...], rows: Iterable[tuple]):
  """Writes a CSV file."""
  text = io.StringIO(newline='')
  csv.writer(text).writerows([header, *rows])
  write(path, text.getvalue())


def configs_folder() -> str:
  """Returns the folder of the configs that come with the package."""
  from vdm import configs

  return os.path.dirname(configs.__file__)


def packaged_configs() -> str:
  """Returns the names of these configs, as a sentence has them."""
  names = sorted(path.stem for path in pathlib.Path(configs_folder()).glob('[a-z]*.py'))
  return f'configs/{{{",".join(names)}}}.py'
