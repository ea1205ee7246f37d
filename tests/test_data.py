"""Every image once, the same batches on any number of hosts, and nothing but what was asked for."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from configs.default import get_config
from vdm import data as vdm_data
from vdm.data import __main__ as data_command
from vdm.data import identity
from vdm.data import tfds as tfds_kind

SHAPE = (5, 4, 3)
COUNTS = {'train': 23, 'test': 7}


def hosts(process_count, process_index=0):
  return {'process_index': process_index, 'process_count': process_count}


def train(source, steps, *, batch_size=10, seed=0, start_step=0, process_count=1):
  """The first global batches, put together from the batches of all hosts."""
  parts = [
    vdm_data.train_batches(
      source, batch_size=batch_size, seed=seed, start_step=start_step, **hosts(process_count, h)
    )
    for h in range(process_count)
  ]
  batches = []
  for _ in range(steps):
    local = [next(part) for part in parts]
    batches.append({k: np.concatenate([b[k] for b in local]) for k in ('image', 'label')})
  return batches


def evaluate(source, **kwargs):
  return list(vdm_data.eval_batches(source, **kwargs))


def numbered(count=23, **kwargs):
  """A source whose image i holds i in every pixel."""
  images = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones(SHAPE, np.uint8)
  fetch = lambda indices: {'image': images[indices], 'label': indices.astype(np.int32)}
  return vdm_data.Source(fetch, {'num_images': count}, **kwargs)


def labels(batches):
  return np.concatenate([batch['label'] for batch in batches])


@pytest.fixture
def digits():
  return get_config().data.unlock()


def digits_with(**changes):
  config = get_config().data.unlock()
  config.update(changes)
  return config


# --- batches


@pytest.mark.parametrize('num_threads', [0, 3])
def test_every_epoch_visits_each_image_once(num_threads):
  order = labels(train(numbered(num_threads=num_threads), 23)).reshape(10, 23)
  for epoch in order:
    assert sorted(epoch) == list(range(23))
  # All differ, also from all epochs of the next seeds.
  others = [labels(train(numbered(), 23, seed=seed)).reshape(10, 23) for seed in (1, 2, 2**32 - 1)]
  assert len({tuple(epoch) for epoch in np.concatenate([order, *others])}) == 40


@pytest.mark.parametrize('process_count', [2, 4])
def test_batches_do_not_depend_on_hosts(process_count):
  one = train(numbered(num_threads=2), 9, batch_size=8)
  many = train(numbered(num_threads=2), 9, batch_size=8, process_count=process_count)
  for a, b in zip(one, many, strict=True):
    np.testing.assert_array_equal(a['label'], b['label'])
    np.testing.assert_array_equal(a['image'], b['image'])
    np.testing.assert_array_equal(a['image'][:, 0, 0, 0], a['label'])


@pytest.mark.parametrize('process_count', [1, 2])
@pytest.mark.parametrize('start_step', [1, 5, 10**12])
def test_batches_start_at_any_step(start_step, process_count):
  if start_step < 100:
    straight = train(numbered(), start_step + 3)[start_step:]
  else:  # so far on that only a start that skips nothing arrives: its epoch is still an epoch
    straight = train(numbered(), 3, start_step=start_step)
    epochs = labels(train(numbered(), 6, start_step=start_step))
    first = -(start_step * 10) % 23
    assert sorted(epochs[first : first + 23]) == list(range(23))
  resumed = train(numbered(), 3, start_step=start_step, process_count=process_count)
  np.testing.assert_array_equal(labels(straight), labels(resumed))


@pytest.mark.parametrize('process_count', [1, 2, 4])
@pytest.mark.parametrize('batch_size', [4, 8, 32])
@pytest.mark.parametrize('max_images', [0, 1, 13, 99])
def test_eval_visits_each_image_once(batch_size, max_images, process_count):
  per_host = [
    evaluate(
      numbered(),
      batch_size=batch_size,
      max_images=max_images,
      **hosts(process_count, h),
    )
    for h in range(process_count)
  ]
  assert len({len(batches) for batches in per_host}) == 1
  seen = []
  for batches in zip(*per_host, strict=True):
    for batch in batches:
      assert len(batch['mask']) == batch_size // process_count
      np.testing.assert_array_equal(batch['label'], batch['index'])
      np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['index'])
      assert not batch['index'][batch['mask'] == 0].any()
      seen.extend(batch['index'][batch['mask'] == 1])
  assert seen == list(range(min(max_images or 23, 23)))


def test_eval_threads_change_nothing():
  kwargs = {'batch_size': 4, **hosts(1)}
  for a, b in zip(
    evaluate(numbered(num_threads=4), **kwargs), evaluate(numbered(), **kwargs), strict=True
  ):
    np.testing.assert_equal(a, b)


def test_batch_size_must_divide_over_hosts():
  for name, call in (
    ('eval', lambda: vdm_data.eval_batches(numbered(), batch_size=10, **hosts(4))),
    ('train', lambda: train(numbered(), 1, batch_size=10, process_count=4)),
  ):
    with pytest.raises(ValueError, match=rf'config.{name}.batch_size=10 .* 4 hosts; try 8 or 12'):
      call()


def test_iterators_left_open_do_not_hang_the_process():
  program = """
import numpy as np, time
from vdm import data
fetch = lambda i: time.sleep(0.01) or {'image': np.zeros((len(i), 1, 1, 1), np.uint8)}
source = data.Source(fetch, {'num_images': 99}, num_threads=4)
batches = data.train_batches(
  source, batch_size=2, seed=0, start_step=0, process_index=0, process_count=1)
next(batches)
"""
  ends = ('', 'raise KeyboardInterrupt')
  processes = [subprocess.Popen([sys.executable, '-c', program + end], stderr=-1) for end in ends]
  for process, status in zip(processes, (0, -2), strict=True):
    process.communicate(timeout=60)
    assert process.returncode == status


# --- digits


def test_digits_split_is_disjoint_fixed_and_balanced(digits):
  everything = [vdm_data.load(digits, split) for split in ('train', 'eval')]
  assert [len(source) for source in everything] == [1437, 360]
  batches = [source.fetch(np.arange(len(source))) for source in everything]
  images = np.concatenate([batch['image'] for batch in batches])
  assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1)
  assert images.min() == 0 and images.max() == 16
  np.testing.assert_array_equal(np.bincount(batches[1]['label']), [36] * 10)

  from sklearn.datasets import load_digits

  original, targets = load_digits(return_X_y=True)
  key = lambda image, label: (*image.reshape(-1).astype(int), label)
  ours = [
    key(*pair) for batch in batches for pair in zip(batch['image'], batch['label'], strict=True)
  ]
  assert len(set(ours)) == 1797  # no two alike, so the splits share none
  assert set(ours) == {key(*pair) for pair in zip(original, targets, strict=True)}
  # The split may never change: bits/dim of before and after would not compare.
  assert [source.identity['sha256_first_64'] for source in everything] == [
    '03157eaaa6428f40',
    '54624885a955e7d8',
  ]


def test_digits_identity(digits):
  source = vdm_data.load(digits, 'eval')
  identity = {**source.identity}
  assert json.loads(json.dumps(identity)) == identity
  identity.pop('sha256_first_64')
  assert identity == {
    'name': 'digits',
    'full_name': 'digits/sklearn',
    'split': 'test',
    'num_bits': 0,
    'resize': False,
    'num_images': 360,
    'image_shape': [8, 8, 1],
    'num_values': 17,
    'value_min': 0,
    'value_max': 16,
    'checked_images': 360,
  }
  assert source[3]['image'].shape == (8, 8, 1) and source[3]['label'].dtype == np.int32
  assert len(list(source)) == 360


def test_labels_are_zero_without_classes():
  source = vdm_data.load(digits_with(num_classes=0), 'train')
  assert not source.fetch(np.arange(99))['label'].any()


@pytest.mark.parametrize(
  'changes, split, message',
  [
    ({'train_images': 1438}, 'train', r'train_images=1438 .* has 1437 .*data.train_images=1437'),
    ({'eval_images': 10}, 'eval', r'eval_images=10 .* has 360 .*--config.data.eval_images=360'),
    ({'image_shape': (8, 8, 3)}, 'train', r'image_shape=\(8, 8, 3\) .*\(8, 8, 1\).*=8,8,1'),
    ({'num_values': 16}, 'train', r'num_values=16 .* up to 16 in image \d+; .* at least 17'),
    ({'num_values': 256}, 'train', r'num_values=256 .* 0 .. 16 .*num_values=17, or at most 33'),
    (
      {'num_classes': 9},
      'train',
      r'num_classes=9 .* 0 .. 9, as in image \d+; .* to at least 10, or 0',
    ),
    ({'train_split': 'tain'}, 'train', r"train_split='tain' .*choose 'train' or 'test'"),
  ],
)
def test_guard_on_digits(changes, split, message):
  with pytest.raises(ValueError, match='config.data.' + message) as error:
    vdm_data.load(digits_with(**changes), split)
  assert '\n' not in str(error.value)


# --- TensorFlow Datasets


def toy_images(count, shape=SHAPE):
  return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


def prepare(root, name, file_format, counts=COUNTS, labelled=True, num_shards=1, **feature):
  """Writes a data set of random images as TFDS would have prepared it."""
  import tensorflow_datasets as tfds

  features = feature or {'image': tfds.features.Image(shape=SHAPE)}
  key = next(iter(features))
  if labelled:
    features['label'] = tfds.features.ClassLabel(num_classes=5)

  def rows(count):
    for i, image in enumerate(toy_images(count)):
      row = {key: image.astype(features[key].np_dtype), **({'label': i % 5} if labelled else {})}
      if 'embedding' in features:
        row['embedding'] = np.array([i, -i, 0.5], np.float32)
      yield i, row

  name, _, config = name.partition('/')
  tfds.dataset_builders.store_as_tfds_dataset(
    name=name,
    version='1.2.3',
    config=config or None,
    features=tfds.features.FeaturesDict(features),
    split_datasets={split: rows(count) for split, count in counts.items()},
    data_dir=root,
    file_format=file_format,
    disable_shuffling=True,
    download_config=tfds.download.DownloadConfig(num_shards=num_shards),
  )


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  import tensorflow_datasets as tfds

  root = tmp_path_factory.mktemp('tfds')
  prepare(root, 'toy', 'array_record')
  prepare(root, 'unlabelled/5x4', 'array_record', labelled=False)
  # as downsampled_imagenet, which declares no size
  prepare(root, 'free', 'array_record', image=tfds.features.Image())
  prepare(root, 'plain', 'array_record', image=tfds.features.Tensor(shape=SHAPE, dtype=np.uint8))
  prepare(root, 'wide', 'array_record', image=tfds.features.Tensor(shape=SHAPE, dtype=np.int32))
  prepare(root, 'pictures', 'array_record', picture=tfds.features.Image(shape=SHAPE))
  embedding = tfds.features.Tensor(shape=(3,), dtype=np.float32)
  image = tfds.features.Image(shape=SHAPE)
  prepare(root, 'vectors', 'array_record', image=image, embedding=embedding)
  prepare(root, 'old', 'tfrecord', num_shards=3)
  return root


def toy(root, **changes):
  return digits_with(
    **{
      'name': 'toy',
      'dir': str(root),
      'train_images': 23,
      'eval_images': 7,
      'image_shape': SHAPE,
      'num_values': 256,
      'num_classes': 5,
    }
    | changes
  )


def test_low_bit_images_are_the_highest_bits(root):
  """Glow's 5-bit images: 32 values, each of eight neighbouring ones."""
  whole = vdm_data.load(toy(root), 'train').fetch(np.arange(23))
  low = vdm_data.load(toy(root, num_bits=5, num_values=32), 'train')
  np.testing.assert_array_equal(low.fetch(np.arange(23))['image'], whole['image'] // 8)
  assert low.identity['num_bits'] == 5 and low.identity['num_values'] == 32
  with pytest.raises(ValueError, match=r'config.data.num_values=256 must be 32 with .*num_bits=5'):
    vdm_data.load(toy(root, num_bits=5), 'train')
  with pytest.raises(ValueError, match=r'config.data.num_bits=9 must be from 0'):
    vdm_data.load(toy(root, num_bits=9), 'train')


def test_resize_covers_and_crops_the_middle(root):
  """A ramp stays a ramp, on the grid of pixel centres; the longer side loses its ends."""
  ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 16, axis=0)  # 16 x 64
  out = vdm_data.centre_crop(ramp, 4, 4)
  assert out.shape == (4, 4, 1)
  np.testing.assert_allclose(
    out[1, :, 0], 24 + 4 * np.arange(4) + 1.5, atol=1
  )  # means of 4 columns
  assert vdm_data.centre_crop(np.zeros((5, 9, 3), np.uint8), 12, 10).shape == (12, 10, 3)
  height, width, channels = SHAPE
  source = vdm_data.load(toy(root, resize=True, image_shape=(2, 3, channels)), 'train')
  assert source.fetch(np.arange(3))['image'].shape == (3, 2, 3, channels)
  assert source.identity['resize'] and (height, width) != (2, 3)


@pytest.mark.parametrize('cached', [True, False])
@pytest.mark.parametrize('name', ['toy', 'toy:1.2.3', 'free', 'plain', 'unlabelled/5x4'])
def test_tfds_images_are_those_stored(root, name, cached, monkeypatch):
  monkeypatch.setattr(tfds_kind, 'CACHE_BYTES', 2**30 if cached else 0)
  labelled = name != 'unlabelled/5x4'
  source = vdm_data.load(toy(root, name=name, num_classes=5 * labelled), 'train')
  assert len(source) == 23 and source.num_threads > 0
  for _ in range(2):
    order = np.random.default_rng(0).permutation(23)
    batch = source.fetch(order)
    np.testing.assert_array_equal(batch['image'], toy_images(23)[order])
    np.testing.assert_array_equal(batch['label'], order % 5 * labelled)
  assert batch['image'].dtype == np.uint8 and batch['label'].dtype == np.int32
  epoch = np.concatenate([b['image'] for b in train(source, 23)])[:23]
  assert {x.tobytes() for x in epoch} == {x.tobytes() for x in toy_images(23)}


@pytest.mark.parametrize('cached', [True, False])
def test_embeddings_are_vectors(root, cached, monkeypatch):
  monkeypatch.setattr(tfds_kind, 'CACHE_BYTES', 2**30 if cached else 0)
  source = vdm_data.load(toy(root, name='vectors', embedding_size=3), 'train')
  for _ in range(2):
    batch = source.fetch(np.array([4, 2]))
    assert batch['vector'].dtype == np.float32
    np.testing.assert_array_equal(batch['label'], [4, 2])
    np.testing.assert_array_equal(batch['vector'], [[4, -4, 0.5], [2, -2, 0.5]])
    np.testing.assert_array_equal(batch['image'], toy_images(23)[[4, 2]])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(name='vectors', embedding_size=4), r'embedding_size=4 .*\(3,\); set .*embedding_size=3'),
    (dict(embedding_size=4), r'embedding_size=4 .*found: none; set .*embedding_size=0'),
  ],
)
def test_embeddings_that_are_not_there_are_refused(root, changes, message):
  with pytest.raises(ValueError, match=message):
    vdm_data.load(toy(root, **changes), 'train')


def test_digits_have_no_embeddings():
  with pytest.raises(ValueError, match=r'embedding_size=2 but digits has no embeddings'):
    vdm_data.load(digits_with(embedding_size=2), 'train')


def test_cache_is_not_what_a_batch_holds(root):
  source = vdm_data.load(toy(root), 'train')
  source.fetch(np.arange(23))['image'][:] = 0
  np.testing.assert_array_equal(source.fetch(np.arange(23))['image'], toy_images(23))


def test_part_of_a_split(root):
  config = toy(root, train_split='train[5:]', train_images=18)
  batch = vdm_data.load(config, 'train').fetch(np.arange(18))
  np.testing.assert_array_equal(batch['image'], toy_images(23)[5:])


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'name': 'tyo'}, r"name='tyo' is neither 'digits' nor .* did you mean .*toy.*\?"),
    ({'name': 'toy/8x8'}, r"name='toy/8x8' is not prepared .*holds .*toy"),
    ({'name': 'toy:3.0.0'}, r"name='toy:3.0.0' is not prepared"),
    (
      {'name': 'fashion_mnist'},
      r'name=.fashion_mnist.* not prepared .*download_and_prepare\(file_for',
    ),
    ({'dir': '/nowhere'}, r"dir='/nowhere' does not exist; set --config.data.dir"),
    ({'name': 'old'}, r"name='old' .* as tfrecord.*: python -m vdm.data convert --name=old --d"),
    ({'train_split': 'tran'}, r"train_split='tran' .* toy/1.2.3; choose from 'train', 'test'"),
    ({'name': 'pictures'}, r"name='pictures' .* no feature \"image\" .*label, picture"),
    ({'name': 'wide'}, r"name='wide' has images of int32 .*; choose a data set of 8-bit"),
    ({'train_images': 24}, r'train_images=24 but toy/1.2.3 has 23 .*train_images=23'),
    ({'image_shape': (4, 5, 3)}, r'image_shape=\(4, 5, 3\) .* \(5, 4, 3\) in image 0; .*=5,4,3'),
    ({'num_values': 255}, r'num_values=255 .* to at least 256'),
    ({'num_classes': 10}, r'num_classes=10 but toy/1.2.3 has 5; set --config.data.num_classes=5'),
    (
      {'name': 'unlabelled/5x4'},
      r'num_classes=5 but unlabelled/5x4/1.2.3 has no .* --config.data.num_classes=0',
    ),
  ],
)
def test_errors_name_the_field_and_the_remedy(root, changes, message):
  with pytest.raises(ValueError, match='config.data.' + message) as error:
    vdm_data.load(toy(root, **changes), 'train')
  assert '\n' not in str(error.value)


def test_images_of_several_sizes(tmp_path):
  import tensorflow_datasets as tfds

  images = [np.zeros((5, 4, 3), np.uint8)] * 9 + [np.zeros((5, 5, 3), np.uint8)]
  tfds.dataset_builders.store_as_tfds_dataset(
    name='sizes',
    version='1.0.0',
    features=tfds.features.FeaturesDict({'image': tfds.features.Image()}),
    split_datasets={'train': ((i, {'image': image}) for i, image in enumerate(images))},
    data_dir=tmp_path,
    file_format='array_record',
  )
  message = r'image_shape=\(5, 4, 3\) but sizes/1.0.0 has \(5, 5, 3\) in image \d; .*resize=True'
  with pytest.raises(ValueError, match=message):
    vdm_data.load(toy(tmp_path, name='sizes', train_images=10, num_classes=0), 'train')


def store(root, name, rows, **features):
  """A TFDS data set of these rows, in one split."""
  import tensorflow_datasets as tfds

  tfds.dataset_builders.store_as_tfds_dataset(
    name=name,
    version='1.0.0',
    features=tfds.features.FeaturesDict(features),
    split_datasets={'train': list(enumerate(rows))},
    data_dir=root,
    file_format='array_record',
    disable_shuffling=True,
  )


def odd(change, count=70):
  """Images and labels that all are what they should be, but for the last."""
  import tensorflow_datasets as tfds

  label = tfds.features.Tensor(shape=(), dtype=np.int64)
  image = tfds.features.Tensor(shape=SHAPE, dtype=np.uint8)
  rows = [{'image': i % 64 + np.zeros(SHAPE, np.uint8), 'label': i % 5} for i in range(count)]
  rows[-1] = rows[-1] | change
  return rows, dict(image=image, label=label)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'label': -1}, r'num_classes=5 .* labels -1 .*in image 69; set .*num_classes=0 to ignore'),
    ({'label': 5}, r'num_classes=5 .* labels .* 5, as in image 69; set .* to at least 6, or 0'),
    ({'image': np.full(SHAPE, 200, np.uint8)}, r'num_values=64 .* up to 200 in image 69'),
  ],
)
def test_all_that_is_read_is_checked(change, message, tmp_path, monkeypatch):
  """Also what comes after the images that are looked at first."""
  monkeypatch.setattr(identity, 'CHECKED_IMAGES', 64)
  rows, features = odd(change)
  store(tmp_path, 'odd', rows, **features)
  source = vdm_data.load(toy(tmp_path, name='odd', train_images=70, num_values=64), 'train')
  source.fetch(np.arange(60))
  for indices in (np.array([69]), np.array([3, 69, 4])):
    with pytest.raises(ValueError, match='config.data.' + message):
      source.fetch(indices)


@pytest.mark.parametrize(
  'change, remedy',
  [
    ({'label': -1}, r'set --config.data.num_classes=0 to ignore labels$'),
    ({'image': np.zeros(SHAPE, np.uint8)}, r"train_split='train' of odd/1.0.0 is black; choose"),
  ],
)
def test_a_remedy_is_one_that_works(change, remedy, tmp_path):
  rows, features = odd({})
  store(tmp_path, 'odd', [row | change for row in rows], **features)
  config = toy(tmp_path, name='odd', train_images=70, num_values=64)
  with pytest.raises(ValueError, match=remedy):
    vdm_data.load(config, 'train')
  if 'label' in change:
    config.num_classes = 0
    assert not vdm_data.load(config, 'train').fetch(np.arange(70))['label'].any()


def test_classes_without_images_are_found(root, tmp_path):
  rows, features = odd({})
  store(tmp_path, 'gaps', [row for row in rows if row['label'] in (1, 4)], **features)
  source = vdm_data.load(toy(tmp_path, name='gaps', train_images=28, num_values=65), 'train')
  np.testing.assert_array_equal(vdm_data.classes(source, 5), [1, 4])
  np.testing.assert_array_equal(vdm_data.classes(vdm_data.load(toy(root), 'train'), 5), range(5))
  digits = vdm_data.load(digits_with(), 'train')
  np.testing.assert_array_equal(vdm_data.classes(digits, 10), range(10))
  np.testing.assert_array_equal(digits.labels(np.arange(9)), digits.fetch(np.arange(9))['label'])


@pytest.mark.parametrize('below', ['toy', 'toy/1.2.3', 'unlabelled', 'unlabelled/5x4/1.2.3'])
def test_a_directory_inside_the_right_one_is_told_the_right_one(root, below):
  with pytest.raises(ValueError, match=f"data.dir='{root}/{below}' is not .*; set .*dir={root}$"):
    vdm_data.load(toy(root / below), 'train')


def test_a_directory_that_is_not_there_says_how_to_prepare_the_set(tmp_path):
  message = r'does not exist; set .*, or download and prepare it: .*toy.*array_record'
  with pytest.raises(ValueError, match=message):
    vdm_data.load(toy(tmp_path / 'none'), 'train')


@pytest.mark.parametrize('name, message', [('deep', 'images of uint16'), ('black', 'is black')])
def test_show_prints_nothing_that_is_refused(name, message, tmp_path, capsys):
  import tensorflow_datasets as tfds

  dtype = np.uint16 if name == 'deep' else np.uint8
  image = tfds.features.Image(shape=SHAPE, dtype=dtype)
  store(tmp_path, name, [{'image': np.zeros(SHAPE, dtype)}] * 3, image=image)
  capsys.readouterr()
  assert data_command.main(['show', f'--name={name}', f'--data_dir={tmp_path}']) == 1
  out, error = capsys.readouterr()
  assert out == '' and message in error


def test_show_knows_masks_several_sizes_and_several_labels(tmp_path, capsys):
  import tensorflow_datasets as tfds

  rows = [{'image': np.ones((4 + i % 2, 4, 1), np.uint8), 'label': [0, 2]} for i in range(6)]
  label = tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3))
  store(tmp_path, 'masks', rows, image=tfds.features.Image(shape=(None, None, 1)), label=label)
  capsys.readouterr()
  show = ['show', '--name=masks', f'--data_dir={tmp_path}']
  assert data_command.main(show) == 1
  error = 'config.data.resize=False but image 0 is 4 x 4 and image 1 is 5 x 4; set '
  assert error in capsys.readouterr().err
  assert data_command.main([*show, '--image_shape=4,4,1']) == 0
  config = get_config().unlock()
  exec(capsys.readouterr().out, {'config': config})
  assert (config.data.num_values, config.data.num_classes, config.data.resize) == (2, 0, True)
  assert vdm_data.load(config.data, 'train').fetch(np.arange(6))['image'].shape == (6, 4, 4, 1)


def test_show_names_images_of_other_channels(tmp_path, capsys):
  import tensorflow_datasets as tfds

  rows = [{'image': np.full((4, 4, 1 if i == 2 else 3), i, np.uint8)} for i in range(6)]
  store(tmp_path, 'mixed', rows, image=tfds.features.Image(shape=(None, None, None)))
  capsys.readouterr()
  assert data_command.main(['show', '--name=mixed', f'--data_dir={tmp_path}']) == 1
  error = "config.data.name='mixed' but image 0 has channels: 3, image 2: 1; prepare it with as"
  assert error in capsys.readouterr().err


def test_missing_shard(tmp_path):
  prepare(tmp_path, 'toy', 'array_record')
  (tmp_path / 'toy/1.2.3/toy-train.array_record-00000-of-00001').unlink()
  with pytest.raises(ValueError, match=r"name='toy' lacks toy-train.*prepare it again"):
    vdm_data.load(toy(tmp_path), 'train')


def test_empty_directory_means_the_default(monkeypatch, root, tmp_path):
  monkeypatch.setenv('TFDS_DATA_DIR', str(root))
  assert len(vdm_data.load(toy('', dir=''), 'eval')) == 7
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.setenv('HOME', str(tmp_path))
  with pytest.raises(ValueError, match=r"dir='' means .*/tensorflow_datasets, which does not ex"):
    vdm_data.load(toy('', dir=''), 'eval')


# --- the command line


def test_convert(tmp_path, capsys, monkeypatch):
  import tensorflow_datasets as tfds

  prepare(tmp_path, 'old', 'tfrecord', num_shards=3)
  folder = tmp_path / 'old' / '1.2.3'
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  convert = lambda: data_command.main(['convert', '--name=old', f'--data_dir={tmp_path}'])

  # Killed in the second shard: the set is still what it was.
  from tensorflow_datasets.core import file_adapters

  adapter = file_adapters.ArrayRecordFileAdapter
  write = adapter.write_examples
  calls = itertools.count()
  with monkeypatch.context() as patch:

    def killed(path, iterator):
      write(path, itertools.islice(iterator, 2) if next(calls) else iterator)
      if next(calls) > 1:
        raise KeyboardInterrupt

    patch.setattr(adapter, 'write_examples', killed)
    with pytest.raises(KeyboardInterrupt):
      convert()
  for name, content in before.items():
    assert (folder / name).read_bytes() == content
  with pytest.raises(ValueError, match=r'vdm\.data convert'):
    vdm_data.load(toy(tmp_path, name='old'), 'train')

  assert convert() == 0
  assert 'in ArrayRecord now' in capsys.readouterr().out
  assert not list(folder.glob('*incomplete*'))
  after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert convert() == 0
  assert 'already' in capsys.readouterr().out
  assert after == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

  # TFDS itself still reads the TFRecord files, and both give the same images in the same order.
  in_order = tfds.ReadConfig(interleave_cycle_length=1)
  for split, ours in (('train', 'train'), ('test', 'eval')):
    stored = tfds.load('old', split=split, data_dir=tmp_path, read_config=in_order)
    stored = list(stored.as_numpy_iterator())
    batch = vdm_data.load(toy(tmp_path, name='old'), ours).fetch(np.arange(COUNTS[split]))
    np.testing.assert_array_equal(batch['image'], [row['image'] for row in stored])
    np.testing.assert_array_equal(batch['label'], [row['label'] for row in stored])
    np.testing.assert_array_equal(batch['image'], toy_images(COUNTS[split]))


def test_convert_stops_at_a_shard_cut_short(tmp_path, capsys):
  prepare(tmp_path, 'old', 'tfrecord')
  info = tmp_path / 'old' / '1.2.3' / 'dataset_info.json'
  info.write_text(info.read_text().replace('"23"', '"24"'))
  capsys.readouterr()
  assert data_command.main(['convert', '--name=old', f'--data_dir={tmp_path}']) == 1
  error = capsys.readouterr().err
  assert 'dataset_info.json says 24; copy or prepare' in error and error.count('\n') == 1
  assert not list(info.parent.glob('*array_record*'))


def test_command_line_errors(root, capsys):
  for command in ('convert', 'show'):
    assert data_command.main([command, '--name=tyo', f'--data_dir={root}']) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --name='tyo' is neither") and error.count('\n') == 1


def test_show_prints_a_config_that_loads(root, capsys):
  assert data_command.main(['show', '--name=free', f'--data_dir={root}']) == 0
  config = get_config().unlock()
  exec(capsys.readouterr().out, {'config': config})
  assert config.data == toy(root, name='free')
  vdm_data.load(config.data, 'train')
