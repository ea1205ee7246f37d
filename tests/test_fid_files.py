"""Images, references and commands, as files."""

import json
import logging
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from vdm.configs import default

from vdm import data, fid
from vdm.diffusion.decoders import discrete
from vdm.fid import images, references
from vdm.sampling.folder import encode_png, write_shard
from vdm.system import parallel

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


def blocks(config):
  return config.fid, config.data


@pytest.fixture
def extractor():
  config = default.get_config()
  config.data.num_values = 256
  config.fid.features = f'{__name__}.statistics_network'
  return fid.make(config.fid, config.data, parallel.make_mesh(), (8, 8, 3))


def test_a_folder_an_npz_and_shards_are_the_same_images(tmp_path):
  array = pictures(0)
  folder = save(tmp_path / 'png', array)
  np.savez(tmp_path / 'one.npz', arr_0=array)
  (tmp_path / 'shards').mkdir()
  (tmp_path / 'drawn').mkdir()
  np.savez(tmp_path / 'shards' / 'a.npz', images=array[:13], labels=np.zeros(13))
  np.savez(tmp_path / 'shards' / 'b.npz', images=array[13:])
  write_shard(tmp_path / 'drawn', 'png', 0, array, discrete(256))
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
  with pytest.raises(ValueError, match=r'003.png cannot be read .*; write it again'):
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
  with pytest.raises(ValueError, match=r'cannot be read \(.*; write it again'):
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
  order = np.random.RandomState(0).permutation(20)
  rows = pictures(0)[order].reshape(20, -1)[:, :12] / 255
  np.testing.assert_allclose(read.rows['features'], rows, rtol=1e-6)
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


def test_rows_that_are_kept_are_of_the_whole_set(tmp_path, extractor, monkeypatch):
  """Pictures may lie class by class: here the later half is white."""
  monkeypatch.setattr(references, 'KEPT', 10)
  content = np.where(np.arange(20)[:, None, None, None] < 10, 0, 255)
  content = np.broadcast_to(content, pictures(0).shape).astype(np.uint8)
  found = references.of_source(images.load(save(tmp_path / 'real', content)), extractor, 16)
  assert len(found.rows['features']) == 10
  assert 0.1 < found.rows['features'].mean() < 0.9


def test_the_training_split_is_the_reference_and_is_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  config = default.get_config()
  config.fid.features = f'{__name__}.statistics_network'
  extractor = fid.make(config.fid, config.data, parallel.make_mesh())
  first = fid.of_config(config.fid, config.data, extractor)
  assert first.facts['num_images'] == 1437 and first.facts['data']['split'] == 'train'
  monkeypatch.setattr(data, 'eval_batches', None)  # not again
  again = fid.of_config(config.fid, config.data, extractor)
  np.testing.assert_array_equal(again.gaussians['features'].mean, first.gaussians['features'].mean)


def test_stats_and_score_from_the_command_line(tmp_path):
  from vdm.fid import __main__ as cli  # here: the command imports this file, and flags are its own

  folder, real = save(tmp_path / 'images', pictures(1, 30)), tmp_path / 'real.npz'
  np.savez(real, arr_0=pictures(0, 40))
  config = default.get_config()
  config.data.num_values = 256
  config.fid.features = 'test_fid_files.statistics_network'
  out, folder_of_cards = str(tmp_path / 'reference.npz'), tmp_path / 'cards'
  assert 'reference.npz: 40 images, pixels' in cli.stats(*blocks(config), out, str(real))
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
    cli.score(*blocks(config), folder, 'unread.npz')
  with pytest.raises(
    ValueError, match=r'num_images=12 must be 13 or more, or the covariance of 12'
  ):
    fid.check_count(config.fid, 12, extractor)
  fid.check_count(config.fid, 13, extractor)
  config.fid.allow_few = True
  fid.check_count(config.fid, 12, extractor)
  for halves, few, least in ((20, 3, 4), (0, 1, 2)):  # a covariance, and that of each half
    config.fid.halves = halves
    with pytest.raises(ValueError, match=f'num_images={few} must be {least} or more with .*halves'):
      fid.check_count(config.fid, few, extractor)
    fid.check_count(config.fid, least, extractor)


@pytest.mark.parametrize('num_images, halves', [(4, 2), (2, 0), (2, 1)])
def test_the_fewest_images_that_are_allowed_give_numbers(num_images, halves, extractor):
  batches = fid.batches_of([pictures(0, num_images)], extractor, 8)
  samples = fid.collect(extractor, batches, num_images)
  real = pictures(1, 2)
  gaussian = fid.fit(real.reshape(2, -1)[:, :12] / 255)
  rows = {'features': np.float32(real.reshape(2, -1)[:, :12] / 255)}
  reference = fid.Reference({'features': gaussian}, rows, {'num_images': 2})
  found = fid.measure(samples, reference, extractor.label, halves)
  assert all(np.isfinite(estimate['value']) for estimate in found.values())


def test_a_reference_of_too_few_images_is_refused_as_samples_are(tmp_path, extractor):
  from vdm.fid import __main__ as cli

  config = default.get_config()
  config.data.num_values = 256
  config.fid.update(features='test_fid_files.statistics_network', num_images=30, halves=0)
  samples, real = save(tmp_path / 'samples', pictures(1, 30)), tmp_path / 'real.npz'
  np.savez(real, arr_0=pictures(0, 12))
  few = tmp_path / 'few.npz'
  references.write(few, references.of_source(images.load(str(real)), extractor, 16))
  message = r' has 12 images, must have 13 or more, or the covariance of 12 .*; make one of more'
  for path in (real, few):
    with pytest.raises(ValueError, match=f'reference {path}{message}'):
      cli.score(*blocks(config), samples, str(path))
    config.fid.reference = str(path)
    with pytest.raises(ValueError, match=message):
      fid.of_config(config.fid, config.data, extractor)
  config.fid.allow_few = True
  assert fid.of_config(config.fid, config.data, extractor).facts['num_images'] == 12


def as_png(image):
  """The content of a PNG file; Pillow writes no 16-bit colour."""
  if image.dtype == np.uint8 or image.ndim == 2:
    return encode_png(Image.fromarray(image))
  height, width, _ = image.shape
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in image)

  def chunk(kind, content):
    body = kind + content
    return struct.pack('>I', len(content)) + body + struct.pack('>I', zlib.crc32(body))

  header = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
  parts = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + parts


DEEP = (257 * np.arange(30)).astype(np.uint16).reshape(5, 6)
OPAQUE = np.concatenate([pictures(0, 1, (5, 6, 3))[0], np.full((5, 6, 1), 255, np.uint8)], axis=-1)
SEEN_THROUGH = np.where(np.arange(4) == 3, 128, OPAQUE).astype(np.uint8)


@pytest.mark.parametrize(
  'content, want',
  [
    (as_png(DEEP), 'I;16'),
    (as_png(np.stack([DEEP] * 3, axis=-1)), 'RGB;16'),
    (as_png(SEEN_THROUGH), 'RGBA'),
    (as_png(OPAQUE), OPAQUE[..., :3]),
    (as_png(OPAQUE[..., :3]), OPAQUE[..., :3]),
  ],
)
def test_training_and_fid_read_pixels_alike_and_refuse_alike(content, want, tmp_path):
  """Through a TFDS data set, and through a folder of pictures."""
  import tensorflow_datasets as tfds

  (tmp_path / 'folder').mkdir()
  (tmp_path / 'folder/0.png').write_bytes(content)
  tfds.dataset_builders.store_as_tfds_dataset(
    name='pictures',
    version='1.0.0',
    features=tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(5, 6, 3))}),
    split_datasets={'train': [(0, {'image': str(tmp_path / 'folder/0.png')})]},
    data_dir=tmp_path,
    file_format='array_record',
  )
  settings = default.get_config().data.unlock()
  settings.update(name='pictures', dir=str(tmp_path), train_images=1, image_shape=(5, 6, 3))
  settings.update(num_values=256, num_classes=0)
  sources = [lambda: data.load(settings, 'train'), lambda: images.load(str(tmp_path / 'folder'))]
  if isinstance(want, str):
    for source in sources:
      with pytest.raises(ValueError, match=f'pixels of kind {want}, must be 8-bit grey or RGB'):
        source()
    return
  first, second = (source() for source in sources)
  np.testing.assert_array_equal(first[0]['image'], want)
  np.testing.assert_array_equal(second[0]['image'], want)
  assert first.identity['sha256_first_64'] == second.identity['sha256_first_64']
