"""Models to give away."""

import json
import pathlib

import jax
import numpy as np
import pytest
from vdm.configs import digits

import vdm
from vdm import build
from vdm.evaluation import evaluate
from vdm.sampling import run as run_lib
from vdm.system import parallel
from vdm.training import loop
from vdm.workdir import release, released
from vdm.workdir.load import read_run


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def config_of(**settings):
  config = digits.get_config('debug')
  with config.unlocked():
    config.update_from_flattened_dict(
      {
        'model.scan_blocks': 'off',
        'model.num_blocks': 2,
        'schedule.name': 'learned_endpoints',
      }
      | settings
    )
  return config


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """(workdir of a run, folder of its release)."""
  workdir = tmp_path_factory.mktemp('run')
  with jax.numpy_rank_promotion('allow'):
    assert loop.train(config_of(), workdir) == 0
    assert release.run(read_run(config_of(), workdir)) == 0
  return workdir, workdir.with_name(f'{workdir.name}_release')


def test_the_network_alone_is_rounded(tmp_path):
  value = np.float32(-6.6543)  # of a decoder's log_std: half precision has steps of .004 there
  params = {part: {'leaf': value[None]} for part in ('network', 'schedule', 'decoder')}
  released.write(tmp_path, params, 1)
  with np.load(tmp_path / released.PARAMS) as found:
    assert found['network/leaf'] == np.float16(value) != value
    assert found['schedule/leaf'] == found['decoder/leaf'] == value


@pytest.mark.slow
@pytest.mark.parametrize('scan', ['off', 'on'])
def test_a_release_holds_the_averages_in_float16_for_either_layout(folders, scan):
  workdir, folder = folders
  config = config_of(**{'model.scan_blocks': scan})
  run, given = read_run(config, workdir), read_run(config, folder)
  assert int(given.state.step) == int(run.state.step) == 4
  network, want = given.state.params['network'], run.state.averages['ema']['network']
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float16)), network, want
  )
  schedule = given.state.params['schedule'], run.state.averages['ema']['schedule']
  jax.tree.map(np.testing.assert_array_equal, *schedule)  # end points keep their float32
  jax.tree.map(np.testing.assert_array_equal, given.state.params, given.state.averages['ema'])


@pytest.mark.slow
def test_it_is_evaluated_and_sampled_from_like_a_run(folders, tmp_path):
  workdir, folder = folders
  for name, place in (('run', workdir), ('release', folder)):
    assert evaluate.run(read_run(config_of(), place), out=tmp_path / name) == 0
    assert run_lib.run(read_run(config_of(), place), out=tmp_path / name) == 0
  values = [
    json.loads(next((tmp_path / name / 'cards').glob('bits_per_dim_ema*')).read_text())['value']
    for name in ('run', 'release')
  ]
  assert values[0] == pytest.approx(values[1], rel=1e-3) and values[0] != values[1]
  assert [path.name for path in folder.iterdir() if path.is_file()] == ['params.npz', 'config.json']
  assert list((folder / 'cards').glob('bits_per_dim_ema*step00000004.json'))
  whole = sum(file.stat().st_size for file in (workdir / 'checkpoints' / '4').rglob('*'))
  assert (folder / 'params.npz').stat().st_size < whole / 5


@pytest.mark.slow
def test_it_cannot_be_trained_on_and_has_one_step(folders):
  _, folder = folders
  with pytest.raises(ValueError, match='holds a released model, which has no optimizer'):
    loop.train(config_of(), folder)
  with pytest.raises(ValueError, match=r'--step=2 is not there: .* was released at 4'):
    read_run(config_of(), folder, '2')


@pytest.mark.slow
def test_a_run_is_not_taken_for_a_release(folders):
  workdir, _ = folders
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
  with pytest.raises(ValueError, match=r'--out=.* must be a folder without checkpoints of a run'):
    release.run(read_run(config_of(), workdir), workdir)
  assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}


@pytest.mark.slow
def test_a_release_has_the_cards_of_its_step_alone(folders, tmp_path):
  workdir, _ = folders
  for step in ('4', '2'):
    release.run(read_run(config_of(), workdir, step), tmp_path / 'out')
    names = [path.name for path in (tmp_path / 'out' / 'cards').glob('*.json')]
    assert all(name.endswith(f'step0000000{step}.json') for name in names)


def damaged(arrays, name):
  first = next(key for key in arrays if key.endswith('kernel'))
  if name == 'missing':
    del arrays[first]
  elif name == 'shape':
    arrays[first] = arrays[first][..., :1]
  elif name == 'more':
    arrays['network/more'] = np.zeros(2)
  elif name == 'nan':
    arrays[first] = arrays[first] * np.nan
  elif name == 'no step':
    del arrays['step']
  return arrays


@pytest.mark.slow
@pytest.mark.parametrize('name', ['missing', 'shape', 'more', 'nan', 'no step', 'cut', 'no zip'])
def test_damage_is_one_line_with_the_files_name(folders, tmp_path, name):
  config, path = config_of(), tmp_path / 'params.npz'
  content = (folders[1] / 'params.npz').read_bytes()
  if name in ('cut', 'no zip'):
    path.write_bytes(content[:-30] if name == 'cut' else b'no zip')
  else:
    with np.load(folders[1] / 'params.npz') as file:
      np.savez(path, **damaged(dict(file), name))
  init = build.init_state(config, build.model(config))
  with pytest.raises(ValueError, match=str(path)) as error:
    released.read(tmp_path, init, parallel.make_mesh())
  assert '\n' not in str(error.value)


def test_what_float16_cannot_hold_is_not_released(tmp_path):
  for value in (1e6, np.nan, np.inf):
    with pytest.raises(ValueError, match='network/kernel has values beyond float16'):
      released.write(tmp_path, {'network': {'kernel': np.float32([1, value])}}, 1)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_model_of_the_package_is_what_its_card_says(tmp_path, monkeypatch):
  pretrained = pytest.importorskip('vdm.pretrained')
  monkeypatch.chdir(tmp_path)  # where there is no folder of that name
  exp, state = vdm.load('pretrained/digits')
  folder = pathlib.Path(pretrained.__file__).parent / 'digits'
  (card,) = (folder / 'cards').glob('bits_per_dim*.json')
  card = json.loads(card.read_text())
  result = exp.bits_per_dim(state, draws=4)
  assert int(state.step) == card['step'] == 16000
  assert result.value == pytest.approx(card['value'], abs=4 * result.stderr)
  assert sum(f.stat().st_size for f in folder.rglob('*.*')) < 500_000
