"""A folder of pictures, in which folders may be splits and classes."""

import hashlib
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from vdm.data import decoded
from vdm.data.splits import HELD_OUT, Split, hashes_of_paths
from vdm.errors import confirm
from vdm.system import files

SUFFIXES = tuple(
  '.png .jpg .jpeg .jpe .jfif .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .pnm'.split()
)


class Listing(NamedTuple):
  """Holds what a folder has, in the order of their parts.

  Attributes:
    paths: of pictures, relative to the folder.
    stamps: size in bytes and time of the last change of each, in nanoseconds.
    folders: all folders, relative.
    others: how many files are no pictures by their names.
  """

  paths: list[str]
  stamps: list[tuple[int, int]]
  folders: list[str]
  others: int


def load(data, split: str) -> Split:
  """Returns the pictures of a split: PNG, JPEG, WebP, TIFF, BMP, GIF and PPM, at any depth.

  Folders called train and test (or another of HELD_OUT), if there are both, are the splits; what
  lies outside is left alone. The folders in those, or in the whole, are the classes, in the order
  of their names, if there are two at least and no picture lies beside them. Hidden files are
  ignored, and links are followed.
  """
  return decoded.load(data, split, _pictures(data))


def found(data) -> dict[str, Any]:
  """Returns the leaves of config.data as they are found in the folder."""
  return decoded.found(data, _pictures(data))


def _pictures(data) -> decoded.Pictures:
  """Returns all pictures of the folder that config.data.path names."""
  root = pathlib.Path(files.path_of(data.path))
  good = bool(data.path) and root.is_dir()
  confirm(good, 'config.data.path', data.path, 'is no folder', 'give the folder of the pictures')
  listing = _listing(root)
  tops = {path.split('/')[0] for path in listing.folders}
  splits = sorted(tops & {'train', *HELD_OUT})
  if 'train' not in splits or len(splits) < 2:
    splits = []
  inside = [not splits or path.split('/')[0] in splits for path in listing.paths]
  paths = [path for path, good in zip(listing.paths, inside, strict=True) if good]
  stamps = [stamp for stamp, good in zip(listing.stamps, inside, strict=True) if good]
  fact = 'has no picture' + (f' in {", ".join(splits)}' if splits else '')
  remedy = f'give a folder of files that end in {", ".join(SUFFIXES)}'
  confirm(bool(paths), 'config.data.path', data.path, fact, remedy)
  first = np.array([path.split('/')[0] for path in paths]) if splits else None
  named = {}
  for name in splits:  # the paths are in order, so that a split is a range
    rows = np.flatnonzero(first == name)
    named[name] = range(rows[0], rows[-1] + 1) if len(rows) else range(0)
  classes = _classes(data, listing, paths, bool(splits))
  number = {name: i for i, name in enumerate(classes)}
  depth = 1 if splits else 0
  labels = [number[path.split('/')[depth]] if classes else 0 for path in paths]
  sizes = ''.join(f'{path}\0{size}\0' for path, (size, _) in zip(paths, stamps, strict=True))
  times = f'{sizes}{root.resolve()}\0{stamps}'
  title = str(root)
  digest = lambda text: hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()
  return decoded.Pictures(
    title=title,
    full_name=f'folder/{root.resolve().name}/{digest(sizes)[:8]}',
    stamp=digest(times),
    count=len(paths),
    name=lambda row: f'{title}/{paths[row]}',
    open=lambda row: f'{title}/{paths[row]}',
    labels=np.array(labels, np.int32),
    num_classes=len(classes),
    hashes=lambda: hashes_of_paths(paths),
    named=named,
    others=listing.others + len(listing.paths) - len(paths),
  )


def _classes(data, listing, paths, with_splits):
  """Returns the names of the classes, if there are two; one without pictures is refused."""
  depth = 1 if with_splits else 0
  inside = {path.split('/')[0] for path in paths}
  places = [path.split('/') for path in listing.folders]
  places = [parts for parts in places if len(parts) == depth + 1]
  places = [parts for parts in places if not depth or parts[0] in inside]
  classes = sorted({parts[-1] for parts in places})
  beside = any(path.count('/') == depth for path in paths)
  if len(classes) < 2 or beside:
    return []
  full = {tuple(path.split('/')[: depth + 1]) for path in paths}
  empty = ['/'.join(parts) for parts in places if tuple(parts) not in full]
  fact = f'has no picture in the folder of a class, {", ".join(empty[:3])}'
  confirm(not empty, 'config.data.path', data.path, fact, 'fill or remove it')
  return classes


def _listing(root: pathlib.Path) -> Listing:
  """Returns what lies below a folder; a folder that holds itself, by a link, is entered once."""
  pictures, folders, others = [], [], 0

  def walk(folder, relative, above):
    nonlocal others
    with os.scandir(folder) as entries:
      for entry in entries:
        name = f'{relative}{entry.name}'
        if entry.name.startswith('.'):
          continue
        if _is_folder(entry):
          status = entry.stat()
          place = status.st_dev, status.st_ino
          if place not in above:
            folders.append(name)
            walk(entry.path, f'{name}/', {*above, place})
        elif entry.name.lower().endswith(SUFFIXES):
          pictures.append((name.split('/'), name, _stamp(entry)))
        else:
          others += 1

  status = root.stat()
  walk(root, '', {(status.st_dev, status.st_ino)})
  pictures.sort()
  return Listing([name for _, name, _ in pictures], [s for _, _, s in pictures], folders, others)


def _is_folder(entry):
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def _stamp(entry):
  """Returns the size and time of a file; zeros of a link to nothing, which no one can open."""
  try:
    status = entry.stat()
  except OSError:
    return 0, 0
  return status.st_size, status.st_mtime_ns
