"""A run that is only read: by its own config, at any step, without a trace in its workdir."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
from vdm.configs import default, digits

from vdm import build, cards
from vdm.evaluation import evaluate
from vdm.planning import plan
from vdm.sampling import run as run_lib
from vdm.training import loop
from vdm.workdir import checkpoint, config_file
from vdm.workdir.load import read_run

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def config_of(**settings):
  config = digits.get_config('debug')
  with config.unlocked():
    config.update_from_flattened_dict({'model.dropout': 0.0, 'eval.max_images': 8} | settings)
  return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run with checkpoints of steps 2 and 4, both evaluated."""
  workdir = tmp_path_factory.mktemp('run')
  with jax.numpy_rank_promotion('allow'):
    assert loop.train(config_of(), workdir) == 0
  return workdir


def traces(folder):
  """Every file and folder with its time of change, to which a file that comes and goes adds."""
  return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob('*'))}


# Of another run, of another length and kind: what trains is no business of who reads.
OTHERS = {
  'length': {'train.num_steps': 9, 'train.batch_size': 16, 'seed': 3},
  'network': {'model.width': 64, 'model.num_blocks': 3, 'model.fourier_exponents': (1,)},
  'maths': {'schedule.log_snr_max': 5.0, 'model.output': 'v', 'optimizer.learning_rate': 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize('change', OTHERS)
def test_eval_and_sample_leave_no_trace_and_read_by_the_runs_own_config(
  change, finished, tmp_path, caplog
):
  before = traces(finished)
  config = config_of(**OTHERS[change])
  with caplog.at_level('INFO'):
    assert evaluate.run(read_run(config, finished), out=tmp_path) == 0
    assert run_lib.run(read_run(config, finished), out=tmp_path) == 0
  assert traces(finished) == before
  (leaf, value), *_ = OTHERS[change].items()
  assert f'config.{leaf}=' in caplog.text and f'not {value}' in caplog.text  # said, not refused
  (own,) = (s for name, s in cards.series(finished).items() if 'bits_per_dim_ema' in name)
  (read,) = (s for name, s in cards.series(tmp_path).items() if 'bits_per_dim_ema' in name)
  assert read[-1]['value'] == pytest.approx(own[-1]['value'], rel=1e-6)
  assert read[-1]['config']['train'] == own[-1]['config']['train']
  assert {path.name for path in tmp_path.iterdir()} == {'cards', 'plots', 'samples'}


@pytest.mark.slow
def test_what_is_evaluated_and_drawn_is_as_given(finished, tmp_path):
  config = config_of(**{'eval.draws': 3, 'eval.seed': 7, 'sample.num_images': 5})
  assert evaluate.run(read_run(config, finished), out=tmp_path) == 0
  series = cards.series(tmp_path)
  assert all(name.rpartition('_')[0].endswith('continuous_8x3_seed7') for name in series)
  assert run_lib.run(read_run(config, finished), out=tmp_path) == 0
  manifest = json.loads(next(tmp_path.glob('samples/*/manifest.json')).read_text())
  assert manifest['num_images'] == 5


@pytest.mark.slow
def test_no_evaluation_takes_the_place_of_another(finished, tmp_path):
  changes = (
    {},
    {'eval.max_images': 16},
    {'eval.draws': 1},
    {'eval.seed': 1},
    {'eval.num_timesteps': 10},
    {'eval.schedule.name': 'cosine'},
    {'data.eval_split': 'train', 'data.eval_images': 1437},
  )
  for number, change in enumerate(changes, 1):
    assert evaluate.run(read_run(config_of(**change), finished), out=tmp_path) == 0
    assert len(list((tmp_path / 'cards').iterdir())) == 2 * number, change  # raw and ema
  assert evaluate.run(read_run(config_of(**{'eval.batch_size': 16}), finished), out=tmp_path) == 0
  assert len(list((tmp_path / 'cards').iterdir())) == 2 * number  # the same number again


@pytest.mark.slow
@pytest.mark.parametrize('step, read', [('newest', 4), ('2', 2), ('4', 4), ('best', None)])
def test_any_step_is_read_and_the_log_says_which_is_the_best(
  step, read, finished, tmp_path, caplog
):
  (own,) = (s for name, s in cards.series(finished).items() if 'bits_per_dim_ema' in name)
  lowest = cards.best(own)
  read = read or lowest['step']
  with caplog.at_level('INFO'):
    assert evaluate.run(read_run(config_of(), finished, step), tmp_path) == 0
    assert run_lib.run(read_run(config_of(), finished, step), tmp_path) == 0
  best = f'the best by likelihood is {lowest["step"]}'
  assert f'step {read} is read, of the saved 2, 4; {best}' in caplog.text
  (series,) = (s for name, s in cards.series(tmp_path).items() if 'bits_per_dim_ema' in name)
  assert [card['step'] for card in series] == [read]
  assert series[0]['value'] == pytest.approx({c['step']: c['value'] for c in own}[read], rel=1e-6)
  assert len(list(tmp_path.glob(f'samples/step{read:08d}_*.png'))) == 1


@pytest.mark.slow
@pytest.mark.parametrize('step', ['3', 'last', '-1', ''])
def test_a_step_that_is_not_there_is_refused_with_those_that_are(step, finished):
  with pytest.raises(ValueError) as error:
    evaluate.run(read_run(config_of(), finished, step))
  assert str(error.value) == (
    f'--step={step} is not there: --workdir={finished} holds the steps 2, 4; choose one, or '
    'newest, or best.'
  )


@pytest.mark.slow
def test_the_best_is_not_known_where_none_was_evaluated(tmp_path):
  config = config_of(**{'train.eval_every_steps': 4, 'checkpoint.every_steps': 1})
  config.train.num_steps = 2
  assert loop.train(config, tmp_path) == 0
  with checkpoint.manager(tmp_path, 3) as manager:
    manager.delete(2)
  with pytest.raises(ValueError, match=r'^--step=best is not known: .* holds the steps 1, none of'):
    evaluate.run(read_run(config, tmp_path, 'best'))
  assert evaluate.run(read_run(config, tmp_path, '1')) == 0


@pytest.mark.slow
def test_a_run_older_than_a_leaf_is_read_with_its_default(finished, tmp_path):
  """And a config of another network does not lend it leaves."""
  (tmp_path / 'run').symlink_to(finished)
  saved = json.loads((finished / 'config.json').read_text())
  del saved['model']['remat'], saved['data']['num_bits'], saved['profile']
  other = default.get_config().unlock()
  other.data.num_bits, other.model = 5, dict(name='mlp', width=3)
  for path in finished.iterdir():
    if path.name != 'config.json':
      (tmp_path / path.name).symlink_to(path)
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  read = config_file.own_config(tmp_path, config_of())
  assert read.model.remat is False and read.data.num_bits == 0 and read.profile.num_steps == 0
  assert isinstance(read.model.fourier_exponents, tuple)
  read = config_file.own_config(tmp_path, other)
  assert read.data.num_bits == 0 and 'remat' not in read.model and read.model.name == 'vdm_unet'


def test_what_training_scores_stays_with_the_run_that_is_read(tmp_path):
  """As a run of many steps read by a config of few, whose evaluations are others."""
  run, given = (digits.get_config().unlock() for _ in range(2))
  run.train.eval_every_steps, run.fid.train_every_steps = 2000, 4000
  assert given.fid.train_every_steps % 2000 and given.train.eval_every_steps != 2000
  given.fid.batch_size = 17
  (tmp_path / 'config.json').write_text(json.dumps(config_file.plain(run)))
  read = config_file.own_config(tmp_path, given)
  assert read.fid.train_every_steps == 4000 and read.fid.batch_size == 17
  build.model(read)


@pytest.mark.slow
def test_a_workdir_without_a_config_is_refused(finished, tmp_path):
  (tmp_path / 'checkpoints').symlink_to(finished / 'checkpoints')
  with pytest.raises(ValueError, match=r'config.json cannot be read \(No such file'):
    evaluate.run(read_run(config_of(), tmp_path))
  assert [path.name for path in tmp_path.iterdir()] == ['checkpoints']


# Becomes a process that sees the folder $1 as read-only, and runs the rest.
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'


def has_namespaces():
  unshare = shutil.which('unshare')
  return unshare and subprocess.run([unshare, '-rm', 'true'], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_namespaces(), reason='no mounts of its own for this user')
@pytest.mark.parametrize('mode', ['eval', 'sample'])
def test_a_read_only_workdir_is_refused_in_one_line_and_read_with_out(mode, finished, tmp_path):
  command = ['unshare', '-rm', 'sh', '-c', READ_ONLY, 'sh', finished, sys.executable, '-m']
  command += ['vdm.main', '--config=configs/digits.py:debug', f'--mode={mode}']
  command += [f'--workdir={finished}']
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}

  def run(*flags):
    done = subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

  status, text = run()
  assert status == 1 and text.strip().splitlines()[-1] == (
    f'--workdir={finished} cannot be written (Read-only file system); '
    'name a folder for what is made, --out=DIR.'
  )
  status, text = run(f'--out={tmp_path}', '--step=best')
  assert status == 0, text
  made = {'eval': {'cards', 'plots', 'samples'}, 'sample': {'samples'}}
  assert {path.name for path in tmp_path.iterdir()} == made[mode]


@pytest.mark.slow
@pytest.mark.parametrize('flag', ['--step=2', '--out=x'])
@pytest.mark.parametrize('mode', ['train', 'plan'])
def test_flags_of_reading_are_refused_elsewhere(flag, mode, tmp_path):
  command = [sys.executable, '-m', 'vdm.main', '--config=configs/digits.py:debug']
  command += [f'--mode={mode}', flag, f'--workdir={tmp_path}/w']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and not (tmp_path / 'w').exists()
  modes = '--mode=eval, likelihood, sample and release'
  assert done.stderr == f'{flag} is for {modes}; leave it out.\n'


@pytest.mark.slow
def test_a_plan_writes_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert plan.run(config_of(), '', 0) == 0
  assert 'digits_debug on' in capsys.readouterr().out
  assert not list(tmp_path.iterdir())
