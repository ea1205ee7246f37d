"""Holds what all commands share: flags, one-line errors, exit status."""

import functools
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

# TensorFlow reads records and writes summaries here; it need not announce itself.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

from absl import flags
from ml_collections import config_flags

import vdm
from vdm.system import files
from vdm.system.files import load_config, packaged_configs
from vdm.system.stopping import stop

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, with :debug to shrink it.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where everything is written; runs/<config.name>.')
OUT = flags.DEFINE_string(
  'out',
  '',
  'Folder for what eval and sample make, not the workdir; for cards of vdm.fid.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'host:port of process 0, where JAX does not find the job itself.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Processes, with --coordinator.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'This process, with --coordinator.')
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  'heartbeat_seconds', 100, 'A process that is silent for so long ends the job.'
)


LEAVE_SECONDS = 10.0  # that a process which failed waits for the others of its job


# What JAX says where it has lost another process of the job.
LOST = re.compile(r'Gloo|UNAVAILABLE|[Cc]onnection|heartbeat|unhealthy|another task died')


# What the system says of a file system that takes no more.
FULL = re.compile(
  'No space left on device|Disk quota exceeded|Read-only file system|Input/output error'
  '|Stale file handle|Permission denied|File too large'
)


def named_job() -> bool:
  """Returns whether this is a process of a job that is started by hand."""
  return bool(_COORDINATOR.value)


def _of_file(error: OSError) -> str:
  """Returns an error of the system with the file that it is about."""
  cause = error.strerror or str(error)
  return f'{error.filename}: {cause}' if error.filename else cause


def in_one_line(
  command: Callable,
  is_grid: bool = False,
  works_on: Callable[[Any, int], bool] | None = None,
  stops_together: bool = False,
  joins: bool = True,
):
  """Exits with the status of command(config, workdir), or with the one line of what it refused.

  Args:
    command: returns an exit status.
    is_grid: whether the config is a grid of runs; the name of its base is the default workdir's.
    works_on: whether `command` can run with (config, number of devices); build.works_on if None.
    stops_together: whether `command` asks `stop.agreed`, so that a signal to one process of a job
      ends all; else it ends the one.
    joins: whether `command` works with the other processes of a job, if there is one.
  """
  stop.listen()
  import jax

  from vdm import build
  from vdm.system import hosts

  try:
    jax.config.update('jax_enable_preemption_service', stops_together)
    if joins:
      hosts.initialize(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _HEARTBEAT_SECONDS.value
      )
    config = _CONFIG.value
    if is_grid != hasattr(config, 'axes'):
      sys.exit(
        '--config has no base and axes; give a grid, such as those of configs/ablations.'
        if is_grid
        else '--config is a grid, for python -m vdm.ablate; give the config of a run.'
      )
    run = config.base if is_grid else config
    if not run.parallel.optimize:
      jax.config.update('jax_disable_most_optimizations', True)
    hosts.use_cores(functools.partial(works_on or build.works_on, config))
    workdir = files.path_of(_WORKDIR.value or f'runs/{run.name}')
    status = command(config, workdir)
    stop.close()
    sys.exit(status)
  except OSError as error:
    _leave_job(error)
    sys.exit(f'{_of_file(error)}; what was written before is whole: the same command goes on.')
  except (ValueError, FloatingPointError) as error:
    _leave_job(error)
    # What our own code refused is one line; what broke inside a library keeps its traceback.
    raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if pathlib.Path(vdm.__file__).parent not in raised_in.parents:
      _exit_if_full(error)
      raise
    sys.exit(str(error))
  except Exception as error:
    _leave_job(error)
    _exit_if_full(error)
    raise


def _leave_job(error: Exception):
  """Has a process that an error ends not wait for the others of its job, if it has any.

  Where a library, in words and a class of its own, missed another process, it exits in one line.
  """
  import jax

  from vdm.system import hosts

  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return
  if isinstance(error, TimeoutError) or LOST.search(str(error)):
    line = str(error).partition('\n')[0]
    print(f'another process of the job was lost: {line}', file=sys.stderr)
    os._exit(hosts.EXIT_LOST)  # an orderly end would wait for the other
  # an orderly end waits for all of them: where all have the same error, that is at once
  timer = threading.Timer(LEAVE_SECONDS, os._exit, (1,))
  timer.daemon = True
  timer.start()


def _exit_if_full(error: Exception):
  """Exits in one line where a library met a file system that takes no more, in its own words."""
  if full := FULL.search(str(error)):
    sys.exit(
      f'the file system of the workdir refuses to write: {full[0]}; what was written before is '
      'whole: the same command goes on.'
    )


def parse_flags(argv: list[str]) -> list[str]:
  """Parses as absl does, with errors in one line; finds packaged configs from anywhere."""
  try:
    located = [_locate(arg) for arg in _joined(argv)]
    for arg in located:
      _check_file(arg)
    rest = flags.FLAGS(located)
  except (flags.Error, AttributeError, KeyError, OSError) as error:
    text = ' '.join(str(error.args[0]).replace('\\n', ' ').replace("\\'", "'").split())
    if bare := re.fullmatch(r'["\']+(\w+)["\']+', text):  # what ConfigDict says of a leaf, whole
      text = f'the config has no leaf {bare[1]}; a config file of your own may add it'
    if literal := re.search(r"invalid literal for int\(\) with base 10: '([\d.]+e\+?\d+)'", text):
      text += f': it is an integer; give {float(literal[1]):.0f}'
    typed = [arg for arg in argv if arg.startswith('--config.') and _last_field(arg) in text]
    field = f'{typed[0].partition("=")[0]}: ' if typed and not text.startswith('flag') else ''
    sys.exit(f'{field}{text} (configs/default.py lists every field, --help the flags)')
  asks_for_help = any(arg.startswith(('--help', '-help')) for arg in argv)
  if _CONFIG.value is None and not asks_for_help:
    sys.exit(f'--config is missing; give a file, or one of {packaged_configs()}.')
  return rest


def refuse_words(argv: list[str]):
  """Exits in one line where `argv`, what is left behind the program's name, holds a word."""
  if argv[1:]:
    sys.exit(f'{argv[1]!r} is no flag; flags begin with --, as in --config=FILE (see --help).')


def _check_file(arg: str):
  """Refuses a config file that is none, or has no such preset, in one line."""
  flag, _, value = arg.partition('=')
  if flag in ('--config', '-config') and value:
    path, _, preset = value.partition(':')
    try:
      load_config(path, preset)
    except ValueError as error:
      sys.exit(f'--{error}')


def _joined(argv: list[str]) -> list[str]:
  """Returns `--config FILE`, as absl allows it, as `--config=FILE`."""
  joined, rest = [], iter(argv)
  for arg in rest:
    value = next(rest, None) if arg in ('--config', '-config') else None
    joined.append(arg if value is None else f'{arg}={value}')
  return joined


def _last_field(arg: str) -> str:
  return arg.partition('=')[0].rpartition('.')[2]


def _locate(arg: str) -> str:
  """Turns --config=configs/NAME.py into the one that came with vdm, if there is no such file."""
  flag, _, rest = arg.partition('=')
  path, colon, preset = rest.partition(':')
  if flag in ('--config', '-config') and not pathlib.Path(path).exists():
    from vdm import configs

    *_, below = pathlib.PurePath(path).as_posix().rpartition('configs/')
    packaged = pathlib.Path(configs.__file__).parent / below
    if packaged.exists():
      return f'{flag}={packaged}{colon}{preset}'
    sys.exit(f'--config={path} does not exist; give a file, or one of {packaged_configs()}.')
  return arg
