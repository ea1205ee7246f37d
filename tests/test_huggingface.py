"""What Hugging Face's `datasets` saved is read as a folder of pictures, or a file of arrays, is."""

import io
import logging
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vdm.data import huggingface

SHAPE = (4, 6, 3)
NAMES = ['cat', 'dog', 'owl']


@pytest.fixture
def datasets(tmp_path_factory, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
  package = pytest.importorskip('datasets')
  package.disable_progress_bars()
  return package


def config(path, /, **changes):
  leaves = {
    'name': 'huggingface',
    'path': str(path),
    'train_split': 'train',
    'eval_split': 'test',
    'eval_share': 0.3,
    'train_images': 0,
    'eval_images': 0,
    'image_shape': SHAPE,
    'num_values': 256,
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


def pixels(numbers):
  return np.stack([np.random.default_rng(i).integers(0, 256, SHAPE, np.uint8) for i in numbers])


def png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return {'bytes': file.getvalue(), 'path': None}


def pictures(datasets, numbers, **columns):
  """A data set of PNG pictures, whose labels are their numbers modulo 3."""
  rows = {'image': [png(image) for image in pixels(numbers)], 'label': [i % 3 for i in numbers]}
  features = {'image': datasets.Image(), 'label': datasets.ClassLabel(names=NAMES)}
  for name, (feature, values) in columns.items():
    features[name], rows[name] = feature, values
  return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def everything(data, split):
  images = huggingface.load(data, split)
  batch = images.fetch(np.arange(images.num_images))
  np.testing.assert_array_equal(images.labels(np.arange(images.num_images)), batch['label'])
  return batch


@pytest.mark.parametrize('cached', [True, False])
def test_pictures_of_named_splits(datasets, tmp_path, cached):
  parts = {'train': pictures(datasets, range(5)), 'test': pictures(datasets, range(5, 8))}
  datasets.DatasetDict(parts).save_to_disk(tmp_path)
  data = config(tmp_path, num_classes=3, cache=cached)
  leaves = huggingface.found(data)
  data.train_images, data.eval_images = 5, 3
  assert leaves == {name: data[name] for name in leaves}
  for split, numbers in (('train', range(5)), ('eval', range(5, 8))):
    batch = everything(data, split)
    np.testing.assert_array_equal(batch['image'], pixels(numbers))
    np.testing.assert_array_equal(batch['label'], np.array(numbers) % 3)
  data = config(tmp_path, train_split='train[:2]', eval_split='train[2:]', cache=cached)
  np.testing.assert_array_equal(everything(data, 'eval')['image'], pixels(range(2, 5)))
  with pytest.raises(ValueError, match=r"eval_split='valid' is none .*'train', 'test', or a range"):
    huggingface.load(config(tmp_path, eval_split='valid'), 'train')
  data = config(tmp_path, resize=True, image_shape=(2, 2, 1), cache=cached)
  assert everything(data, 'train')['image'].shape == (5, 2, 2, 1)


def test_missing_labels_are_no_class(datasets, tmp_path, caplog):
  label = datasets.Value('int64'), [1, None, *range(18)]
  pictures(datasets, range(20), label=label).save_to_disk(tmp_path)
  assert huggingface.found(config(tmp_path))['num_classes'] == 0
  assert 'labels are ignored; example 1 has nan' in caplog.text
  with pytest.raises(ValueError, match=r'num_classes=3 but .* has 0'):
    huggingface.load(config(tmp_path, num_classes=3), 'train')


def test_a_single_data_set_is_split_by_hash(datasets, tmp_path):
  pictures(datasets, range(20)).save_to_disk(tmp_path)
  parts = [everything(config(tmp_path), split)['image'] for split in ('train', 'eval')]
  assert 2 < len(parts[1]) < 12
  stored = {image.tobytes() for image in pixels(range(20))}
  assert {image.tobytes() for part in parts for image in part} == stored
  assert len(parts[0]) + len(parts[1]) == 20


def test_a_broken_picture_is_left_out_by_its_row(datasets, tmp_path, caplog):
  table = pictures(datasets, range(4))
  rows = table.cast_column('image', datasets.Image(decode=False)).to_dict()
  rows['image'][2]['bytes'] = rows['image'][2]['bytes'][:60]
  datasets.Dataset.from_dict(rows, features=table.features).save_to_disk(tmp_path)
  data = config(tmp_path, train_split='[:3]', eval_split='[3:]')
  with caplog.at_level(logging.INFO):
    np.testing.assert_array_equal(everything(data, 'train')['image'], pixels([0, 1]))
  assert f'{tmp_path}: 3 pictures; left out: 1 broken (row 2: ' in caplog.text


def test_labels_that_are_no_integers_are_ignored(datasets, tmp_path, caplog):
  table = pictures(datasets, range(20)).remove_columns('label')
  table.add_column('label', ['a', 'b'] * 10).save_to_disk(tmp_path)
  with caplog.at_level(logging.INFO):
    assert huggingface.found(config(tmp_path))['num_classes'] == 0
  assert "labels of string are ignored; class_encode_column('label')" in caplog.text


@pytest.mark.parametrize('dtype', ['uint8', 'float32', 'int64'])
@pytest.mark.parametrize('fixed', [True, False])
def test_arrays(datasets, tmp_path, dtype, fixed):
  images = pixels(range(20)).astype(dtype)
  vectors = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
  value = datasets.Value(dtype)
  lists = datasets.List(datasets.List(datasets.List(value)))
  features = {
    'image': datasets.Array3D(SHAPE, dtype) if fixed else lists,
    'label': datasets.Value('int32'),
    'vector': datasets.List(datasets.Value('float32')),
  }
  rows = {
    'image': images.tolist(),
    'label': list(range(20)),
    'vector': vectors.tolist(),
  }
  datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path)
  num_values = 0 if dtype == 'float32' else 256
  data = config(tmp_path, num_classes=20, embedding_size=5, num_values=num_values)
  leaves = huggingface.found(data)
  assert leaves['image_shape'] == SHAPE and leaves['num_values'] == num_values
  assert leaves['num_classes'] == 20 and leaves['embedding_size'] == 5
  for split in ('train', 'eval'):
    batch = everything(data, split)
    assert batch['image'].dtype == {'int64': np.int32}.get(dtype, np.dtype(dtype))
    np.testing.assert_array_equal(batch['image'], images[batch['label']])
    np.testing.assert_array_equal(batch['vector'], vectors[batch['label']])


def test_refusals(datasets, tmp_path, monkeypatch):
  pictures(datasets, range(3)).rename_column('image', 'img').save_to_disk(tmp_path / 'img')
  with pytest.raises(ValueError, match=r"has no column image; it has img, label; rename .*'image'"):
    huggingface.load(config(tmp_path / 'img'), 'train')
  with pytest.raises(ValueError, match=r"path='' is no folder; give the folder that save_to_disk"):
    huggingface.load(config(''), 'train')
  (tmp_path / 'other').mkdir()
  with pytest.raises(
    ValueError, match=rf'{tmp_path}/other cannot be read .*; give the folder that'
  ):
    huggingface.load(config(tmp_path / 'other'), 'train')
  pictures(datasets, range(3)).save_to_disk(tmp_path / 'cut')
  (path,) = (tmp_path / 'cut').glob('*.arrow')
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match=rf'{tmp_path}/cut cannot be read') as error:
    huggingface.load(config(tmp_path / 'cut'), 'train')
  assert '\n' not in str(error.value)
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ValueError, match=r"needs the package datasets; pip install 'vdm-jax\[hugg"):
    huggingface.load(config(tmp_path), 'train')
