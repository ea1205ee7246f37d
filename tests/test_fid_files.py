"""Images, references and commands, as files."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from vdm.configs import default

from vdm import data, fid, parallel, shards
from vdm.fid import images, references

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('rank_promotion_allowed')


def pictures(seed, count=20, shape=(8, 8, 3)):
  return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def save(folder, array, suffix='png'):
  folder.mkdir(exist_ok=True)
  for i, image in enumerate(array):
    Image.fromarray(image.squeeze()).save(folder / f'{i:03}.{suffix}')
  return str(folder)


def statistics_network(settings, image_shape, num_values):
  """A dotted path's network: pixels, cut to 12 numbers."""
  del settings, image_shape, num_values
  apply = lambda params, x: {'features': x.reshape(len(x), -1)[:, :12] * params}
  return fid.Network('pixels', 'pixels', 'abc', 12, np.float32(1 / 255), lambda x: x + 0.0, apply)


@pytest.fixture
def extractor():
  config = default.get_config()
  config.data.num_values = 256
  config.fid.features = f'{__name__}.statistics_network'
  return fid.make(config, parallel.make_mesh(), (8, 8, 3))


def test_a_folder_an_npz_and_shards_are_the_same_images(tmp_path):
  array = pictures(0)
  folder = save(tmp_path / 'png', array)
  np.savez(tmp_path / 'one.npz', arr_0=array)
  (tmp_path / 'shards').mkdir()
  (tmp_path / 'drawn').mkdir()
  np.savez(tmp_path / 'shards' / 'a.npz', images=array[:13], labels=np.zeros(13))
  np.savez(tmp_path / 'shards' / 'b.npz', images=array[13:])
  shards.write(tmp_path / 'drawn', 'png', 0, array, 256)
  save(tmp_path / 'drawn' / '.00000020.part', array[:2])  # what a kill left there
  order = np.random.default_rng(1).permutation(20)
  for path in (folder, *(tmp_path / name for name in ('one.npz', 'shards', 'drawn'))):
    source = images.load(str(path))
    assert len(source) == 20 and source.identity['image_shape'] == [8, 8, 3]
    np.testing.assert_array_equal(source.fetch(order)['image'], array[order])
  grey = save(tmp_path / 'grey', pictures(0, shape=(8, 8, 1)))
  assert images.load(grey).identity['image_shape'] == [8, 8, 1]


def test_bad_images_are_refused_by_name(tmp_path, caplog):
  folder = tmp_path / 'images'
  save(folder, pictures(0))
  whole = (folder / '003.png').read_bytes()
  (folder / '003.png').write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r'003.png cannot be decoded .*; write it again'):
    images.load(str(folder))
  Image.fromarray(pictures(0, 1, (9, 8, 3))[0]).save(folder / '003.png')
  with pytest.raises(ValueError, match=r'003.png is \(9, 8, 3\), but .*000.png \(8, 8, 3\)'):
    images.load(str(folder))
  Image.fromarray(pictures(0, 1, (8, 8, 4))[0]).save(folder / '003.png')
  with pytest.raises(ValueError, match='kind RGBA, must be 8-bit grey or RGB'):
    images.load(str(folder))
  with pytest.raises(ValueError, match='does not exist; give a folder of PNG files'):
    images.load(str(tmp_path / 'missing'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='holds no picture'):
    images.load(str(tmp_path / 'empty'))
  np.savez(tmp_path / 'float.npz', arr_0=np.zeros((2, 8, 8, 3)))
  with pytest.raises(ValueError, match=r'arr_0 of float64 .*, must be uint8'):
    images.load(str(tmp_path / 'float.npz'))
  (tmp_path / 'cut.npz').write_bytes(b'PK nonsense')
  with pytest.raises(ValueError, match='is no NPZ file, or is cut short'):
    images.load(str(tmp_path / 'cut.npz'))
  with caplog.at_level(logging.WARNING):
    images.load(save(tmp_path / 'jpeg', pictures(0, 3), 'jpg'))
  assert '000.jpg and 2 more are JPEG' in caplog.text


def test_a_reference_reads_back_and_is_refused_for_another_extractor(tmp_path, extractor):
  source = images.load(save(tmp_path / 'real', pictures(0)))
  written = references.of_source(source, extractor, 16)
  assert written.facts['num_images'] == 20 and written.facts['data'] == source.identity
  path = tmp_path / 'reference.npz'
  references.write(path, written)
  read = references.read(str(path), extractor, 16)
  assert read.facts == written.facts
  np.testing.assert_allclose(
    read.rows['features'], pictures(0).reshape(20, -1)[:, :12] / 255, rtol=1e-6
  )
  np.testing.assert_allclose(read.gaussians['features'].covariance, np.cov(read.rows['features'].T))
  extractor.name = 'pixels of another kind'
  with pytest.raises(
    ValueError, match=r'is of the extractor pixels, but config.fid.features is pixels of'
  ):
    references.read(str(path), extractor, 16)
  extractor.name = 'pixels'
  path.write_bytes(path.read_bytes()[:-400])
  with pytest.raises(ValueError, match=r'reference.npz cannot be read .*; fetch or make it again'):
    references.read(str(path), extractor, 16)


def test_published_files_are_inceptions_and_their_images_serve_the_rest(tmp_path, extractor):
  rows = pictures(0).reshape(20, -1)[:, :12] / 255
  moments = dict(mu=rows.mean(axis=0), sigma=np.cov(rows.T))
  adm = tmp_path / 'adm.npz'
  np.savez(adm, arr_0=pictures(0), **moments, mu_s=np.zeros(7), sigma_s=np.eye(7))
  with pytest.raises(ValueError, match='is of the extractor inception-2015-12-05, but'):
    references.read(str(adm), extractor, 16)
  extractor.label = 'inception'
  read = references.read(str(adm), extractor, 16)
  assert read.gaussians['spatial'].mean.shape == (7,) and read.rows['features'].shape == (20, 12)
  np.savez(tmp_path / 'edm.npz', **moments)
  read = references.read(str(tmp_path / 'edm.npz'), extractor, 16)
  assert read.rows == {} and set(read.gaussians) == {'features'}
  np.savez(tmp_path / 'edm.npz', mu=np.zeros(64), sigma=np.eye(64))
  with pytest.raises(ValueError, match=r'has mu \(64,\) and sigma \(64, 64\), must be \(12,\)'):
    references.read(str(tmp_path / 'edm.npz'), extractor, 16)


def test_the_training_split_is_the_reference_and_is_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  config = default.get_config()
  config.fid.features = f'{__name__}.statistics_network'
  extractor = fid.make(config, parallel.make_mesh())
  first = fid.of_config(config, extractor)
  assert first.facts['num_images'] == 1437 and first.facts['data']['split'] == 'train'
  monkeypatch.setattr(data, 'eval_batches', None)  # not again
  again = fid.of_config(config, extractor)
  np.testing.assert_array_equal(again.gaussians['features'].mean, first.gaussians['features'].mean)


def test_stats_and_score_from_the_command_line(tmp_path):
  from vdm.fid import __main__ as cli  # here: the command imports this file, and flags are its own

  folder, real = save(tmp_path / 'images', pictures(1, 30)), tmp_path / 'real.npz'
  np.savez(real, arr_0=pictures(0, 40))
  config = default.get_config()
  config.data.num_values = 256
  config.fid.features = 'test_fid_files.statistics_network'
  out, folder_of_cards = str(tmp_path / 'reference.npz'), tmp_path / 'cards'
  assert 'reference.npz: 40 images, pixels' in cli.stats(config, out, str(real))
  # without --config it is Inception on 8-bit images, here with another network in its place
  command = [sys.executable, '-m', 'vdm.fid', 'score', folder, out, f'--out={folder_of_cards}']
  command += [f'--config.fid.features={config.fid.features}', '--config.fid.num_images=25']
  env = os.environ | {'PYTHONPATH': str(ROOT / 'tests')}
  run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
  assert run.returncode == 0, run.stderr
  found = json.loads(run.stdout)
  rows = [pictures(*a).reshape(a[1], -1)[:, :12] / 255 for a in ((1, 30), (0, 40))]
  want = fid.frechet_distance(fid.fit(rows[0][:25]), fid.fit(rows[1]))
  assert found['fd_pixels']['value'] == pytest.approx(want, rel=1e-5)
  assert found['fd_pixels']['low'] < want < found['fd_pixels']['high']
  (path,) = folder_of_cards.glob('fd_pixels_25_*.json')
  card = json.loads(path.read_text())
  assert card['extractor'] == 'pixels' and card['num_samples'] == 25
  assert card['value'] == found['fd_pixels']['value']


def test_too_few_images_are_refused(tmp_path, extractor):
  from vdm.fid import __main__ as cli

  config = default.get_config()
  folder = save(tmp_path / 'images', pictures(1, 30))
  with pytest.raises(ValueError, match=r'num_images=50000 must be at most the 30 .*num_images=30'):
    cli.score(config, folder, 'unread.npz')
  with pytest.raises(
    ValueError, match=r'num_images=12 must be 13 or more, or the covariance of 12'
  ):
    fid.check_count(config.fid, 12, extractor)
  fid.check_count(config.fid, 13, extractor)
  config.fid.allow_few = True
  fid.check_count(config.fid, 12, extractor)
