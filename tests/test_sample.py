"""Drawing in shards: what is killed goes on, to the same bytes; nothing is mixed."""

import json
import os
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from vdm.configs import default

from vdm import build, data, style
from vdm.data import settle
from vdm.diffusion.decoders import discrete
from vdm.diffusion.gaussian import Prediction, expand_to, fold_in
from vdm.diffusion.schedules import SCHEDULES
from vdm.sampling import draw
from vdm.sampling import run as run_lib
from vdm.sampling.draw import make_sampler
from vdm.sampling.folder import check_format, read_shards, write_shard
from vdm.sampling.labels import conditions_of, drawn_classes
from vdm.sampling.picture import class_grid, image_grid, save_png
from vdm.sampling.run import folder_name, manifest_of
from vdm.system import parallel
from vdm.workdir.load import Run

SHAPE, VALUES = (3, 2, 1), 17


def config_of(**settings):
  config = default.get_config('debug')
  with config.unlocked():
    config.data.update(image_shape=SHAPE, num_values=VALUES, num_classes=10)
  config.model.class_conditional = True
  config.sample.update(dict(num_images=28, batch_size=8, num_steps=3) | settings)
  return config


def all_labels(config):
  conditions = conditions_of(config.sample, config.data, config.model.class_conditional)
  return lambda index: conditions(index)['label']


def stub_model():
  """x_hat is z and the class: images differ, and follow their labels."""

  def denoiser(params, given):
    level = given['label'] / 30.0
    return lambda z, log_snr: Prediction(0.8 * z + params * expand_to(level, z), z)

  own = SCHEDULES['linear'](-5.0, 8.0)
  return build.Model(None, lambda params: own, denoiser, None, SHAPE, discrete(VALUES))


@pytest.fixture
def read_run():
  """Reads a run whose newest state has the parameter `read_run.state.averages['ema']`."""
  state = types.SimpleNamespace(step=3, params=None, averages={'ema': jnp.ones(())})

  def read(config, workdir):
    return Run(config, stub_model(), parallel.make_mesh(), state, workdir)

  read.state = state
  return read


def files(workdir):
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in workdir.rglob('*')
    if path.is_file()
  }


def test_embeddings_are_taken_in_turn(tmp_path):
  rows = np.random.default_rng(0).normal(size=(5, 3))
  np.save(tmp_path / 'e.npy', rows)
  config = config_of(embeddings=str(tmp_path / 'e.npy'))
  config.model.class_conditional, config.data.embedding_size = False, 3
  conditions = conditions_of(config.sample, config.data, False)
  vectors = conditions(np.array([3, 4, 5, 11]))['vector']
  np.testing.assert_array_equal(vectors, rows[[3, 4, 0, 1]].astype(np.float32))
  config.data.embedding_size = 4
  with pytest.raises(ValueError, match=r'sample.embeddings=.* an array \[N, 4\]'):
    all_labels(config)
  config.sample.embeddings = str(tmp_path / 'none.npy')
  with pytest.raises(ValueError, match=r'sample.embeddings=.*none.npy.* cannot be read'):
    all_labels(config)


@pytest.mark.parametrize('by_vector', [True, False])
def test_samples_of_examples_have_the_conditions_of_these(tmp_path, monkeypatch, by_vector):
  vector = np.arange(20.0).reshape(10, 2)
  arrays = dict(label=np.arange(10)) | (dict(vector=vector) if by_vector else {})
  np.savez(tmp_path / 'a.npz', x=np.random.default_rng(0).normal(size=(10, 4, 4, 1)), **arrays)
  np.save(tmp_path / 'e.npy', -vector)
  config = config_of(embeddings=str(tmp_path / 'e.npy'), label=3)
  config.data.update(dict(name='arrays', path=str(tmp_path / 'a.npz'), as_found=True))
  config.data.update(train_split='[:4]', eval_split='[4:]')
  config.data = settle.as_found(config.data)
  seen = []
  monkeypatch.setattr(draw, 'make_guidance', lambda *args: None)
  monkeypatch.setattr(draw, 'make_draw', lambda model, mesh, how, of, guidance: seen.append(of))
  draw.make_sampler(config, None, None, num_examples=5)
  draw.make_sampler(config, None, None)
  of_examples, of_config = (of(np.arange(7)) for of in seen)
  examples = [4, 5, 6, 7, 8, 4, 5]
  np.testing.assert_array_equal(of_examples['label'], examples)
  if by_vector:
    np.testing.assert_array_equal(of_examples['vector'], vector[examples])
    np.testing.assert_array_equal(of_config['vector'], -vector[:7])
  np.testing.assert_array_equal(of_config['label'], [3] * 7)


class Killed(BaseException):
  """Nothing catches it, as nothing catches SIGKILL."""


def die_at(monkeypatch, number):
  """Stops before the number-th rename that completes a file."""
  replace, calls = os.replace, []

  def dying(source, target):
    calls.append(target)
    if len(calls) == number:
      raise Killed
    replace(source, target)

  monkeypatch.setattr(os, 'replace', dying)


@pytest.mark.parametrize('image_format', ['npz', 'png'])
def test_killed_at_any_rename_and_run_again_the_files_are_the_same_bytes(
  image_format, read_run, tmp_path, monkeypatch
):
  config = config_of(format=image_format)
  assert run_lib.run(read_run(config, tmp_path / 'straight')) == 0
  expected = files(tmp_path / 'straight')
  for number in range(1, 6):  # of the manifest and of the four shards
    workdir = tmp_path / f'killed_{number}'
    with monkeypatch.context() as patch, pytest.raises(Killed):
      die_at(patch, number)
      run_lib.run(read_run(config, workdir))
    left = files(workdir)
    assert len(left) < len(expected) and any('.part' in name for name in left)
    kept = {p: p.stat().st_mtime_ns for p in workdir.glob('samples/*/[0-9]*')}
    assert run_lib.run(read_run(config, workdir)) == 0
    assert files(workdir) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_half_written_shard_and_a_lost_one_are_drawn_again(read_run, tmp_path):
  config = config_of()
  run_lib.run(read_run(config, tmp_path))
  expected = files(tmp_path)
  (folder,) = (path for path in (tmp_path / 'samples').iterdir() if path.is_dir())
  (folder / '00000008.npz').unlink()
  shard = folder / '00000024.npz'
  shard.rename(folder / '.00000024.npz.part')
  (folder / '.00000024.npz.part').write_bytes(b'half')
  run_lib.run(read_run(config, tmp_path))
  assert files(tmp_path) == expected


def test_shards_hold_every_image_once_in_order_with_its_label(read_run, tmp_path):
  config = config_of()
  run_lib.run(read_run(config, tmp_path))
  run = make_sampler(config, stub_model(), parallel.make_mesh())
  images = np.concatenate(list(run(read_run.state.averages['ema'])))
  assert images.shape == (28, *SHAPE) and len(np.unique(images, axis=0)) == 28
  (folder,) = (path for path in (tmp_path / 'samples').iterdir() if path.is_dir())
  np.testing.assert_array_equal(np.concatenate(list(read_shards(folder))), images)
  assert [len(batch) for batch in read_shards(folder)] == [8, 8, 8, 4]
  labels = np.concatenate([np.load(path)['labels'] for path in sorted(folder.glob('*.npz'))])
  np.testing.assert_array_equal(labels, np.arange(28) % 10)
  np.testing.assert_array_equal(
    next(run(read_run.state.averages['ema'], starts=[16])), images[16:24]
  )


def test_png_files_are_scaled_and_say_their_class(read_run, tmp_path):
  config = config_of(format='png', label_rule='uniform')
  run_lib.run(read_run(config, tmp_path))
  (folder,) = (path for path in (tmp_path / 'samples').iterdir() if path.is_dir())
  images = np.concatenate(
    list(make_sampler(config, stub_model(), parallel.make_mesh())(jnp.ones(())))
  )
  labels = all_labels(config)(np.arange(28))
  for i in (0, 7, 8, 27):
    (path,) = folder.glob(f'*/{i:08d}_class{labels[i]}.png')
    np.testing.assert_array_equal(Image.open(path), np.round(images[i, ..., 0] * 255 / 16))
  read = np.concatenate(list(read_shards(folder)))
  np.testing.assert_array_equal(read, np.round(images * 255 / 16))


def test_the_bytes_of_a_shard_hold_no_time(tmp_path):
  images = np.arange(12, dtype=np.int32).reshape(2, 3, 2, 1)
  write_shard(tmp_path, 'npz', 0, images, discrete(300), np.arange(2))
  with zipfile.ZipFile(tmp_path / '00000000.npz') as archive:
    assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
  assert np.load(tmp_path / '00000000.npz')['images'].dtype == np.uint16
  write_shard(tmp_path, 'npz', 0, images, discrete(17))
  stored = np.load(tmp_path / '00000000.npz')
  assert stored['images'].dtype == np.uint8 and 'labels' not in stored


def test_one_device_and_eight_draw_the_same_images():
  config = config_of(label_rule='uniform')
  drawn = [
    np.concatenate(list(make_sampler(config, stub_model(), mesh)(jnp.ones(()))))
    for mesh in (Mesh(np.array(jax.devices()[:n])[:, None], parallel.BATCH_AXES) for n in (1, 8))
  ]
  np.testing.assert_array_equal(*drawn)


def test_another_setting_is_another_folder_and_another_state_is_refused(read_run, tmp_path):
  run_lib.run(read_run(config_of(), tmp_path))
  run_lib.run(read_run(config_of(seed=1), tmp_path))
  folders = sorted(path for path in (tmp_path / 'samples').iterdir() if path.is_dir())
  assert len(folders) == 2
  for leaf, value in {'eta': 0.5, 'name': 'ddim', 's_churn': 1.0}.items():
    changed = config_of()
    changed.sample.sampler[leaf] = value
    assert folder_name(changed.sample, 3) != folder_name(config_of().sample, 3)
  before = files(tmp_path)
  read_run.state.averages['ema'] = jnp.full((), 1.5)  # trained anew, to the same step
  with pytest.raises(ValueError, match=r"holds images of fingerprint='\w{8}', not '\w{8}'; remove"):
    run_lib.run(read_run(config_of(), tmp_path))
  assert files(tmp_path) == before


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{"step": 4}', r"holds images of batch_size='nothing', not 8; remove"),
    ('{', r'manifest.json cannot be read \(.*\); remove'),
    ('[1]', r'manifest.json cannot be read \(.*\); remove'),
    (None, r'holds images without manifest.json; remove'),
  ],
)
def test_a_folder_that_says_something_else_is_refused(content, message, read_run, tmp_path):
  run_lib.run(read_run(config_of(), tmp_path))
  (manifest,) = tmp_path.glob('samples/*/manifest.json')
  manifest.write_text(content) if content else manifest.unlink()
  with pytest.raises(ValueError, match=message):
    run_lib.run(read_run(config_of(), tmp_path))


def test_the_manifest_says_what_the_images_are(read_run, tmp_path):
  config = config_of(denoise_last=True, label_rule='uniform')
  config.sample.sampler.update(name='heun', s_churn=2.0)
  run_lib.run(read_run(config, tmp_path))
  (path,) = tmp_path.glob('samples/*/manifest.json')
  manifest = json.loads(path.read_text())
  expected = dict(
    step=3,
    params='ema',
    num_images=28,
    num_steps=3,
    seed=0,
    denoise_last=True,
    grid={'name': 'schedule'},
    labels='uniform over 10 classes',
    num_values=VALUES,
    image_shape=list(SHAPE),
    network_evaluations=5,
    dtype='float32',
  )
  assert {k: manifest[k] for k in expected} == expected
  assert manifest['sampler']['s_churn'] == 2.0 and 'weight' in manifest['guidance']
  assert path.parent.name.startswith('step00000003_ema_heun3_')


@pytest.mark.parametrize('rule', ['balanced', 'uniform'])
def test_a_class_without_images_is_not_drawn(rule, monkeypatch):
  """Class 0 and all above 6 have a name and no image; where no data are, every class is drawn."""
  of = lambda index: np.array([1, 3, 6], np.int32)[index % 3]
  source = data.Source(None, {'num_images': 5000}, labels=of)
  monkeypatch.setattr(data, 'load', lambda settings, split: source)
  config = config_of(label_rule=rule)
  config.model.class_conditional, config.data.dir = True, f'{rule} of three'
  labels = all_labels(config)(np.arange(60))
  assert labels.dtype == np.int32 and set(labels) == {1, 3, 6}
  if rule == 'balanced':
    np.testing.assert_array_equal(labels, of(np.arange(60)))
  assert '3' in manifest_of(config.sample, config.data, True)['labels']

  def refuse(settings, split):
    raise ValueError('config.data.dir is nowhere')

  monkeypatch.setattr(data, 'load', refuse)
  config.data.dir = f'{rule} of none'
  assert set(all_labels(config)(np.arange(200))) == set(range(10))


def test_label_rules():
  index = np.arange(20_000)
  uniform = all_labels(config_of(label_rule='uniform'))
  labels = uniform(index)
  counts = np.bincount(labels, minlength=10)
  assert labels.dtype == np.int32 and len(counts) == 10
  assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
  np.testing.assert_array_equal(uniform(index[7:19]), labels[7:19])
  assert (all_labels(config_of(label_rule='uniform', seed=1))(index) != labels).mean() > 0.8
  assert set(all_labels(config_of(label_rule='uniform', label=4))(index)) == {4}
  # the key of the label is none of those that `sample` splits off the image's own
  keys = jax.vmap(jax.random.split)(fold_in(jax.random.key(0), jnp.arange(50)))
  for used in (keys[:, 0], keys[:, 1]):
    theirs = jax.vmap(lambda key: jax.random.randint(key, (), 0, 10))(used)
    assert (np.asarray(theirs) != labels[:50]).mean() > 0.6


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(format='jpg'), r"config.sample.format='jpg' must be 'npz' or 'png'; choose"),
    (dict(label_rule='random'), r"config.sample.label_rule='random' must be 'balanced' or"),
    (dict(label=10), r'config.sample.label=10 must be a class, 0 .. 9, or -1; use -1'),
  ],
)
def test_bad_input_is_refused_before_anything_is_written(settings, message, read_run, tmp_path):
  with pytest.raises(ValueError, match=message):
    run_lib.run(read_run(config_of(**settings), tmp_path))
  assert not files(tmp_path)


def test_png_holds_one_or_three_channels():
  for channels in (1, 3):
    check_format('png', (8, 8, channels))
  for shape in ((8, 8, 2), (8, 1), (8, 8, 8, 3)):
    with pytest.raises(ValueError, match=r"sample.format='png' must be 'npz' for images \(8, "):
      check_format('png', shape)
    check_format('npz', shape)


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 5])
def test_a_grid_shows_every_channel_and_what_is_empty_is_no_image(channels, tmp_path):
  images = np.random.default_rng(0).integers(0, 17, (5, 3, 4, channels))
  picture = image_grid(discrete(17).to_pixels(images), least_width=1)
  wide = 4 if channels in (1, 3) else 4 * channels
  assert picture.shape == (2 * (3 + 4), 3 * (wide + 4), channels if channels in (1, 3) else 1)
  for number, image in enumerate(images):
    row, column = divmod(number, 3)
    cell = picture[row * 7 + 2 : row * 7 + 5, column * (wide + 4) + 2 :][:, :wide]
    parts = [image] if channels in (1, 3) else [image[..., c : c + 1] for c in range(channels)]
    np.testing.assert_array_equal(cell, np.concatenate(np.round(np.array(parts) * 255 / 16), 1))
  assert (picture[7:, 2 * (wide + 4) :] == style.FRAME).all()  # the sixth cell
  save_png(tmp_path / 'grid.png', picture)
  assert Image.open(tmp_path / 'grid.png').mode == ('RGB' if channels == 3 else 'L')


def test_small_images_are_enlarged_by_whole_pixels():
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
  picture = image_grid(images)
  scale = 40  # 2 * 8 pixels to 640
  assert picture.shape == (2 * (8 * scale + 4),) * 2 + (3,)
  second = picture[2 : 2 + 8 * scale, 8 * scale + 6 :][:, : 8 * scale]
  np.testing.assert_array_equal(second, np.kron(images[1], np.ones((scale, scale, 1), np.uint8)))
  large = np.zeros((1, 700, 700, 1), np.uint8)
  assert image_grid(large).shape == (704, 704, 1)


def test_classes_in_turn_are_the_named_columns_of_a_grid(monkeypatch):
  images, figures = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1)).astype(np.uint8), []
  of = style.image_of
  monkeypatch.setattr(style, 'image_of', lambda figure: figures.append(figure) or of(figure))
  picture = class_grid(images, np.array([4, 0, 7, 4, 0, 7, 4]))
  (figure,) = figures
  assert [text.get_text() for text in figure.texts][:4] == ['class', '4', '0', '7']
  grid = np.broadcast_to(image_grid(images, 3), (*image_grid(images, 3).shape[:2], 3))
  rows, columns = grid.shape[:2]
  windows = picture[-8 - rows : -8, -8 - columns : -8]
  np.testing.assert_array_equal(windows, grid)  # pixel for pixel
  centres = [text.get_position()[0] * picture.shape[1] for text in figure.texts[1:4]]
  np.testing.assert_allclose(np.diff(centres), columns / 3)
  for classes in ([3] * 7, [0, 1, 1, 0, 1, 0, 1], list(range(7))):
    named = class_grid(images, np.array(classes)).shape != image_grid(images).shape
    assert named == (classes == list(range(7)))


def test_labels_of_a_model_whose_data_are_not_here_are_of_all_classes_and_it_is_said(caplog):
  config = default.get_config()
  with config.unlocked():
    config.model.class_conditional = True
    config.data.update(name='fashion_mnist', dir='/nowhere', num_classes=10)
  with caplog.at_level('INFO'):
    drawn = drawn_classes(config.data, True)
  np.testing.assert_array_equal(drawn, np.arange(10))
  (record,) = caplog.records
  assert 'all 10 classes' in record.getMessage() and '/nowhere' in record.getMessage()
  assert 'download' not in record.getMessage() and record.levelname == 'INFO'
