"""A folder of pictures: what is read, what is left out and told, and which split has what."""

import logging
import os
import shutil
import threading

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from vdm.configs import my_folder

from vdm import data as data_module
from vdm.data import decoded, folder, kept, settle, splits
from vdm.system import files, progress
from vdm.training import loop

GREY, COLOUR = (4, 6, 1), (4, 6, 3)


def config(path, /, **changes):
  leaves = {
    'name': 'folder',
    'path': str(path),
    'train_split': '[:50%]',
    'eval_split': '[50%:]',
    'eval_share': 0.1,
    'train_images': 0,
    'eval_images': 0,
    'image_shape': COLOUR,
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


def pixels(number, shape=COLOUR):
  return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def save(path, image, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
  image.save(path, **kwargs)


def everything(data):
  """All examples of both splits, one after the other."""
  batches = []
  for name in ('train', 'eval'):
    split = folder.load(data, name)
    batches.append(split.fetch(np.arange(split.num_images)))
    np.testing.assert_array_equal(split.labels(np.arange(split.num_images)), batches[-1]['label'])
  return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  place = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('XDG_CACHE_HOME', str(place))
  return place / 'vdm' / 'pictures'


@pytest.fixture
def plain(tmp_path):
  """Ten pictures of colour, of which the name is the number."""
  for i in range(10):
    save(tmp_path / f'{i}.png', pixels(i))
  return tmp_path


def lines(caplog):
  return [record.getMessage() for record in caplog.records]


# --- what is read


@pytest.mark.parametrize('cached', [True, False])
def test_pictures_are_those_stored_in_the_order_of_their_names(plain, cached, monkeypatch):
  monkeypatch.setattr(kept, 'BLOCK', 4)
  batch = everything(config(plain, cache=cached))
  np.testing.assert_array_equal(batch['image'], [pixels(i) for i in range(10)])
  assert batch['image'].dtype == np.uint8 and batch['label'].dtype == np.int32
  assert not batch['label'].any()
  split = folder.load(config(plain, cache=cached), 'eval')
  assert split.num_images == 5 and (split.num_threads == 0) == cached
  order = np.array([4, 0, 4, 2])
  np.testing.assert_array_equal(split.fetch(order)['image'], [pixels(5 + i) for i in order])
  split.fetch(order)['image'][:] = 0  # not what is kept
  np.testing.assert_array_equal(split.fetch(order)['image'], [pixels(5 + i) for i in order])


@pytest.mark.parametrize('cached', [True, False])
@pytest.mark.parametrize('suffix', ['png', 'tif', 'bmp', 'gif', 'ppm', 'webp', 'PNG', 'jpg'])
def test_every_format(tmp_path, suffix, cached):
  image = np.full(COLOUR, 77, np.uint8)
  for i in range(2):
    save(tmp_path / f'{i}.{suffix}', image, **({'lossless': True} if suffix == 'webp' else {}))
  np.testing.assert_allclose(everything(config(tmp_path, cache=cached))['image'], 77, atol=2)


@pytest.mark.parametrize('cached', [True, False])
@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, suffix, cached):
  left = np.zeros((6, 4, 3), np.uint8)
  left[:, :2] = 255  # once it is turned by a quarter to the right, the top is white
  exif = Image.Exif()
  exif[0x0112] = 6
  for i in range(2):
    save(tmp_path / f'{i}.{suffix}', left, exif=exif)
  data = config(tmp_path, cache=cached)
  assert folder.found(data)['image_shape'] == COLOUR
  image = everything(data)['image'].astype(int)
  assert image.shape == (2, *COLOUR)
  assert image[:, :2].mean() > 200 and image[:, 2:].mean() < 50


def test_kinds_of_pixels_become_the_channels_asked_for(tmp_path):
  grey = pixels(0, GREY)
  colour = np.repeat(grey, 3, axis=2)
  opaque = np.concatenate([colour, np.full(GREY, 255, np.uint8)], axis=2)
  palette = Image.fromarray(grey.squeeze()).convert('P')
  for i, image in enumerate((grey, colour, opaque, palette)):
    save(tmp_path / f'{i}.png', image)
  data = config(tmp_path)
  assert folder.found(data)['image_shape'] == COLOUR
  np.testing.assert_array_equal(everything(data)['image'], [colour] * 4)
  data = config(tmp_path, image_shape=GREY)
  np.testing.assert_array_equal(everything(data)['image'], [grey] * 4)
  for name in '123':
    (tmp_path / f'{name}.png').unlink()
  save(tmp_path / '1.png', grey)
  assert folder.found(data)['image_shape'] == GREY


@pytest.mark.parametrize('cached', [True, False])
def test_sizes_that_differ_are_refused_or_resized(plain, cached):
  save(plain / 'wide.png', np.full((8, 24, 3), 9, np.uint8))
  with pytest.raises(
    ValueError,
    match=r'resize=False but \S+/0.png is 4 x 6 and \S+/wide.png is '
    r'8 x 24; set --config.data.resize=True',
  ):
    folder.found(config(plain, cache=cached))
  with pytest.raises(
    ValueError,
    match=r'image_shape=\(4, 6, 3\) but \S+wide.png is \(8, 24, 3\); '
    r'set --config.data.resize=True',
  ):
    everything(config(plain, cache=cached))
  data = config(plain, cache=cached, resize=True, image_shape=(2, 3, 3))
  assert folder.found(data)['image_shape'] == (2, 3, 3)
  image = everything(data)['image']
  assert image.shape == (11, 2, 3, 3) and (image[10] == 9).all()
  everything(config(plain, cache=cached, resize=True))
  with pytest.raises(ValueError, match='resize=True'):  # and not what was resized before
    everything(config(plain, cache=cached))


BAD = {
  'text.png': 'broken',
  'cut.png': 'broken',
  'deep.png': 'more than 8 bits per channel',
  'deep.tif': 'more than 8 bits per channel',
  'deep.ppm': 'more than 8 bits per channel',
  'print.jpg': 'of kind CMYK',
}


def make_bad(place):
  (place / 'text.png').write_text('no picture')
  content = (place / '0.png').read_bytes()
  (place / 'cut.png').write_bytes(content[:-30])
  save(place / 'deep.png', Image.fromarray(np.full((4, 6), 999, np.uint16)))
  (place / 'deep.ppm').write_bytes(b'P6 6 4 65535\n' + bytes(4 * 6 * 6))
  save(place / 'deep.tif', Image.fromarray(np.full((4, 6), 999, np.uint16)))
  save(place / 'print.jpg', Image.new('CMYK', (6, 4)))
  save(place / 'clear.png', np.full((4, 6, 4), 128, np.uint8))
  (place / 'notes.txt').write_text('no picture')
  (place / '.hidden.png').write_text('no picture')


def test_what_is_not_read_is_told_in_one_line(plain, caplog):
  make_bad(plain)
  data = config(plain)
  with caplog.at_level(logging.INFO):
    leaves = folder.found(data)
    image = everything(data)['image']
  np.testing.assert_array_equal(image, [pixels(i) for i in range(10)])
  assert leaves['train_images'] + leaves['eval_images'] == 10
  (line,) = lines(caplog)
  assert line.startswith(f'{plain}: 10 pictures; left out: ')
  assert '3 more than 8 bits per channel (deep.png, deep.ppm, deep.tif)' in line
  assert '1 transparent (clear.png)' in line and '1 of kind CMYK (print.jpg)' in line
  assert '2 broken (cut.png: ' in line and 'text.png: cannot identify image file)' in line
  assert '1 not named as a picture' in line and 'hidden' not in line


def test_of_several_pages_none_is_taken_for_the_picture(plain, caplog):
  pages = [Image.fromarray(pixels(number)) for number in range(3)]
  for name in ('stack.tif', 'film.gif', 'film.webp'):
    pages[0].save(plain / name, save_all=True, append_images=pages[1:])
  Image.fromarray(pixels(10)).save(plain / 'single.tif')
  with caplog.at_level(logging.INFO):
    image = everything(config(plain))['image']
  assert len(image) == 11
  assert '3 of several pages (film.gif, film.webp, stack.tif)' in lines(caplog)[0]


def test_without_a_cache_a_broken_picture_stops_and_names_itself(plain, caplog):
  make_bad(plain)
  data = config(plain, cache=False)
  with caplog.at_level(logging.INFO):
    leaves = folder.found(data)
  assert leaves['train_images'] + leaves['eval_images'] == 12  # cut.png and clear.png look good
  assert '1 broken (text.png: cannot identify' in lines(caplog)[0]
  for name in ('clear', 'cut'):
    with pytest.raises(files.Damaged, match=rf'{plain}/{name}.png .*cache=True leaves'):
      everything(data)
    (plain / f'{name}.png').unlink()
  assert len(everything(data)['image']) == 10


def test_a_deep_tiff_of_colour_is_not_cut_to_eight_bits(plain, caplog):
  """Pillow does so in silence: a TIFF of 3 x 16 bits, written by hand."""
  tags = [
    (256, 6),
    (257, 4),
    (258, 0),
    (259, 1),
    (262, 2),
    (273, 0),
    (277, 3),
    (278, 4),
    (279, 144),
  ]
  head = 8 + 2 + 12 * len(tags) + 4
  values = dict(tags) | {258: head, 273: head + 6}
  entries = b''.join(
    tag.to_bytes(2, 'little')
    + (3 if tag != 273 else 4).to_bytes(2, 'little')
    + (3 if tag == 258 else 1).to_bytes(4, 'little')
    + values[tag].to_bytes(4, 'little')
    for tag, _ in tags
  )
  content = b'II*\0\x08\0\0\0' + len(tags).to_bytes(2, 'little') + entries + bytes(4)
  (plain / 'deep.tif').write_bytes(content + b'\x10\0' * 3 + bytes(144))
  with Image.open(plain / 'deep.tif') as picture:
    assert picture.mode == 'RGB'
  assert len(everything(config(plain))['image']) == 10
  assert 'more than 8 bits per channel (deep.tif)' in lines(caplog)[0]


# --- classes and splits


def test_folders_are_classes(tmp_path):
  for i, name in enumerate(('b/0.png', 'b/x/1.png', 'a/2.png', 'c/3.png')):
    save(tmp_path / name, pixels(i))
  assert folder.found(config(tmp_path))['num_classes'] == 3
  batch = everything(config(tmp_path, num_classes=3))
  np.testing.assert_array_equal(batch['label'], [0, 1, 1, 2])
  np.testing.assert_array_equal(batch['image'], [pixels(i) for i in (2, 0, 1, 3)])
  assert not everything(config(tmp_path))['label'].any()
  with pytest.raises(ValueError, match=r'num_classes=4 but .* has 3; .*num_classes=3, or 0'):
    folder.load(config(tmp_path, num_classes=4), 'train')
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'a.txt').write_text('')
  with pytest.raises(ValueError, match='in the folder of a class, empty; fill or remove'):
    folder.load(config(tmp_path), 'train')
  save(tmp_path / 'beside.png', pixels(9))
  assert folder.found(config(tmp_path))['num_classes'] == 0
  (tmp_path / 'empty' / 'a.txt').unlink()


def test_a_single_folder_is_no_class_and_links_are_followed(tmp_path):
  for i in range(4):
    save(tmp_path / 'far' / f'{i}.png', pixels(i))
  (tmp_path / 'near').mkdir()
  (tmp_path / 'near' / 'link').symlink_to(tmp_path / 'far')
  (tmp_path / 'near' / 'link' / 'loop').symlink_to(tmp_path / 'near')
  (tmp_path / 'near' / 'gone.png').symlink_to(tmp_path / 'nothing.png')
  data = config(tmp_path / 'near')
  assert folder.found(data)['num_classes'] == 0
  assert len(everything(data)['image']) == 4
  (tmp_path / 'near' / 'gone.png').unlink()
  assert folder.found(data)['num_classes'] == 0
  assert len(everything(data)['image']) == 4


@pytest.mark.parametrize('held_out', splits.HELD_OUT)
def test_folders_are_splits(tmp_path, held_out):
  for i in range(6):
    save(tmp_path / ('train' if i < 4 else held_out) / 'ab'[i % 2] / f'{i}.png', pixels(i))
  save(tmp_path / 'other' / 'c' / '9.png', pixels(9))
  data = config(tmp_path, train_split='train', eval_split=held_out, num_classes=2)
  leaves = folder.found(data)
  assert (leaves['train_images'], leaves['eval_images'], leaves['num_classes']) == (4, 2, 2)
  batch = folder.load(data, 'eval').fetch(np.arange(2))
  np.testing.assert_array_equal(batch['image'], [pixels(4), pixels(5)])
  np.testing.assert_array_equal(batch['label'], [0, 1])
  data = config(tmp_path, train_split='train[:50%]', eval_split='train[50%:]', num_classes=2)
  batch = folder.load(data, 'eval').fetch(np.arange(2))
  np.testing.assert_array_equal(batch['image'], [pixels(1), pixels(3)])
  with pytest.raises(ValueError, match=rf"eval_split='dev' is none .*'{held_out}'"):
    folder.load(config(tmp_path, train_split='train', eval_split='dev'), 'train')


def test_a_hash_of_the_path_holds_examples_out(tmp_path):
  """A picture that comes or goes moves no other one."""
  for i in range(40):
    save(tmp_path / f'{i:02}.png', pixels(i))
  data = config(tmp_path, train_split='train', eval_split='test', eval_share=0.3)

  def names(split):
    images = folder.load(data, split)
    batch = images.fetch(np.arange(images.num_images))['image']
    known = {pixels(i).tobytes(): i for i in range(40)}
    return {known[image.tobytes()] for image in batch}

  before = names('eval')
  assert 4 < len(before) < 20 and names('train') == set(range(40)) - before
  for i in (3, *sorted(before)[:2]):
    (tmp_path / f'{i:02}.png').unlink()
  assert names('eval') == before - {3} - set(sorted(before)[:2])
  digest = int.from_bytes(__import__('hashlib').sha256(b'00.png').digest(), 'big') % 2**32
  assert splits.hashes_of_paths(['00.png'])[0] == digest


# --- the cache


def test_pictures_are_decoded_once_until_one_changes(plain, cache, monkeypatch):
  decodings = []
  decode = decoded.pictures.decode
  monkeypatch.setattr(
    decoded.pictures, 'decode', lambda *a, **k: decodings.append(a[1]) or decode(*a, **k)
  )
  data = config(plain)
  for _ in range(2):
    everything(data)
  assert len(decodings) == 10 and len(list(cache.glob('*.npy'))) == 1
  assert not list(cache.glob('.*'))
  everything(config(plain, resize=True, image_shape=(2, 2, 3)))
  assert len(decodings) == 20 and len(list(cache.glob('*.npy'))) == 2
  save(plain / '3.png', pixels(33))
  os.utime(plain / '3.png', ns=(1, 1))
  np.testing.assert_array_equal(everything(data)['image'][3], pixels(33))
  assert len(decodings) == 30
  path = max(cache.glob('*.npy'), key=os.path.getmtime)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(files.Damaged, match=f'{path} cannot be read .*remove it'):
    everything(data)


def test_a_cache_that_was_not_finished_is_not_there(plain, cache, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(kept.os, 'pwrite', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    folder.load(config(plain), 'train')
  assert not list(cache.glob('*.npy')) and not list(cache.glob('.*'))
  assert len(everything(config(plain))['image']) == 10


def test_two_that_make_the_cache_at_once_make_it_once(plain, monkeypatch):
  made, make = [], kept._make
  monkeypatch.setattr(kept, '_make', lambda *args: made.append(1) or make(*args))
  jobs = [threading.Thread(target=folder.load, args=(config(plain), 'train')) for _ in range(4)]
  for job in jobs:
    job.start()
  for job in jobs:
    job.join()
  assert made == [1]
  assert len(everything(config(plain))['image']) == 10


@pytest.mark.parametrize('why', ['full', 'read-only'])
def test_without_room_pictures_are_decoded_when_read(plain, why, monkeypatch, caplog):
  if why == 'full':
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  else:
    monkeypatch.setattr(kept.os, 'pwrite', lambda *_: (_ for _ in ()).throw(OSError(28, 'full up')))
  with caplog.at_level(logging.INFO):
    split = folder.load(config(plain), 'train')
  assert ('lacks the 0.0 GB' if why == 'full' else 'cannot be written (full up)') in lines(caplog)[
    0
  ]
  assert split.num_threads > 0
  np.testing.assert_array_equal(split.fetch(np.array([2]))['image'], [pixels(2)])


def test_a_line_tells_how_far_it_is(monkeypatch, caplog):
  times = iter(np.arange(0.0, 99.0, 8.0))
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(times))
  with caplog.at_level(logging.INFO):
    assert list(kept.in_blocks(list, 200, 'decoding x')) == [
      list(range(start, min(start + 64, 200))) for start in (0, 64, 128, 192)
    ]
  assert lines(caplog) == [
    'decoding x: 128 of 200 pictures, 8 pictures/s, 0:09 left',
    'decoding x: 200 of 200 pictures, 5.67 pictures/s',
  ]


# --- refusals


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'path': ''}, r"path='' is no folder"),
    ({'path': '/no/where'}, r"path='/no/where' is no folder; give"),
    ({'embedding_size': 3}, r'embedding_size=3 but .* pictures alone; .*embedding_size=0'),
    ({'condition_shape': (4, 6, 1)}, r'condition_shape=\(4, 6, 1\) but .*condition_shape=\(\)'),
    ({'masked': True}, r'masked=True but .*masked=False'),
    ({'num_classes': 3}, r'num_classes=3 but .* has 0; set --config.data.num_classes=0'),
    ({'image_shape': (8, 8)}, r'image_shape=\(8, 8\) is no shape of pictures'),
    ({'eval_split': '[40%:]'}, r"eval_split='\[40%:\]' shares 1 examples with .*train_split"),
    ({'eval_split': '[5:5]'}, r"eval_split='\[5:5\]' has none of the 10 examples"),
    ({'eval_split': '[5:11]'}, r"eval_split='\[5:11\]' is outside of its 10 examples"),
    ({'train_split': 'tain'}, r"train_split='tain' is none of the splits .*'train', 'test'"),
    ({'train_split': '[1:2:3]'}, r"train_split='\[1:2:3\]' is none"),
    ({'eval_share': 0.0}, r'eval_share=0.0 must be in \(0, 1\)'),
  ],
)
def test_refusals(plain, changes, message):
  with pytest.raises(ValueError, match='config.data.' + message) as error:
    folder.load(config(plain, **changes), 'train')
  assert '\n' not in str(error.value)


def test_folders_without_pictures_are_refused(tmp_path):
  (tmp_path / 'a.txt').write_text('')
  with pytest.raises(ValueError, match=r'has no picture; give a folder of files that end in \.png'):
    folder.load(config(tmp_path), 'train')
  for i in range(4):
    (tmp_path / f'{i}.png').write_text('')
  with pytest.raises(ValueError, match=r"train_split='\[:50%\]' has 2 pictures, none of which can"):
    folder.load(config(tmp_path), 'train')
  with pytest.raises(ValueError, match='has no picture that can be read'):
    folder.found(config(tmp_path))


# --- the rule of splits


def test_ranges_are_those_of_tfds():
  rows = lambda text, count=10: splits.rows_of(
    config('', train_split=text, eval_split='test[:1]'),
    'train',
    count,
    lambda: np.arange(count),
    {'': range(0, count), 'test': range(count - 1, count), 'all': range(count - 1)},
  ).tolist()
  assert rows('[2:4]') == [2, 3] and rows('[:30%]') == [0, 1, 2] and rows('[-3:-1]') == [7, 8]
  assert rows('[-30%:-10%]') == [7, 8] and rows('all[1:2]') == [1] and rows('[8:9]') == [8]
  assert rows('[33%:67%]', 1000) == list(range(330, 670))


def test_hashes_are_uniform_and_fixed():
  hashes = splits.hashes_of_rows(100_000)
  assert hashes.dtype == np.uint32 and len(set(hashes.tolist())) > 99_990
  np.testing.assert_allclose(np.histogram(hashes, 10, (0, 2**32))[0], 10_000, atol=500)
  # splitmix64 with seed 0 is published: e220a8397b1dcdaf, 6e789e6aa1b965f4, ...
  assert [hex(h) for h in hashes[:2]] == ['0x7b1dcdaf', '0xa1b965f4']


@pytest.mark.parametrize('name', ['loop', 'loop.png'])
def test_a_link_to_itself_is_left_out(plain, name):
  before = folder.found(config(plain))
  (plain / name).symlink_to(name)
  found = folder.found(config(plain))
  assert found['train_images'] + found['eval_images'] == sum(
    before[f'{split}_images'] for split in ('train', 'eval')
  )


def test_the_template_trains_on_pictures_without_classes(tmp_path):
  for i in range(40):
    save(tmp_path / 'pictures' / f'{i}.png', pixels(i, (9, 12, 3)))
  found, own = my_folder.get_config('debug').unlock(), my_folder.get_config()
  found.data.update(path=str(tmp_path / 'pictures'), train_split='[:20]', eval_split='[20:]')
  found.fid = own.fid  # what :debug leaves out
  assert loop.train(found.lock(), tmp_path / 'run') == 0


@pytest.mark.parametrize('kind', ['low_resolution', 'inpainting'])
def test_conditions_that_are_made_of_the_picture(plain, kind):
  """They are the config's, and no leaf that the folder could have, or not have."""
  masked = kind == 'inpainting'
  data = my_folder.get_config().data.copy_and_resolve_references().unlock()
  data.update(name='folder', path=str(plain), image_shape=(8, 8, 3), derive=kind, masked=masked)
  data.update(condition_shape=(8, 8, 3) if masked else (4, 4, 3), num_bits=5)
  data = settle.as_found(data)
  assert data.num_values == 32
  batch = data_module.load(data, 'train').fetch(np.arange(1))
  assert batch['condition'].shape[1:] == tuple(data.condition_shape)
  assert ('valid' in batch) == masked and batch['image'].max() < 32


@pytest.mark.parametrize('shape', [(16, 16), (16, 16, 5)])
def test_shapes_of_no_picture_are_refused_before_any_is_read(plain, shape):
  with pytest.raises(ValueError, match=r'config\.data\.image_shape=.* is no shape of pictures'):
    folder.found(config(plain, image_shape=shape, resize=True))
