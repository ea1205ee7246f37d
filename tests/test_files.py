"""Files of a run on gs://, by a bucket that is a local directory."""

import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath
from vdm.configs import digits

from vdm import cards, style
from vdm.diffusion.decoders import discrete
from vdm.sampling.folder import open_samples, read_shards, write_shard
from vdm.sampling.picture import save_png
from vdm.system import files
from vdm.workdir import checkpoint, config_file


class Bucket:
  """In the place of the backend that etils uses for gs://."""

  def __init__(self, root):
    self._root = str(root)

  def __getattr__(self, name):
    method = getattr(epath.backend.os_backend, name)

    def call(*args, **options):
      local = [self._root + a[4:] if str(a).startswith('gs://') else a for a in args]
      result = method(*local, **options)
      return [f'gs:/{a.removeprefix(self._root)}' for a in result] if name == 'glob' else result

    return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """gs://bucket/run; whoever takes that for a local name fails, or leaves it in the directory."""
  here = tmp_path / 'here'
  here.mkdir()
  monkeypatch.chdir(here)
  monkeypatch.setattr(epath.backend, 'tf_backend', Bucket(tmp_path))
  yield epath.Path('gs://bucket/run')
  assert not list(here.iterdir())


def fails(*_):
  raise OSError


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'a' / 'b.txt'
  files.write(path, 'old')
  with monkeypatch.context() as patch, pytest.raises(OSError):
    patch.setattr(os, 'replace', fails)
    files.write(path, b'new')
  assert path.read_text() == 'old'
  files.write(path, b'new')
  assert path.read_text() == 'new' and [p.name for p in path.parent.iterdir()] == ['b.txt']


def test_two_that_write_one_file_do_not_disturb_each_other(tmp_path):
  """A reader finds the text of one or of the other, whole."""
  path, texts = tmp_path / 'it.txt', ['a' * 20_000, 'b' * 20_000]
  files.write(path, texts[0])

  def work(text):
    for _ in range(300):
      files.write(path, text)
      assert path.read_text() in texts

  with ThreadPoolExecutor(2) as pool:
    list(pool.map(work, texts))
  assert [p.name for p in tmp_path.iterdir()] == ['it.txt']


def test_a_path_on_gs_is_absolute_as_it_is(bucket):
  assert str(files.absolute('gs://bucket/run')) == 'gs://bucket/run'
  assert str(files.absolute('runs/x')) == f'{pathlib.Path.cwd()}/runs/x'
  assert str(checkpoint.manager(bucket).directory) == 'gs://bucket/run/checkpoints'


def test_config_and_cards_are_written_to_gs_and_read_again(bucket):
  config = digits.get_config('debug')
  config_file.open_workdir(str(bucket), config)
  config.train.batch_size = 16
  with pytest.raises(ValueError, match=r'holds a run with config\.train\.batch_size=8, not 16'):
    config_file.open_workdir(str(bucket), config)
  card = {'metric': 'bits_per_dim', 'bound': 'continuous-time ELBO', 'params': 'ema', 'step': 4}
  card |= {'data': {'split': 'test'}, 'value': 3.0, 'stderr': 0.1, 'eval_seed': 0}
  card |= {'num_images': 360, 'whole_split': True}
  cards.write(cards.path_of(bucket, ('bits_per_dim', 'ema'), {}, 4), card)
  assert cards.last_result(bucket).startswith(
    'ema parameters, continuous-time ELBO, all 360 images of test, 1 draw, seed 0: '
    '3.00 +- 0.10 bits/dim at step 4, the best of 1 (gs://'
  )


@pytest.mark.parametrize('image_format', ['npz', 'png'])
def test_images_are_written_to_gs_and_read_again(image_format, bucket):
  manifest = {'num_images': 4, 'batch_size': 4, 'format': image_format}
  assert open_samples(bucket / 'samples', manifest) == [0]
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
  write_shard(bucket / 'samples', image_format, 0, images, discrete(256))
  assert open_samples(bucket / 'samples', manifest) == []
  (found,) = read_shards(bucket / 'samples')
  np.testing.assert_array_equal(found, images)
  save_png(bucket / 'grid.png', images[0])
  assert (bucket / 'grid.png').read_bytes().startswith(b'\x89PNG')


def test_figures_and_tables_are_written_to_gs(bucket):
  style.save(style.figure(1, (4, 3))[0], bucket / 'plots' / 'a.png')
  assert (bucket / 'plots' / 'a.png').read_bytes().startswith(b'\x89PNG')
  files.write_table(bucket / 'tables' / 'a.csv', ('a', 'b'), [(1, 'x, y')])
  assert (bucket / 'tables' / 'a.csv').read_bytes() == b'a,b\r\n1,"x, y"\r\n'


@pytest.mark.parametrize(
  ('typed', 'path'),
  [('file:///a/b', '/a/b'), ('~/a', '/home/me/a'), ('a/b', 'a/b'), ('gs://a/b', 'gs://a/b')],
)
def test_a_path_is_where_it_says(typed, path, monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert str(files.path_of(typed)) == path


def test_without_tensorflow_a_bucket_is_refused_in_one_line(monkeypatch):
  monkeypatch.setattr(files, 'has_tensorflow', lambda: False)
  assert str(files.path_of('a/b')) == 'a/b'
  with pytest.raises(
    ValueError, match=r"gs://a/b is read by TensorFlow: pip install 'vdm-jax\[ten"
  ):
    files.path_of('gs://a/b')
