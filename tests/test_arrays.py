"""Files of arrays give back what was written, row by row, and refuse what cannot be meant."""

import logging
import re

import numpy as np
import pytest
import tensorstore
from ml_collections import ConfigDict
from vdm.configs import my_arrays

from vdm import data as data_module
from vdm.data import arrays, columns, settle, splits
from vdm.system import files
from vdm.training import loop

COUNT, SHAPE = 12, (4, 6, 2)


def config(path, /, **changes):
  leaves = {
    'name': 'arrays',
    'path': str(path),
    'train_split': '[:10]',
    'eval_split': '[10:]',
    'eval_share': 0.1,
    'train_images': 10,
    'eval_images': 2,
    'image_shape': SHAPE,
    'num_values': 0,
    'resize': False,
    'num_classes': 0,
    'embedding_size': 0,
    'condition_shape': (),
    'masked': False,
    'cache': True,
  }
  assert set(changes) <= set(leaves)
  data = ConfigDict()
  for name, value in (leaves | changes).items():
    data[name] = value
  return data


def fields(**changes):
  rng = np.random.default_rng(0)
  mask = rng.integers(0, 2, (COUNT, *SHAPE[:2], 1)).astype(np.uint8)
  mask[:, 0, 0] = 1
  known = {
    'x': rng.normal(size=(COUNT, *SHAPE)).astype(np.float32),
    'condition': rng.normal(size=(COUNT, 2, 3, 5)).astype(np.float32),
    'vector': rng.normal(size=(COUNT, 7)).astype(np.float32),
    'label': np.arange(COUNT) % 3,
    'mask': mask,
  }
  return {name: value for name, value in (known | changes).items() if value is not None}


NAMED = 'x, condition, vector, label, mask'
ALL = {'condition_shape': (2, 3, 5), 'embedding_size': 7, 'num_classes': 3, 'masked': True}


def write(tmp_path, kind, content):
  """Writes arrays as one kind of file, and returns its path."""
  path = tmp_path / f'fields.{kind}'
  if kind == 'npz':
    np.savez(path, **content)
  elif kind == 'compressed':
    path = tmp_path / 'compressed.npz'
    np.savez_compressed(path, **content)
  elif kind == 'npy':
    np.save(path, content['x'])
  elif kind == 'h5':
    h5py = pytest.importorskip('h5py')
    with h5py.File(path, 'w') as file:
      for name, value in content.items():
        file[name] = value
  else:
    write_zarr(path, kind, content)
  return path


def write_zarr(path, driver, content, rows=1):
  for name, value in content.items():
    store = tensorstore.open(
      {'driver': driver, 'kvstore': {'driver': 'file', 'path': str(path / name)}},
      create=True,
      dtype=value.dtype,
      shape=value.shape,
      chunk_layout=tensorstore.ChunkLayout(chunk_shape=(min(rows, len(value)), *value.shape[1:])),
    ).result()
    store.write(value).result()


KINDS = ['npz', 'compressed', 'h5', 'zarr', 'zarr3']


# --- what is read


@pytest.mark.parametrize('kind', KINDS)
def test_rows_are_those_written(tmp_path, kind):
  content = fields()
  path = write(tmp_path, kind, content)
  data = config(path, **ALL)
  leaves = arrays.found(data)
  assert leaves == {name: data[name] for name in leaves}
  split = arrays.load(data, 'train')
  assert split.num_images == 10 and (split.num_threads > 0) == (kind[:1] in 'hz')
  for indices in ([0], [3, 4, 5], [9, 0, 0, 7, 3, 9]):
    batch = split.fetch(np.array(indices))
    assert {key: (value.dtype, value.shape[1:]) for key, value in batch.items()} == {
      'image': (np.float32, SHAPE),
      'label': (np.int32, ()),
      'vector': (np.float32, (7,)),
      'condition': (np.float32, (2, 3, 5)),
      'valid': (bool, (*SHAPE[:2], 1)),
    }
    np.testing.assert_array_equal(batch['valid'], content['mask'][indices] != 0)
    np.testing.assert_array_equal(batch['image'], (content['x'] * content['mask'])[indices])
    for key in ('condition', 'vector', 'label'):
      np.testing.assert_array_equal(batch[key], content[key][indices])
    np.testing.assert_array_equal(split.labels(np.array(indices)), content['label'][indices])
  batch = arrays.load(data, 'eval').fetch(np.arange(2))
  np.testing.assert_array_equal(batch['vector'], content['vector'][10:])


@pytest.mark.parametrize('kind', ['npy', *KINDS])
def test_nothing_is_read_that_was_not_asked_for(tmp_path, kind):
  path = write(tmp_path, kind, fields())
  batch = arrays.load(config(path), 'train').fetch(np.arange(3))
  assert set(batch) == {'image', 'label'} and not batch['label'].any()
  np.testing.assert_array_equal(batch['image'], fields()['x'][:3])
  batch['image'][:] = 0
  assert arrays.load(config(path), 'train').fetch(np.arange(3))['image'].any()


@pytest.mark.parametrize('kind', ['npy', 'npz'])
@pytest.mark.parametrize('fortran', [False, True])
def test_what_is_stored_as_it_is_is_mapped(tmp_path, kind, fortran, monkeypatch):
  maps = []
  of_array = columns._of_array
  monkeypatch.setattr(columns, '_of_array', lambda a, n: maps.append(a) or of_array(a, n))
  x = fields()['x']
  path = write(tmp_path, kind, {'x': np.asfortranarray(x) if fortran else x})
  batch = arrays.load(config(path), 'train').fetch(np.arange(3))
  np.testing.assert_array_equal(batch['image'], x[:3])
  assert [type(array) for array in maps] == [np.memmap]
  assert type(batch['image']) is np.ndarray


def test_a_zarr_array_alone_is_x(tmp_path):
  for driver in ('zarr', 'zarr3'):
    write_zarr(tmp_path / driver, driver, fields())
    batch = arrays.load(config(tmp_path / driver / 'x'), 'train').fetch(np.arange(3))
    np.testing.assert_array_equal(batch['image'], fields()['x'][:3])


@pytest.mark.parametrize('spatial', [(5,), (5, 6), (4, 2, 3)])
@pytest.mark.parametrize('channel', [(), (1,)])
@pytest.mark.parametrize('each', [True, False])
def test_masks_of_all_and_of_each(tmp_path, spatial, channel, each):
  """NaN under a mask is no harm, and does not come through."""
  mask = np.ones((COUNT, *spatial)) if each else np.ones(spatial)
  mask.reshape(-1)[1] = 0
  x = np.random.default_rng(0).normal(size=(COUNT, *spatial, 2))
  valid = np.broadcast_to(mask, (COUNT, *spatial))[..., None] != 0
  stored = np.where(valid, x, np.nan)
  path = write(tmp_path, 'npz', {'x': stored, 'mask': mask.reshape(*mask.shape, *channel)})
  data = config(path, image_shape=(*spatial, 2), masked=True)
  assert arrays.found(data)['masked']
  batch = arrays.load(data, 'train').fetch(np.arange(10))
  np.testing.assert_array_equal(batch['valid'], valid[:10])
  np.testing.assert_array_equal(batch['image'], np.where(valid, x, 0).astype(np.float32)[:10])
  data = config(path, image_shape=(*spatial, 2))
  with pytest.raises(ValueError, match=r'nan or inf in x of example \[0\]; .*masked=True'):
    arrays.load(data, 'train').fetch(np.arange(10))


@pytest.mark.parametrize(
  ('dtype', 'stored_as', 'high', 'num_values'),
  [
    (np.uint8, np.uint8, 16, 17),
    (np.uint8, np.uint8, 128, 256),
    (np.int64, np.int32, 200, 201),
    (np.uint16, np.int32, 65535, 65536),
    (bool, np.uint8, 1, 2),
    (np.float64, np.float32, 3, 0),
    (np.float16, np.float32, 3, 0),
    ('>f4', np.float32, 3, 0),
  ],
)
def test_kinds_of_numbers(tmp_path, dtype, stored_as, high, num_values):
  x = np.zeros((COUNT, *SHAPE), dtype)
  x[5, 1, 1, 1] = high
  path = write(tmp_path, 'npz', {'x': x, 'condition': x.astype(np.int16) - 1})
  assert arrays.found(config(path))['num_values'] == num_values
  data = config(path, num_values=num_values, condition_shape=SHAPE)
  batch = arrays.load(data, 'train').fetch(np.arange(10))
  assert batch['image'].dtype == stored_as and batch['condition'].dtype == np.int32
  np.testing.assert_array_equal(batch['image'], x[:10].astype(np.float32))
  continuous = arrays.load(config(path), 'train').fetch(np.arange(10))['image']
  assert continuous.dtype == np.float32 and continuous.max() == high


def test_a_hash_of_the_row_holds_examples_out(tmp_path):
  x = np.arange(200.0).reshape(-1, 1, 1)
  path = write(tmp_path, 'npy', {'x': x})
  data = config(path, image_shape=(1, 1), train_split='train', eval_split='test')
  parts = [arrays.load(data, split) for split in ('train', 'eval')]
  values = [part.fetch(np.arange(part.num_images))['image'].ravel().astype(int) for part in parts]
  np.testing.assert_array_equal(values[1], np.flatnonzero(splits.hashes_of_rows(200) < 0.1 * 2**32))
  assert sorted(np.concatenate(values)) == list(range(200))
  leaves = arrays.found(data)
  assert [leaves['train_images'], leaves['eval_images']] == [part.num_images for part in parts]


@pytest.mark.parametrize('kind', ['h5', 'zarr', 'zarr3'])
def test_chunks_of_several_examples_are_told_once(tmp_path, kind, caplog):
  path, content = tmp_path / f'chunked.{kind}', fields()
  if kind == 'h5':
    with pytest.importorskip('h5py').File(path, 'w') as file:
      file.create_dataset('x', data=content['x'], chunks=(5, *SHAPE), compression='gzip')
  else:
    write_zarr(path, kind, {'x': content['x']}, rows=5)
  with caplog.at_level(logging.INFO):
    for split in ('train', 'eval'):
      batch = arrays.load(config(path), split).fetch(np.array([1, 0]))
  np.testing.assert_array_equal(batch['image'], content['x'][[11, 10]])
  (line,) = [record.getMessage() for record in caplog.records]
  assert line.startswith(f'chunked.{kind}: x is stored in chunks of 5 examples: reading one')


def test_arrays_of_other_names_are_told(tmp_path, caplog):
  path = write(tmp_path, 'npz', fields(labels=np.arange(COUNT), conditions=np.zeros(3)))
  with caplog.at_level(logging.INFO):
    arrays.found(config(path, **ALL))
  (line,) = [record.getMessage() for record in caplog.records]
  assert line == f'{path}: labels, conditions not read, for arrays are called {NAMED}'


@pytest.mark.parametrize(
  ('shape', 'told'),
  [
    ((20, 12, 12), 'is read as examples of 12 with 12 channels'),
    ((20, 3, 16, 16), 'is read as examples of 3 x 16 with 16 channels'),
    ((20, 16, 16, 3), ''),
    ((20, 40, 5), ''),
    ((20, 2, 2, 4), ''),
  ],
)
def test_channels_that_may_be_an_axis_of_space_are_told(tmp_path, shape, told, caplog):
  path = write(tmp_path, 'npy', {'x': np.zeros(shape, np.float32)})
  with caplog.at_level(logging.INFO):
    assert arrays.found(config(path))['image_shape'] == shape[1:]
  lines = [record.getMessage() for record in caplog.records]
  assert [told in line for line in lines] == [True] * bool(told)


def test_a_name_tells_arrays_from_others(tmp_path):
  names = set()
  for place in (0, -1):
    content = fields()
    content['x'][place] += 1
    names.add(arrays.load(config(write(tmp_path, 'npz', content)), 'train').full_name)
  assert len(names) == 2 and all(re.fullmatch(r'arrays/fields.npz/\w{8}', name) for name in names)


# --- refusals


def nan(name, row, value=np.nan):
  array = fields()[name].copy()
  array[row].reshape(-1)[1] = value
  return {name: array}


def zeros(row):
  mask = fields()['mask']
  mask[row] = 0
  return {'mask': mask}


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ({'x': None}, r'has no array x; it has condition, vector, label, mask; give'),
    ({'vector': np.zeros((11, 7))}, r'12 rows of x, 12 rows of condition, 11 rows of vector'),
    ({'label': np.zeros(13, int)}, r'13 rows of label, 12 rows of mask; write one'),
    ({'condition': np.zeros((12, 3, 6, 1))}, r'x of shape \(12, 4, 6, 2\) and condition of shape '),
    ({'condition': np.zeros((12, 8, 6, 1))}, r'condition of shape \(12, 8, 6, 1\); write a cond'),
    ({'condition': np.zeros((12, 4, 6))}, r'condition of shape \(12, 4, 6\); write a condition'),
    ({'x': np.zeros((12, 4))}, r'x of shape \(12, 4\); write \[examples, one to three axes'),
    ({'x': np.zeros((0, *SHAPE))}, r'x of shape \(0, 4, 6, 2\); write'),
    ({'x': np.zeros((12, *SHAPE), complex)}, r'has x of complex128; write integers or floats'),
    ({'vector': np.full((12, 7), 'a')}, r'has vector of <U1; write'),
    ({'x': np.full((12, *SHAPE), None)}, r'has x of object; write'),
    ({'vector': np.zeros(12)}, r'vector of shape \(12,\); write \[examples, size\]'),
    ({'label': np.zeros(12)}, r'label of float64 and shape \(12,\); write one integer'),
    ({'label': -np.arange(12)}, r'has label \[-1\] in example \[1\]; number the classes from 0'),
    ({'mask': np.zeros(SHAPE[:2])}, r'has a mask of zeros alone; mark with 1'),
    ({'mask': np.zeros((12, 6, 4))}, r'mask of shape \(12, 6, 4\); write the axes of space'),
    (zeros(5), r'has a mask of zeros alone in example \[5\]; mark with 1 what counts'),
    (nan('x', 3) | {'mask': np.ones(SHAPE[:2])}, r'has nan or inf in x of example \[3\]; correct'),
    (nan('condition', 7), r'has nan or inf in condition of example \[7\]; correct it'),
    (nan('vector', 9, np.inf), r'has nan or inf in vector of example \[9\]; correct it'),
    ({'x': np.full((12, *SHAPE), 1e300)}, r'has nan or inf in x of example \[0\]; correct it'),
    ({'x': np.full((12, *SHAPE), -1)}, r'has -1 in x of example \[0\]; write integers from 0'),
    ({'x': np.full((12, *SHAPE), 2**31)}, r'has x of 2\*\*31 and more; write smaller'),
  ],
)
def test_contents_that_are_refused(tmp_path, content, message):
  path = write(tmp_path, 'npz', fields(**content))
  with pytest.raises(ValueError, match=message) as error:
    arrays.load(config(path, **ALL), 'train').fetch(np.arange(10))
  assert str(error.value).startswith(f'config.data.path={str(path)!r} has ')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'image_shape': (6, 4, 2)},
      r'image_shape=\(6, 4, 2\) but .* has \(4, 6, 2\); .*=4,6,2',
    ),
    ({'condition_shape': (4, 6, 1)}, r'condition_shape=\(4, 6, 1\) but .* \(2, 3, 5\); .*=2,3,5'),
    ({'embedding_size': 3}, r'embedding_size=3 but fields.npz has 7; set .*embedding_size=7'),
    ({'num_classes': 2}, r'num_classes=2 but fields.npz has label 2 in example \[2\]; .*=3, or 0'),
    ({'num_values': 256}, r'num_values=256 but x of fields.npz is float32; .*num_values=0'),
    ({'resize': True}, r'resize=True but fields.npz has none; set .*resize=False'),
    ({'path': ''}, r"path='' does not exist; give .npz, .npy, .h5"),
    ({'path': '/no/where.npz'}, r"path='/no/where.npz' does not exist"),
    ({'path': __file__}, r'path=.*\.py. is no file of arrays; give .npz'),
    ({'eval_split': '[9:]'}, r'eval_split=.* shares 1 examples'),
  ],
)
def test_leaves_that_are_refused(tmp_path, changes, message):
  path = write(tmp_path, 'npz', fields())
  with pytest.raises(ValueError, match='config.data.' + message) as error:
    arrays.load(config(path, **changes), 'train')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('leaf', ['condition_shape', 'embedding_size', 'num_classes', 'masked'])
def test_what_is_not_there_is_refused(tmp_path, leaf):
  path = write(tmp_path, 'npy', fields())
  nothing = {'condition_shape': '', 'embedding_size': 0, 'num_classes': 0, 'masked': False}[leaf]
  with pytest.raises(ValueError, match=rf'{leaf}=.* has none; set --config.data.{leaf}={nothing}$'):
    arrays.load(config(path, **{leaf: ALL[leaf]}), 'train')


def test_a_folder_that_is_no_zarr_is_refused(tmp_path):
  (tmp_path / 'a').mkdir()
  with pytest.raises(ValueError, match=r'is no zarr array or group; give'):
    arrays.load(config(tmp_path), 'train')


def test_compressed_arrays_that_do_not_fit_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(columns, 'IN_MEMORY', 100)
  path = write(tmp_path, 'compressed', fields())
  with pytest.raises(ValueError, match=r'has compressed arrays of 0.0 GB \(x, .*numpy.savez inst'):
    arrays.load(config(path), 'train')


@pytest.mark.parametrize('kind', ['npy', *KINDS])
def test_damage_is_told_in_one_line_with_the_name(tmp_path, kind):
  path = write(tmp_path, kind, fields())
  if path.is_dir():
    for part in (path / 'x').rglob('*'):
      if part.is_file() and part.name not in ('.zarray', 'zarr.json'):
        part.write_bytes(b'damaged')
  else:
    path.write_bytes(path.read_bytes()[:700])
  told = f'{path}.* cannot be read .*; write or copy it again'
  with pytest.raises(files.Damaged, match=told) as error:
    arrays.load(config(path), 'train').fetch(np.arange(3))
  assert '\n' not in str(error.value)
  if path.is_dir():
    meta = next(p for p in (path / 'x').iterdir() if p.name in ('.zarray', 'zarr.json'))
    meta.write_text('{')
    with pytest.raises(
      files.Damaged, match=rf'{path}.*x/.* cannot be read \(|{path}.* cannot be read \(.*x/'
    ) as error:
      arrays.load(config(path), 'train')
    assert 'x/' in str(error.value)  # which array it is
    assert '_spec=' not in str(error.value)  # pages of what tensorstore was asked for


def test_a_header_that_declares_more_than_there_is_is_damage(tmp_path):
  """The next member of the zip file would be read as numbers."""
  path = write(tmp_path, 'npz', fields())
  content = path.read_bytes()
  assert content.count(b'(12, 4, 6, 2)') == 1
  path.write_bytes(content.replace(b'(12, 4, 6, 2)', b'(13, 4, 6, 2)'))
  with pytest.raises(files.Damaged, match=r'declares an array of \(13, 4, 6, 2\), and has less'):
    arrays.load(config(path), 'train')


def test_hdf5_without_h5py_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'h5py', None)
  path = tmp_path / 'a.hdf5'
  path.write_bytes(b'')
  with pytest.raises(
    ValueError, match=r"path='.*a.hdf5' needs h5py; pip install 'vdm-jax\[hdf5\]'"
  ):
    arrays.load(config(path), 'train')


def test_the_number_of_values_is_that_of_all_examples(tmp_path):
  x = np.random.default_rng(0).integers(0, 100, (3000, 2, 2, 1)).astype(np.int16)
  x[1777, 1, 0, 0] = 4000
  np.savez(tmp_path / 'a.npz', x=x)
  found = arrays.found(config(tmp_path / 'a.npz', train_split='[:2000]', eval_split='[2000:]'))
  assert found['num_values'] == 4001


@pytest.mark.parametrize('each', [True, False])
def test_a_mask_of_nan_says_nothing(tmp_path, each):
  mask = np.ones((COUNT, *SHAPE[:2]) if each else SHAPE[:2])
  mask.reshape(-1)[3] = np.nan
  path = write(tmp_path, 'npz', {'x': fields()['x'], 'mask': mask})
  with pytest.raises(ValueError, match=r'nan or inf in mask of example \[0\]'):
    arrays.load(config(path, masked=True), 'train').fetch(np.arange(2))


def test_the_range_of_large_values_is_theirs(tmp_path):
  """As masses in suns are: 1e12 and more, all beyond 2^31."""
  x = np.linspace(1e12, 2e12, COUNT * 48).reshape(COUNT, *SHAPE)
  path = write(tmp_path, 'npz', {'x': x.astype(np.float32)})
  data = my_arrays.get_config().data.copy_and_resolve_references().unlock()
  data.update(path=str(path), train_split='[:10]', eval_split='[10:]')
  found = data_module.load(settle.as_found(data), 'train').identity
  assert found['value_min'] == pytest.approx(1e12) and found['value_max'] > 1.5e12


def test_vectors_are_fields_of_one_position(tmp_path):
  np.savez(tmp_path / 'vectors.npz', x=np.random.default_rng(0).normal(size=(60, 1, 3)))
  config = my_arrays.get_config('debug').unlock()
  config.data.path = str(tmp_path / 'vectors.npz')
  assert loop.train(config.lock(), tmp_path / 'run') == 0
  assert not (tmp_path / 'run' / 'plots' / 'spectrum.png').exists()
