import json

import numpy as np
import pytest
from etils import epath
from vdm.configs import default, digits, my_folder

import vdm
import vdm.data
from vdm import build
from vdm.data import settle as settle_lib
from vdm.data.settle import measure, settle
from vdm.data.source import of_arrays
from vdm.sampling.labels import embeddings_of
from vdm.system import files, parallel
from vdm.training import loop
from vdm.workdir import config_file, data_file
from vdm.workdir.load import read_guide


def fields(tmp_path, count=40, **more):
  """A file of arrays: x with two channels of other units, and what `more` adds."""
  rng = np.random.RandomState(0)
  x = rng.normal((5.0, -300.0), (2.0, 40.0), (count, 6, 4, 2))
  np.savez(tmp_path / 'a.npz', x=x, **more)
  return tmp_path / 'a.npz', x


def config_of(path, **changes):
  config = digits.get_config('debug')
  with config.unlocked():
    config.data.update(dict(name='arrays', path=str(path), as_found=True) | changes)
    config.decoder.name = 'normal'
  return config


def test_statistics_are_those_of_all_values_of_a_channel():
  rng = np.random.RandomState(1)
  x = 1e4 + rng.normal(size=(1000, 3, 5, 2)) * (1.0, 0.01)
  valid = rng.rand(1000, 3, 5, 1) < 0.7
  condition = rng.randint(0, 9, (1000, 2, 2, 1)).astype(np.uint8)
  source = of_arrays(x, valid=valid, condition=condition)
  found = measure(source, ['image', 'condition'])
  kept = x[valid[..., 0]]
  np.testing.assert_allclose(found['image'][0], kept.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(found['image'][1], kept.std(axis=0), rtol=1e-6)
  np.testing.assert_allclose(found['condition'][0], [condition.mean()])
  np.testing.assert_allclose(found['condition'][1], [condition.std()])


def test_what_a_config_leaves_to_the_data_is_filled_in(tmp_path):
  more = dict(condition=np.random.rand(40, 3, 2, 1), vector=np.random.rand(40, 5) + 7)
  path, x = fields(tmp_path, **more)
  config = config_file.settled(config_of(path, train_split='[:30]', eval_split='[30:]'))
  data = config.data
  assert (data.train_images, data.eval_images) == (30, 10)
  assert data.image_shape == (6, 4, 2) and data.num_values == 0 and data.num_classes == 0
  assert data.condition_shape == (3, 2, 1) and data.embedding_size == 5 and not data.masked
  train = x[:30].reshape(-1, 2)
  np.testing.assert_allclose(data.shift, train.mean(axis=0), rtol=1e-6)
  np.testing.assert_allclose(data.scale, train.std(axis=0), rtol=1e-6)
  np.testing.assert_allclose(data.vector_shift, more['vector'][:30].mean(axis=0), rtol=1e-6)
  np.testing.assert_allclose(data.condition_scale, [more['condition'][:30].std()], rtol=1e-6)
  json.dumps(config.to_dict())  # a config as it is kept
  assert settle(data, True) == data  # nothing is left


def test_what_is_written_is_not_measured(tmp_path):
  path, _ = fields(tmp_path)
  config = config_file.settled(config_of(path, shift=(1.0, 2.0), scale=(3.0, 4.0)))
  assert config.data.shift == (1.0, 2.0) and config.data.scale == (3.0, 4.0)


def test_a_run_that_goes_on_measures_nothing_again(tmp_path, monkeypatch):
  path, _ = fields(tmp_path)
  workdir = tmp_path / 'run'
  first = config_file.settled(config_of(path))
  config_file.open_workdir(workdir, first)
  monkeypatch.setattr(settle_lib, 'measure', None)
  monkeypatch.setattr(settle_lib, 'found_in', None)
  again = config_file.settled(config_of(path), workdir)
  assert again == first
  config_file.open_workdir(workdir, again)  # the same run
  other = config_of(path, shift=(0.0, 0.0), scale=(1.0, 1.0))
  with pytest.raises(
    ValueError, match=r'holds a run with config\.data\.scale=.*not \(1\.0, 1\.0\)'
  ):
    config_file.open_workdir(workdir, config_file.settled(other, workdir))


def test_a_run_does_not_go_on_with_other_data(tmp_path):
  rng, workdir = np.random.default_rng(0), tmp_path / 'run'
  vector = rng.normal(size=(40, 5))
  x = rng.normal(size=(40, 6, 4, 2))

  def start(x, vector, **changes):
    np.savez(tmp_path / 'a.npz', x=x, vector=vector)
    splits = dict(train_split='[:75%]', eval_split='[75%:]')
    config = config_of(tmp_path / 'a.npz', **splits, **changes)
    before = {path: path.read_bytes() for path in workdir.glob('*.json')}
    if before:
      with pytest.raises(ValueError) as error:
        loop.train(config, workdir)
      assert {path: path.read_bytes() for path in workdir.glob('*.json')} == before
      return str(error.value)
    config = config_file.settled(config)
    identity = vdm.data.load(config.data, 'train').identity
    config_file.open_workdir(workdir, config)
    data_file.keep(workdir, identity)
    return identity

  identity = start(x, vector)
  begin = f'--workdir={workdir} holds a run '
  text = start(x + 1, vector)
  assert text.startswith(f'{begin}on other data: the first examples had the hash ')
  assert text.count('; ') == 1 and 'choose another --workdir, or remove ' in text
  text = start(x, vector + 1)
  assert text.startswith(f'{begin}on other data: the first conditions had the hash ')
  text = start(x[:24], vector[:24])
  assert text.startswith(f'{begin}on other data: config.data.train_images=30 but arrays/a.npz')
  assert text.endswith('; choose another --workdir.')
  text = start(x, vector, name='folder')
  assert text.startswith(f'{begin}with config.data.name=arrays, not folder')
  data_file.check(workdir, identity)  # the same
  (workdir / data_file.DATA).unlink()
  data_file.check(workdir, {})  # of a run that is older than the file


def test_what_is_ignored_is_not_found(tmp_path):
  more = dict(condition=np.ones((40, 3, 2, 1)), vector=np.ones((40, 5)), label=np.arange(40) % 3)
  path, _ = fields(tmp_path, mask=np.ones((6, 4)), **more)
  of = lambda ignore: settle_lib.as_found(config_of(path, ignore=ignore).data)
  names = 'num_classes', 'embedding_size', 'condition_shape', 'masked'
  leaves = lambda ignore: tuple(of(ignore)[name] for name in names)
  assert leaves('') == (3, 5, (3, 2, 1), True)
  assert leaves('condition,mask') == (3, 5, (), False)
  assert leaves('label,vector') == (0, 0, (3, 2, 1), True)
  batch = vdm.data.load(of('condition,vector,mask'), 'eval').fetch(np.arange(2))
  assert set(batch) == {'image', 'label'}
  assert leaves('label, vector') == leaves('label,vector')
  with pytest.raises(
    ValueError, match=r"ignore='masks' must be of label, vector, condition, mask; "
  ):
    of('masks')
  with pytest.raises(ValueError, match=r"ignore='mask' must be '' unless conditions are found"):
    build.check_config(config_of(path, ignore='mask', as_found=False))


def test_a_mask_of_the_data_does_not_vanish_beside_derived_conditions(tmp_path):
  """What lies under it would count: fill values among them."""
  path, _ = fields(tmp_path, mask=np.ones((6, 4)), vector=np.ones((40, 5)))
  derive = dict(derive='low_resolution', condition_shape=(3, 2, 2))
  of = lambda ignore: settle_lib.as_found(config_of(path, ignore=ignore, **derive).data)
  message = r"derive='low_resolution' must be '' for data with a mask, .* --config.data.ignore="
  with pytest.raises(ValueError, match=f'{message}mask'):
    of('')
  with pytest.raises(ValueError, match=f'{message}vector,mask'):
    of('vector')
  found = of('vector,mask')
  assert (found.masked, found.condition_shape, found.embedding_size) == (False, (3, 2, 2), 0)


def test_conditions_are_derived_of_data_that_have_none_as_found():
  derive = dict(derive='low_resolution', condition_shape=(4, 4, 1), ignore='label')
  found = settle_lib.as_found(config_of('', name='digits', **derive).data)
  assert found.condition_shape == (4, 4, 1) and found.num_classes == 0 and not found.masked


def test_what_surrounds_a_hole_is_seen_in_its_own_units(tmp_path):
  """Far from 0 the hole's zeros would decide the statistics, and dwarf what is known."""
  x = 280 + 10 * np.random.default_rng(0).normal(size=(40, 8, 8, 1))
  np.savez(tmp_path / 'a.npz', x=x)
  derive = dict(derive='inpainting', masked=True, condition_shape=(8, 8, 1), image_shape=(8, 8, 1))
  data = config_file.settled(config_of(tmp_path / 'a.npz', **derive)).data
  batch = vdm.data.load(data, 'train').fetch(np.arange(data.train_images))
  seen = (batch['condition'] - data.condition_shift[0]) / data.condition_scale[0]
  hole = batch['valid']
  assert np.abs(seen[hole]).max() == 0
  assert abs(seen[~hole].mean()) < 1e-3 and abs(seen[~hole].std() - 1) < 1e-3


def test_what_a_config_says_of_conditions_and_the_data_do_not_is_told(tmp_path, caplog):
  path, _ = fields(tmp_path, label=np.arange(40) % 3)
  settle_lib.as_found(config_of(path, num_classes=12).data)
  assert 'taken from the data by config.data.as_found: num_classes=3, not 12' in caplog.text


def test_another_evaluation_split_is_counted_again(tmp_path):
  path, _ = fields(tmp_path)
  workdir = tmp_path / 'run'
  splits = lambda evaluated: dict(train_split='[:20]', eval_split=evaluated)
  first = config_file.settled(config_of(path, **splits('[20:]')))
  config_file.open_workdir(workdir, first)
  again = config_file.settled(config_of(path, **splits('[20:27]')), workdir)
  assert (first.data.eval_images, again.data.eval_images) == (20, 7)
  with np.load(path) as arrays:
    np.savez(tmp_path / 'other.npz', **{name: array[:33] for name, array in arrays.items()})
  other = config_of(tmp_path / 'other.npz', **splits('[20:]'))
  assert config_file.settled(other, workdir).data.eval_images == 13
  path.unlink()  # its samples need no data
  assert config_file.settled(config_of('', **splits('[20:]')), workdir).data.eval_images == 20


def test_a_constant_channel_is_refused_by_name(tmp_path):
  np.savez(tmp_path / 'a.npz', x=np.stack([np.random.rand(40, 4), np.full((40, 4), 3.0)], axis=-1))
  message = r'config\.data\.scale=\(\) must be given .* constant; channel \[1\] is \[3\.\]'
  with pytest.raises(ValueError, match=message):
    config_file.settled(config_of(tmp_path / 'a.npz'))


def test_discrete_data_have_no_statistics():
  assert config_file.settled(digits.get_config()).data == digits.get_config().data


def test_digits_are_found_as_their_config_has_them():
  found = config_file.settled(config_of('', name='digits')).data
  for leaf in ('train_images', 'eval_images', 'image_shape', 'num_values', 'num_classes'):
    assert found[leaf] == digits.get_config().data[leaf]


def test_show_prints_the_lines_of_a_config(tmp_path, capsys):
  path, _ = fields(tmp_path)
  from vdm.data.__main__ import main

  assert main(['show', '--name=arrays', f'--path={path}']) == 0
  lines = capsys.readouterr().out
  config = default.get_config()
  with config.unlocked():
    exec(lines, {'config': config})
    config.decoder.name = 'normal'
  source = vdm.data.load(config.data, 'train')
  assert len(source) == config.data.train_images
  assert config.data.shift and config.data.image_shape == (6, 4, 2)
  assert config_file.settled(config).data == config.data


def test_integers_under_a_density_are_said(tmp_path, caplog):
  np.savez(tmp_path / 'a.npz', x=np.random.RandomState(0).randint(0, 9, (40, 4, 4, 1)))
  with caplog.at_level('WARNING'):
    config = config_file.settled(config_of(tmp_path / 'a.npz'))
  assert config.data.num_values == 9 and 'as if they were real' in caplog.text
  build.model(config)


def test_real_values_are_refused_by_the_discrete_decoder(tmp_path):
  path, _ = fields(tmp_path)
  config = config_of(path)
  with config.unlocked():
    config.decoder.name = 'discrete'
  with pytest.raises(ValueError, match=r"config\.decoder\.name='discrete' must be 'normal' or"):
    build.model(config_file.settled(config))


def test_every_path_may_begin_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  fields(tmp_path)
  assert config_file.settled(config_of('~/a.npz')).data.image_shape == (6, 4, 2)
  (tmp_path / 'pictures').mkdir()
  with pytest.raises(ValueError, match='pictures') as refused:
    vdm.data.load(config_of('~/pictures', name='folder').data, 'train')
  assert 'is no folder' not in str(refused.value)
  data = config_of('', name='digits', as_found=False, embedding_size=3).data
  np.save(tmp_path / 'e.npy', np.ones((2, 3)))
  assert embeddings_of('~/e.npy', data)(np.arange(5)).shape == (5, 3)
  config_file.open_workdir(tmp_path / 'guide', digits.get_config())
  (tmp_path / 'guide/checkpoints').mkdir()
  with pytest.raises(ValueError, match='holds no finished checkpoint yet'):
    read_guide('~/guide', build.model(digits.get_config()), parallel.make_mesh())
  assert files.path_of('gs://bucket/x') == epath.Path('gs://bucket/x')


def test_a_run_that_is_older_than_kinds_of_data_is_read(tmp_path):
  """Its config.json has neither their leaves nor a decoder."""
  saved = digits.get_config().to_dict()
  del saved['decoder']
  old = ('name', 'dir', 'train_split', 'eval_split', 'train_images', 'eval_images', 'image_shape')
  saved['data'] = {leaf: saved['data'][leaf] for leaf in (*old, 'num_values', 'num_classes')}
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  for given in (None, config_file.settled(digits.get_config(), tmp_path)):
    own = config_file.own_config(tmp_path, given)
    assert own.data == digits.get_config().data and own.decoder.name == 'discrete'
    build.model(own)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(condition_shape=(-1, -1, -1)), r'condition_shape=\(-1, -1, -1\) must be \(\) or as fine'),
    (dict(condition_shape=(4, 1)), r'condition_shape=\(4, 1\) must be'),
    (dict(condition_shape=(3, 8, 1)), r'condition_shape=\(3, 8, 1\) must be'),
    (dict(condition_shape=('a', 8, 1)), r'condition_shape=.* must be'),
    (dict(shift=(1.0, 2.0), scale=(1.0, 2.0)), r'shift=\(1\.0, 2\.0\) must be \(\) or 1 numbers'),
    (dict(shift=(1.0,)), r'scale=\(\) must be as many numbers as config\.data\.shift'),
    (dict(shift=(1.0,), scale=(0.0,)), r'scale=\(0\.0,\) must be .*positive'),
    (dict(vector_scale=(1.0,)), r'vector_scale=\(1\.0,\) must be as many'),
    (dict(condition_shift=(1.0,), condition_scale=(1.0,)), r'condition_shift=.* \(\) or 0 numbers'),
  ],
)
def test_shapes_and_statistics_that_do_not_fit_are_refused_by_name(changes, message):
  config = digits.get_config()
  with config.unlocked():
    config.data.update(changes)
  with pytest.raises(ValueError, match=r'^config\.data\.' + message):
    build.model(config)


def test_a_loaded_run_asks_its_data_for_nothing(tmp_path):
  path, _ = fields(tmp_path)
  exp = vdm.Experiment(config_of(path, image_shape=(6, 4, 2)))
  exp.save(exp.init(), tmp_path / 'run')
  path.unlink()
  again, _ = vdm.load(tmp_path / 'run')
  assert again.config == exp.config


@pytest.mark.parametrize(('mean', 'std'), [(1e6, 0.3), (0.0, 1e-40)])
def test_values_that_float32_cannot_tell_apart_are_refused(mean, std, tmp_path):
  x = np.random.RandomState(0).normal(mean, std, (40, 4, 4, 1))
  np.savez(tmp_path / 'a.npz', x=x)
  with pytest.raises(ValueError, match=r'image has the mean .* take an offset off, or change the'):
    config_file.settled(config_of(tmp_path / 'a.npz'))


def test_a_size_that_the_user_chooses_is_the_runs(tmp_path):
  """Pictures are scaled to it: it is not found in the data, whatever else is."""
  config = my_folder.get_config()
  config_file.open_workdir(tmp_path, config)
  leaves = config_file.flat(config_file.plain(config))
  config_file.check_run(tmp_path, leaves)
  config_file.check_run(tmp_path, leaves | {'data.train_images': 7})
  with pytest.raises(ValueError, match=r'image_shape=.*32.*64.*choose another --workdir'):
    config_file.check_run(tmp_path, leaves | {'data.image_shape': [64, 64, 3]})
