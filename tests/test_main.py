"""The command line: every mistake is one line that names the field, the value and the remedy."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = '--config=configs/digits.py:debug'


def run(*args, cwd=ROOT):
  """Runs the command on this machine's cores; returns its exit status and what it printed."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  command = [sys.executable, '-m', 'vdm.main', *args]
  done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
  return done.returncode, done.stdout + done.stderr


BAD_INPUT = {
  'unknown config file': (
    ['--config=configs/digts.py'],
    '--config=configs/digts.py does not exist',
    'digits',
  ),
  'no config': ([], '--config', 'configs/'),
  'misspelt override': (
    [DIGITS, '--config.train.bach_size=8'],
    '--config.train.bach_size',
    'batch_size',
  ),
  'ill-typed override': (
    [DIGITS, '--config.train.batch_size=many'],
    '--config.train.batch_size=many',
    'int',
  ),
  'batch and microbatches': (
    [DIGITS, '--config.train.microbatches=3'],
    'config.train.batch_size=8 must be divisible',
    'try 6 or 9',
  ),
  'unknown schedule': (
    [DIGITS, '--config.schedule.name=cosin'],
    "config.schedule.name='cosin' must be one of",
    'cosine',
  ),
  'schedule that needs more': (
    [DIGITS, '--config.schedule.name=shifted_cosine'],
    "config.schedule.name='shifted_cosine' needs image_size",
    'in a config file',
  ),
  'learned end points without the bound': (
    [DIGITS, '--config.schedule.name=learned_net', '--config.weighting.name=iddpm'],
    "config.weighting.name='iddpm' must be 'elbo'",
    'linear',
  ),
  'a second order with learned end points': (
    [DIGITS, '--config.schedule.name=learned_net', '--config.train.second_order=0.1'],
    'config.train.second_order=0.1 must be 0',
    'adaptive',
  ),
  'a second order in discrete time': (
    [DIGITS, '--config.train.num_timesteps=10', '--config.train.second_order=0.1'],
    'config.train.second_order=0.1 must be 0 in discrete time',
    'num_timesteps=0',
  ),
  'a run to start from that is not there': (
    [DIGITS, '--config.train.start_from=/nowhere'],
    "config.train.start_from='/nowhere' must be the workdir of a run",
    'train it first',
  ),
  'a run to start from of another network': (
    [DIGITS, '--config.train.start_from=pretrained/digits'],
    "config.train.start_from='pretrained/digits' must be a run with config.model.num_blocks=1",
    'give both the same',
  ),
  'missing data directory': (
    ['--config=configs/fashion_mnist.py:debug', '--config.data.dir=/nowhere'],
    "config.data.dir='/nowhere'",
    'does not exist',
  ),
  'wrong image shape': (
    [DIGITS, '--config.data.image_shape=28,28,1'],
    'config.data.image_shape=(28, 28, 1)',
    '8,8,1',
  ),
  'unwritable workdir': (
    [DIGITS, '--workdir=/proc/nothing'],
    '--workdir=/proc/nothing cannot be written',
    'choose another',
  ),
  'a whole number with an exponent': (
    [DIGITS, '--config.ema.halflife_images=5e5'],
    '--config.ema.halflife_images=5e5',
    'it is an integer; give 500000',
  ),
  'nothing to evaluate': (
    [DIGITS, '--mode=eval', '--workdir=/tmp/vdm_no_such_run'],
    '--workdir=/tmp/vdm_no_such_run holds no',
    'train first',
  ),
  'nothing to import': (
    [DIGITS, '--mode=import_vdm', '--checkpoint=/nowhere'],
    '--checkpoint=/nowhere holds no ckpt-<number>.flax',
    'checkpoints-0',
  ),
  'unknown mode': ([DIGITS, '--mode=trian'], '--mode=trian', 'train'),
  'unknown flag': ([DIGITS, '--wrkdir=/tmp/x'], 'wrkdir', 'workdir'),
  'process without a coordinator': (
    [DIGITS, '--process_id=1'],
    '--process_id=1 needs --coordinator=host:port',
    'JAX finds the job itself',
  ),
  'coordinator alone': (
    [DIGITS, '--coordinator=localhost:9876'],
    '--coordinator=localhost:9876 needs --num_processes and --process_id',
    '--process_id=0, 1',
  ),
  'profile': (
    [DIGITS, '--config.profile.num_steps=3', '--config.profile.first_step=3'],
    'config.profile.first_step=3 must be at most 2',
    'choose an earlier one',
  ),
  'a word that is no flag': ([DIGITS, 'train'], "'train' is no flag", '--config=FILE'),
  'unknown preset': (
    ['--config=configs/digits.py:debgu'],
    "no preset 'debgu'",
    ':debug',
  ),
  'a config that is no Python': (['--config=/etc/passwd'], "config='/etc/passwd' must be", '*.py'),
  'a seed beyond 64 bits': (
    [DIGITS, '--config.seed=9223372036854775808'],
    'config.seed=',
    'from 0 to',
  ),
  'a negative seed': ([DIGITS, '--config.eval.seed=-1'], 'config.eval.seed=-1', 'from 0 to'),
  'a number of twenty digits': (
    [DIGITS, '--config.train.num_steps=10000000000000000000'],
    'config.train.num_steps=',
    '2147483647',
  ),
  'a rate that is infinite': (
    [DIGITS, '--config.optimizer.learning_rate=inf'],
    'config.optimizer.learning_rate=inf must be finite',
    'give a number',
  ),
  'b1': ([DIGITS, '--config.optimizer.b1=2.0'], 'config.optimizer.b1=2.0 must be in [0, 1)', '0.9'),
  'power_stds': (
    [DIGITS, '--config.ema.power_stds=(0.05,0.5)'],
    'config.ema.power_stds=(0.05, 0.5) must be between 0 and 0.289',
    '0.1',
  ),
  'halves': (
    [DIGITS, '--config.fid.halves=-1'],
    'config.fid.halves=-1 must be 0 or more',
    'give 0',
  ),
  'a grid': (['--config=configs/ablations/weightings.py'], '--config is a grid', 'vdm.ablate'),
  'a topology without a plan': (
    [DIGITS, '--mode=sample', '--topology=v5e:8'],
    '--topology=v5e:8 is for --mode=plan',
    'leave it out',
  ),
  'a checkpoint of the public code': (
    [DIGITS, '--mode=eval', '--checkpoint=x/400'],
    '--checkpoint=x/400 is for --mode=import_vdm',
    'leave it out',
  ),
  'on_nan': ([DIGITS, '--config.train.on_nan=go'], "config.train.on_nan='go'", "'skip'"),
  'dtype': ([DIGITS, '--config.model.dtype=float8'], "config.model.dtype='float8'", 'bfloat16'),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_refused_in_one_line(case, tmp_path):
  args, *expected = BAD_INPUT[case]
  if not any(arg.startswith('--workdir') for arg in args):
    args = [*args, f'--workdir={tmp_path}/w']
  status, text = run(*args)
  assert status != 0
  assert 'Traceback' not in text
  (line,) = [line for line in text.splitlines() if line.strip()]
  for part in expected:
    assert part in line, line
  assert not (tmp_path / 'w' / 'checkpoints').exists()


@pytest.mark.slow
def test_batch_that_the_devices_do_not_divide(tmp_path):
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  args = [DIGITS, '--config.train.batch_size=12', f'--workdir={tmp_path}']
  done = subprocess.run(
    [sys.executable, '-m', 'vdm.main', *args], cwd=ROOT, env=env, capture_output=True, text=True
  )
  assert done.returncode != 0
  assert 'config.train.batch_size=12 must be divisible by the 8 devices; try 8 or 16' in done.stderr


@pytest.mark.slow
def test_help_explains_the_modes_and_the_overrides():
  status, text = run('--help')
  assert status in (0, 1)
  for word in ('--mode=eval', '--config.train.batch_size=64', 'configs/default.py', '--workdir'):
    assert word in text


@pytest.mark.slow
def test_packaged_configs_are_found_from_any_directory(tmp_path):
  for typed in ([DIGITS], DIGITS.split('=')):  # and with a space
    status, text = run(*typed, '--config.schedule.name=nothing', cwd=tmp_path)
    assert status != 0 and "config.schedule.name='nothing'" in text


@pytest.mark.slow
@pytest.mark.parametrize('job, expected', [('', 4), ('--coordinator=localhost:{port}', 1)])
def test_a_command_has_the_cores_as_devices_unless_it_is_one_of_a_job(job, expected):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    job = job.format(port=free.getsockname()[1])
  code = f"""
import os
os.sched_getaffinity = lambda pid: range(4)
from vdm import cli
arguments = ['vdm', '{DIGITS}', *{[job, '--num_processes=1', '--process_id=0'] if job else []}]
cli.parse_flags(arguments)
import jax
cli.in_one_line(lambda config, workdir: print(jax.device_count(), workdir))
"""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True)
  assert done.stdout.decode() == f'{expected} runs/digits_debug\n', done.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize('optimize', [False, True])
def test_what_is_for_trying_is_compiled_with_few_optimisations(optimize):
  code = """
import sys
from vdm import cli
cli.parse_flags(sys.argv)
import jax
cli.in_one_line(lambda config, workdir: print(jax.config.read('jax_disable_most_optimizations')))
"""
  arguments = [DIGITS, *(['--config.parallel.optimize=True'] if optimize else [])]
  done = subprocess.run([sys.executable, '-c', code, *arguments], cwd=ROOT, capture_output=True)
  assert done.stdout.decode() == f'{not optimize}\n', done.stderr.decode()
