"""Arrays of a file by their names, of which rows are read when they are asked for."""

import contextlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vdm.data.decoded import sorted_rows, threads
from vdm.errors import confirm
from vdm.system import files

NAMES = ('x', 'condition', 'vector', 'label', 'mask')
MAPPED = 2**30  # bytes of a mapped array that need no threads to read ahead
IN_MEMORY = 2 * 10**9  # bytes that the compressed arrays of an NPZ file may take in memory
POOL = 2**25  # bytes of chunks of a zarr array that are kept
FORMATS = '.npz, .npy, .h5, .hdf5, or the folder of a zarr array or group'
PATH = 'config.data.path'


class Column(NamedTuple):
  """Holds an array on disk.

  Attributes:
    shape: of the whole.
    dtype: of what is stored.
    rows: numbers of rows in any order -> these rows.
    whole: returns all rows.
    chunk: how many rows are decompressed together; 1 where each is read by itself.
    num_threads: threads that read ahead; 0 where it is in memory already.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  rows: Callable[[np.ndarray], np.ndarray]
  whole: Callable[[], np.ndarray]
  chunk: int = 1
  num_threads: int = 0


def open_columns(path: str) -> tuple[dict[str, Column], list[str]]:
  """Returns the arrays of NAMES in a file, or in a folder that is a zarr group; and all names.

  A file that holds a single array without a name has it as 'x'.

  Raises:
    ValueError: it is damaged, or of another kind.
  """
  remote = '://' in path
  place = files.path_of(path)
  confirm(bool(path) and place.exists(), PATH, path, 'does not exist', f'give {FORMATS}')
  if place.is_dir():
    return _zarr(path, place)
  kinds = {'.npy': _npy, '.npz': _npz, '.h5': _hdf5, '.hdf5': _hdf5}
  suffix = place.suffix.lower()
  confirm(suffix in kinds, PATH, path, 'is no file of arrays', f'give {FORMATS}')
  confirm(not remote, PATH, path, 'is not on this machine', 'copy it, or write a zarr group there')
  return kinds[suffix](os.fspath(place))


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[None]:
  """Tells damage of a file in one line, without the details that tensorstore appends."""
  with files.reading(path, 'write or copy it again'):
    try:
      yield
    except files.Damaged:  # which has been told
      raise
    except (ValueError, RuntimeError) as error:
      raise ValueError(str(error).split(' [')[0] or type(error).__name__) from error


def _each_once(read):
  """Returns rows(numbers in any order), by a `read` that takes ascending ones, each once."""

  def rows(numbers):
    each, places = np.unique(numbers, return_inverse=True)
    out = read(each)
    return out if np.array_equal(each, numbers) else out[places]

  return rows


# --- NumPy


def _npy(path):
  with _reading(path):
    return {'x': _mapped(path, 0, os.path.getsize(path))}, ['x']


def _npz(path):
  """Maps what is stored as it is; what is compressed is read into memory if it has room there."""
  with _reading(path), zipfile.ZipFile(path) as archive:
    members = {member.filename.removesuffix('.npy'): member for member in archive.infolist()}
    chosen = {name: members[name] for name in NAMES if name in members}
    packed = {n: m for n, m in chosen.items() if m.compress_type != zipfile.ZIP_STORED}
  size = sum(member.file_size for member in packed.values())
  fact = f'has compressed arrays of {size / 1e9:.1f} GB ({", ".join(packed)})'
  remedy = 'write them with numpy.savez instead of savez_compressed, or as .npy, .h5 or zarr'
  confirm(size <= IN_MEMORY, PATH, path, fact, remedy)
  with _reading(path):
    names = tuple(name for name in members if name not in packed)
    arrays = files.read_arrays(path, without=names) if packed else {}
    columns = {
      name: _of_array(arrays[name], 0)
      if name in packed
      else _mapped(path, _start(path, member), member.file_size)
      for name, member in chosen.items()
    }
  return columns, list(members)


def _start(path, member):
  """Returns where the content of a member of a zip file lies, past its local header."""
  with open(path, 'rb') as file:
    file.seek(member.header_offset)
    header = file.read(30)
  if header[:4] != b'PK\x03\x04':
    raise zipfile.BadZipFile(f'{member.filename} has no header')
  lengths = (int.from_bytes(header[at : at + 2], 'little') for at in (26, 28))  # of name and extra
  return member.header_offset + 30 + sum(lengths)


def _mapped(path, place, size):
  """Returns the array whose NPY header lies at `place` of a file, both of `size` bytes."""
  with open(path, 'rb') as file:
    file.seek(place)
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0}.get(version)
    shape, fortran, dtype = (header or np.lib.format.read_array_header_2_0)(file)
    start = file.tell()
  if dtype.hasobject or not math.prod(shape):  # which the caller refuses
    return _of_array(np.zeros((0, *shape[1:]), dtype), 0)._replace(shape=shape)
  if start - place + math.prod(shape) * dtype.itemsize > size:
    raise ValueError(f'it declares an array of {shape}, and has less')
  array = np.memmap(path, dtype, 'r', start, shape, 'F' if fortran else 'C')
  return _of_array(array, threads() if array.nbytes > MAPPED else 0)


def _of_array(array, num_threads):
  whole = lambda: np.array(array)
  rows = lambda numbers: sorted_rows(array, numbers)
  return Column(array.shape, array.dtype, rows, whole, num_threads=num_threads)


# --- HDF5


def _hdf5(path):
  try:
    import h5py
  except ImportError as error:
    raise ValueError(f"{PATH}={path!r} needs h5py; pip install 'vdm-jax[hdf5]'") from error

  with _reading(path):
    file = h5py.File(path, 'r', locking='best-effort')
    names = [n for n, value in file.items() if isinstance(value, h5py.Dataset) and value.shape]
    return {name: _of_dataset(path, file[name]) for name in NAMES if name in names}, names


def _of_dataset(path, dataset):
  def read(numbers):
    out = np.empty((len(numbers), *dataset.shape[1:]), dataset.dtype)
    ends = np.append(np.flatnonzero(np.diff(numbers) != 1) + 1, len(numbers))
    with _reading(path):
      low = 0
      for high in ends:  # each run of neighbours at once: h5py is slow with lists of rows
        source = np.s_[numbers[low] : numbers[high - 1] + 1]
        dataset.read_direct(out, source, np.s_[low:high])
        low = high
    return out

  def whole():
    with _reading(path):
      return dataset[()]

  chunk = (dataset.chunks or (1,))[0]
  return Column(dataset.shape, dataset.dtype, _each_once(read), whole, chunk, threads())


# --- zarr


def _zarr(path, place):
  """Returns the arrays of a zarr group of version 2 or 3, or 'x' where it is an array itself."""
  with _reading(place):
    kind = _zarr_array(place)
    if kind:
      return {'x': _of_store(place, kind)}, ['x']
    inside = [folder for folder in place.iterdir() if folder.is_dir()]
    kinds = {folder.name: _zarr_array(folder) for folder in inside}
    names = sorted(name for name, kind in kinds.items() if kind)
    columns = {name: _of_store(place / name, kinds[name]) for name in NAMES if name in names}
  confirm(bool(names), PATH, path, 'is no zarr array or group', f'give {FORMATS}')
  return columns, names


def _zarr_array(folder):
  """Returns tensorstore's driver for a zarr array, or '' if the folder is none."""
  if (folder / '.zarray').exists():
    return 'zarr'
  new = folder / 'zarr.json'
  return 'zarr3' if new.exists() and files.read_json(new)['node_type'] == 'array' else ''


def _of_store(folder, driver):
  import tensorstore

  place = os.fspath(folder)
  store = tensorstore.open(
    {
      'driver': driver,
      'kvstore': f'{place}/' if '://' in place else {'driver': 'file', 'path': f'{place}/'},
      'recheck_cached_data': 'open',
      'recheck_cached_metadata': 'open',
    },
    context=tensorstore.Context({'cache_pool': {'total_bytes_limit': POOL}}),
    read=True,
  ).result()

  def read(numbers):
    with _reading(place):
      return store[numbers].read().result()  # all chunks at once

  def whole():
    with _reading(place):
      return store.read().result()

  chunk = (store.chunk_layout.read_chunk.shape or (1,))[0] or 1
  dtype = store.dtype.numpy_dtype
  return Column(store.shape, dtype, _each_once(read), whole, chunk, threads())
