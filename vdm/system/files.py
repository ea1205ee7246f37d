"""Files of a run, in a local directory or on gs://: whole, or not there.

What is read may be damaged, or a stranger's: `reading` says so in a line that names the file.
"""

import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from vdm.system.packages import has_tensorflow

# What readers of JSON, NPZ and pictures raise of files that are damaged, or of another kind.
DAMAGE = (
  OSError,
  ValueError,
  LookupError,
  TypeError,
  AttributeError,
  ArithmeticError,
  EOFError,
  SyntaxError,
  RecursionError,
  NotImplementedError,
  struct.error,
  zipfile.BadZipFile,
  zlib.error,
  tokenize.TokenError,  # of the header of an NPY file
)


def path_of(typed: os.PathLike | str) -> epath.Path:
  """Returns the path that is typed: ~ is the user's home, and file:// this machine.

  Raises:
    ValueError: it is on gs://, which TensorFlow reads and writes, or gcsfs, and there is neither.
  """
  reads = has_tensorflow() or importlib.util.find_spec('gcsfs') is not None
  if os.fspath(typed).startswith('gs://') and not reads:
    raise ValueError(f"{typed} is read by TensorFlow: pip install 'vdm-jax[tensorflow]'.")
  return epath.Path(os.path.expanduser(os.fspath(typed).removeprefix('file://')))


def absolute(path: os.PathLike | str) -> epath.Path:
  """Returns the path from the root; one on gs:// is, though epath takes it for a relative one."""
  path = epath.Path(path)
  return path if '://' in str(path) else path.absolute()


def cache_folder() -> pathlib.Path:
  """Returns where this user's weights, references and compiled code are kept by default."""
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'vdm'


def content(save: Callable[[BinaryIO], Any]) -> bytes:
  """Returns what `save(file)` writes, for a library that has to seek, which gs:// cannot."""
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


def require_space(folder: os.PathLike | str, size: float, flag: str):
  """Refuses a folder whose file system has not `size` bytes left; one on gs:// has.

  Raises:
    NoSpace: the message names both sizes.
  """
  if '://' not in str(folder):
    free = shutil.disk_usage(folder).free
    if free < size:
      raise NoSpace(
        f'{flag}={folder} has {free / 1e6:,.3f} MB left, and a checkpoint takes '
        f'{size / 1e6:,.3f} MB; free some, or choose another place.'
      )


class NoSpace(ValueError):
  """There is no room for what is to be written."""


def short_hash(settings: dict[str, Any]) -> str:
  """Returns eight hexadecimal digits that distinguish settings of plain values."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Damaged(ValueError):
  """A file is not what it should be."""


@contextlib.contextmanager
def reading(name: Any, remedy: str = 'copy it again') -> Iterator[None]:
  """Turns whatever damage to a file makes its reader raise into one line.

  Args:
    name: the file's, or what it is called.
    remedy: what to do about it.

  Raises:
    Damaged: `name cannot be read (cause); remedy.`
  """
  try:
    yield
  except Damaged:  # a reader inside has said it
    raise
  except DAMAGE as error:
    cause = (isinstance(error, OSError) and error.strerror) or f'{error}' or type(error).__name__
    raise Damaged(f'{name} cannot be read ({" ".join(cause.split())}); {remedy}.') from error


def read_json(path: os.PathLike | str, remedy: str = 'copy it again', **kwargs: Any) -> dict:
  """Returns the JSON object in a file; `kwargs` are those of `json.loads`.

  Raises:
    ValueError: there is none.
  """
  with reading(path, remedy):
    tree = json.loads(epath.Path(path).read_text(), **kwargs)
    if not isinstance(tree, dict):
      raise TypeError(f'it holds a {type(tree).__name__}, no object')
  return tree


def read_arrays(
  path: os.PathLike | str, remedy: str = 'copy it again', without: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
  """Returns the arrays of an NPZ file by their names; those of `without` have no elements.

  No array is made that the file does not hold: a header may declare any shape.

  Raises:
    ValueError: it is damaged, is no NPZ file, or holds what is no array of plain values.
  """
  with reading(path, remedy), zipfile.ZipFile(io.BytesIO(epath.Path(path).read_bytes())) as archive:
    members = {member.filename.removesuffix('.npy'): member for member in archive.infolist()}
    return {
      name: np.zeros(0) if name in without else _array(archive, member)
      for name, member in members.items()
    }


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
  """Returns an array of an NPZ file, once its header agrees with the size of its data."""
  with archive.open(member) as file:
    shape, dtype = array_header(file)
    size = math.prod(shape) * dtype.itemsize
    if size > member.file_size:
      raise ValueError(f'{member.filename} declares {size} bytes and has {member.file_size}')
  with archive.open(member) as file:
    return np.lib.format.read_array(file, allow_pickle=False)


def array_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
  """Returns the shape and dtype that the header of an NPY file declares."""
  version = np.lib.format.read_magic(file)
  header = {(1, 0): np.lib.format.read_array_header_1_0}.get(version)
  shape, _, dtype = (header or np.lib.format.read_array_header_2_0)(file)
  return shape, dtype


def write(path: os.PathLike | str, data: bytes | str):
  """Writes the file, and makes its directories.

  A reader finds the old file or the new one, never half of one.
  """
  write_if(lambda: True, path, data)


def write_if(free: Callable[[], bool], path: os.PathLike | str, data: bytes | str) -> bool:
  """Does what `write` does if `free()`, asked while no other writer is at it; returns whether."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.part')
  with _alone_in(path.parent):
    if not free():
      return False
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    part.replace(path)
  return True


@contextlib.contextmanager
def _alone_in(folder: epath.Path) -> Iterator[None]:
  """Keeps other writers of this machine out of a folder meanwhile, if it can be locked."""
  try:
    held = os.open(folder, os.O_RDONLY)
  except OSError:  # on gs://
    yield
    return
  try:
    lock(held)
    yield
  finally:
    os.close(held)


def lock(descriptor: int):
  """Waits until no other process or thread holds the open file; its lock ends as it is closed.

  Where the system or the file system has no locks, nothing is waited for.
  """
  with contextlib.suppress(ImportError, OSError):
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)


def write_table(path: os.PathLike, header: tuple[str, ...], rows: Iterable[tuple]):
  """Writes a CSV file."""
  text = io.StringIO(newline='')
  csv.writer(text).writerows([header, *rows])
  write(path, text.getvalue())


def read_table(path: os.PathLike) -> list[list[str]]:
  """Returns the rows of a CSV file, the header first."""
  return list(csv.reader(io.StringIO(epath.Path(path).read_text(), newline='')))


def load_config(path: os.PathLike | str, preset: str = '') -> Any:
  """Returns get_config(preset) of a config file.

  Raises:
    ValueError: it is no file of Python with such a function, or the preset changes nothing.
  """
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  if spec is None or spec.loader is None:
    raise ValueError(f'config={str(path)!r} must be a file of Python, *.py; give another.')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (SyntaxError, UnicodeDecodeError) as error:
    raise ValueError(f'config={str(path)!r} is no file of Python ({error}); mend it.') from error
  if not hasattr(module, 'get_config'):
    raise ValueError(f'config={str(path)!r} must define get_config(); see configs/default.py.')
  if not preset:
    return module.get_config()
  config = module.get_config(preset)
  if config.to_dict() == module.get_config().to_dict():
    raise ValueError(
      f'config={str(path)!r} has no preset {preset!r}; leave :{preset} out, or try :debug.'
    )
  return config


def configs_folder() -> str:
  """Returns the folder of the configs that come with the package."""
  from vdm import configs

  return os.path.dirname(configs.__file__)


def packaged_configs() -> str:
  """Returns the names of these configs, as a sentence has them."""
  names = sorted(path.stem for path in pathlib.Path(configs_folder()).glob('[a-z]*.py'))
  return f'configs/{{{",".join(names)}}}.py'


def packaged_run(path: os.PathLike | str) -> epath.Path:
  """Returns the folder of a run; where 'pretrained/NAME' is not there, that of the package."""
  folder, parts = path_of(path), pathlib.PurePath(path).parts
  if not folder.exists() and len(parts) == 2 and parts[0] == 'pretrained':
    from vdm import pretrained

    packaged = epath.Path(os.path.dirname(pretrained.__file__)) / parts[1]
    return packaged if packaged.exists() else folder
  return folder
