"""Signals: at once where nothing would be lost, after a save where something would, once in all."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from vdm import cli
from vdm.system import stopping

ROOT = pathlib.Path(__file__).parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _not_under_nohup():
  """SIGHUP as it is in a terminal, whoever runs the tests."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


def test_handlers_are_the_old_ones_after_listening():
  before = [signal.getsignal(number) for number in SIGNALS]
  with stopping.Stop().listening():
    assert [signal.getsignal(number) for number in SIGNALS] != before
  assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize('number', SIGNALS)
def test_with_nothing_to_lose_it_ends_at_once(number, capfd):
  with stopping.Stop().listening(), pytest.raises(stopping.Stopped) as stopped:
    signal.raise_signal(number)
  assert stopped.value.code == 75
  assert capfd.readouterr().err == f'{number.name}: stopped; the same command goes on.\n'


def test_a_storm_is_noted_once_and_does_not_end_what_saves():
  with stopping.Stop().listening() as stop:
    stop.defer()
    assert not stop.agreed()
    for number in (signal.SIGHUP, *SIGNALS, *SIGNALS):
      signal.raise_signal(number)
    assert stop.agreed() and stop.name == 'SIGHUP'


def test_inside_an_evaluation_it_is_raised_and_noted():
  with stopping.Stop().listening() as stop:
    stop.defer()
    with pytest.raises(stopping.Stopped), stop.raising():
      signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.agreed()
    with pytest.raises(stopping.Stopped), stop.raising():
      raise AssertionError('entered')


def importing(tmp_path, before, after=''):
  """Runs a program that gets SIGTERM while it imports a module."""
  (tmp_path / 'told.py').write_text('import signal\nsignal.raise_signal(signal.SIGTERM)\n')
  code = (
    f'import sys\nfrom vdm.system.stopping import stop\nsys.path.insert(0, {str(tmp_path)!r})\n'
  )
  code += f'{before}\ntry:\n  import told\nexcept BaseException:\n  print("raised")\n{after}\n'
  return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)


def test_nothing_is_raised_through_an_import_which_cpp_modules_do_not_survive(tmp_path):
  run = importing(tmp_path, 'stop.listen()')
  assert (run.returncode, run.stdout) == (75, '')
  assert run.stderr == 'SIGTERM: stopped; the same command goes on.\n'


def test_in_an_evaluation_an_import_ends_and_the_state_is_saved(tmp_path):
  inside = 'stop.listen()\nstop.defer()\ninside = stop.raising()\ninside.__enter__()'
  run = importing(tmp_path, inside, 'print("goes on", stop.agreed())')
  assert (run.returncode, run.stdout) == (0, 'goes on True\n')


@pytest.mark.parametrize(('saves', 'status'), [(True, 0), (False, 75)])
def test_what_a_callback_swallows_ends_nothing_that_is_to_be_saved(saves, status):
  code = (
    'import signal\n'
    'from vdm.system.stopping import stop\n'
    'class Callback:\n'
    '  def __del__(self):\n'
    '    signal.raise_signal(signal.SIGTERM)\n'
    'stop.listen()\n'
  )
  if saves:
    code += 'stop.defer()\ninside = stop.raising()\ninside.__enter__()\n'
  code += 'it = Callback()\ndel it\n'
  code += 'print("goes on", stop.agreed())\n'
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert run.returncode == status
  assert run.stdout == ('goes on True\n' if saves else '')


def test_after_the_end_nothing_is_raised():
  with stopping.Stop().listening() as stop:
    stop.close()
    for number in SIGNALS:
      signal.raise_signal(number)


def test_nohup_stays():
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with stopping.Stop().listening():
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_ctrl_c_after_some_seconds_acts_at_once():
  code = (
    'import signal, time\n'
    'from vdm.system import stopping\n'
    'stopping.PATIENCE = 0.1\n'
    'stopping.stop.listen()\n'
    'stopping.stop.defer()\n'
    'for pause in (0, 0, 0.2):\n'
    '  time.sleep(pause)\n'
    '  signal.raise_signal(signal.SIGINT)\n'
    '  print("goes on", flush=True)\n'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert run.returncode == stopping.EXIT_INTERRUPTED
  assert run.stdout == 'goes on\n' * 2 and 'without what was not saved' in run.stderr


def start(workdir, *more):
  """Starts a run of digits:debug that only a signal ends."""
  command = [sys.executable, '-m', 'vdm.main', '--config=configs/digits.py:debug']
  command += [f'--workdir={workdir}', '--config.train.num_steps=1000000']
  command += ['--config.optimizer.decay=constant', '--config.train.log_every_steps=1', *more]
  pipe = subprocess.PIPE
  return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(process, text):
  """Returns the lines up to the one that has the text."""
  lines = []
  for line in process.stdout:
    lines.append(line)
    if re.search(text, line):
      return lines
  raise AssertionError(''.join(lines))


@pytest.mark.slow
@pytest.mark.parametrize('seconds', [0.3, 1.0, 2.5])
def test_during_start_up_it_ends_in_one_line(seconds, tmp_path):
  process = start(tmp_path)
  time.sleep(seconds)
  process.send_signal(signal.SIGTERM)
  text = process.communicate(timeout=120)[0]
  assert process.returncode == 75 and 'Traceback' not in text, text
  assert re.search(r'stopped(; | and saved at step \d+; )the same command goes on', text), text


@pytest.mark.slow
@pytest.mark.parametrize('number', SIGNALS)
def test_a_process_that_waits_for_others_to_join_ends_alone(number, tmp_path):
  job = ('--coordinator=localhost:0', '--num_processes=2', '--process_id=0')
  process = start(tmp_path, *job)
  wait_for(process, 'joins localhost')
  time.sleep(1)
  process.send_signal(number)
  text = process.communicate(timeout=20)[0]  # it waits five minutes
  assert process.returncode == 75 and not list(tmp_path.iterdir())
  assert text == f'{number.name}: stopped before the job began; the same command goes on.\n'


JOB = """
import os, signal
from vdm.system.stopping import stop
stop.listen()
import jax
from vdm.system import hosts
jax.config.update('jax_enable_preemption_service', True)
hosts.initialize({arguments}, 100)
print(jax.distributed.is_initialized(), jax.process_count(), flush=True)
stop.defer()
os.kill(os.getpid(), signal.SIGTERM)
print(stop.agreed(), stop.name, flush=True)
"""


@pytest.mark.parametrize(
  ('arguments', 'environment', 'joined'),
  [
    ('"localhost:{port}", 1, 0', {}, True),
    (
      '"", None, None',
      dict(
        SLURM_JOB_ID='1',
        SLURM_STEP_NODELIST='localhost',
        SLURM_NTASKS='1',
        SLURM_PROCID='0',
        SLURM_LOCALID='0',
      ),
      False,  # JAX would give it one GPU of its node
    ),
  ],
)
def test_a_job_of_one_process_hears_signals_itself(arguments, environment, joined):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  code = JOB.format(arguments=arguments.format(port=port))
  env = os.environ | environment
  command = [sys.executable, '-c', code]
  run = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
  assert run.stdout == f'{joined} 1\nTrue SIGTERM\n', run.stderr


def test_a_handler_asks_jax_nothing_whose_locks_may_be_held(monkeypatch):
  def held():
    raise AssertionError('would wait for ever')

  with stopping.Stop().listening() as stop:
    stop.defer()
    monkeypatch.setattr(jax, 'process_count', held)
    monkeypatch.setattr(jax.distributed, 'is_initialized', held)
    signal.raise_signal(signal.SIGTERM)
    assert stop.agreed()


def test_in_a_job_of_several_sigterm_stays_with_jax_which_tells_all(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  before = signal.getsignal(signal.SIGTERM)
  with stopping.Stop().listening() as stop:
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGINT) == stop._note


@pytest.mark.slow
def test_a_job_that_does_not_come_together_ends_in_one_line():
  code = (
    'from vdm.system import hosts, logs\n'
    'logs.set_up_logging()\n'
    'hosts.JOIN_SECONDS = 1\n'
    'hosts.initialize("localhost:0", 2, 0, 100)\n'
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  last = run.stderr.splitlines()[-1]
  assert run.returncode == 134 and 'have not come within 1 s; see what they say' in last


@pytest.mark.slow
def test_a_storm_in_training_or_an_evaluation_saves_and_the_evaluation_is_made_up(tmp_path):
  often = ('--config.train.eval_every_steps=2', '--config.checkpoint.every_steps=1000000')
  process = start(tmp_path, *often)
  wait_for(process, 'step 2: ')  # in the evaluation, or soon
  for number in (*SIGNALS, *SIGNALS):
    process.send_signal(number)
    time.sleep(0.05)
  text = process.communicate(timeout=120)[0]
  assert process.returncode == 75 and 'Traceback' not in text, text
  step = int(re.search(r'stopped and saved at step (\d+)', text)[1])
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == [str(step)]
  process = start(tmp_path, *often)
  wait_for(process, f'step {step + 4}: ')
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=120) == 75
  cards = {int(path.stem[-8:]) for path in (tmp_path / 'cards').glob('*.json')}
  assert {2, 4} <= cards  # none is left out


@pytest.mark.parametrize(
  'error',
  [
    ValueError('UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer\nmore'),
    RuntimeError('UNAVAILABLE: The following tasks are unhealthy'),
    TimeoutError(),
  ],
)
def test_the_loss_of_another_process_ends_in_one_line_whatever_it_is_raised_as(
  error, monkeypatch, capsys
):
  monkeypatch.setattr(os, '_exit', sys.exit)  # which is raised
  cli._leave_job(error)  # alone nobody can be lost
  cli._leave_job(ValueError('bad'))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  with pytest.raises(SystemExit) as ended:
    cli._leave_job(error)
  assert ended.value.code == 134
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('another process of the job was lost: ')


def test_what_fails_in_one_process_does_not_wait_for_the_others(monkeypatch):
  left = threading.Event()
  monkeypatch.setattr(os, '_exit', lambda status: left.set())
  monkeypatch.setattr(cli, 'LEAVE_SECONDS', 0.01)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  cli._leave_job(ValueError('bad'))
  assert left.wait(timeout=20)
