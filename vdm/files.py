"""Files of a run, in a local directory or on gs://: whole, or not there."""

import io
import os
from collections.abc import Callable
from typing import Any, BinaryIO

from etils import epath


def absolute(path: os.PathLike | str) -> epath.Path:
  """The path from the root; one on gs:// is (and epath would take it for a relative one)."""
  path = epath.Path(path)
  return path if '://' in str(path) else path.absolute()


def content(save: Callable[[BinaryIO], Any]) -> bytes:
  """What `save(file)` writes, for a library that has to seek, which files on gs:// cannot."""
  file = io.BytesIO()
  save(file)
  return file.getvalue()


def write(path: os.PathLike | str, data: bytes | str):
  """Writes the file, and makes its directories.

  A reader finds the old file or the new one, never half of one.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.part')
  part.write_bytes(data.encode() if isinstance(data, str) else data)
  part.replace(path)
