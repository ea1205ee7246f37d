"""Trains, evaluates or samples a variational diffusion model.

  python -m vdm.main --config=configs/digits.py                  train, evaluate, draw samples
  python -m vdm.main --config=configs/digits.py --mode=eval      score the newest checkpoint
  python -m vdm.main --config=configs/digits.py --mode=likelihood
                                 what every example costs, as a table, and where in it
  python -m vdm.main --config=configs/digits.py --mode=sample    draw images from it
      --step=best, or a number, takes another checkpoint; --out=DIR leaves the workdir as it is
  python -m vdm.main --config=configs/digits.py --mode=release   its averages alone, in float16
  python -m vdm.main --config=configs/cifar10.py --mode=plan --topology=v5e:2x4
                                 will it fit, how fast: of devices that need not be here
  python -m vdm.main --config=configs/cifar10.py:debug           any config, shrunk to four steps
  python -m vdm.main --config=configs/cifar10.py --mode=import_vdm --checkpoint=DIR --workdir=W
                                 make a workdir of a checkpoint of the public VDM code

Any leaf of the config can be overridden: --config.train.batch_size=64. configs/default.py lists
and explains them all. The same command run again goes on where it stopped. SIGTERM, Ctrl-C and a
terminal that closes (SIGHUP) end it with status 75 and nothing lost.
"""

from vdm.system.stopping import stop

if __name__ == '__main__':
  stop.listen()  # before the imports, which take a second

import functools
import logging
import sys
from collections.abc import Callable

from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from vdm import cli
from vdm.system import files

_MODES = ['train', 'eval', 'likelihood', 'sample', 'release', 'reconstruct', 'import_vdm', 'plan']
_MODE = flags.DEFINE_enum('mode', 'train', _MODES, 'What to do.')
_STEP = flags.DEFINE_string(
  'step',
  'newest',
  'For eval, likelihood, sample and release: newest, best (by likelihood), or a number.',
)
_CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'Of the public VDM code, for import_vdm.')
_TOPOLOGY = flags.DEFINE_string('topology', '', 'For plan: v5e:2x4, h100:8; else what is here.')
_PLAN_SEARCH = flags.DEFINE_integer(
  'plan_search', 4, 'For plan: batches tried for the largest that fits; 0: none.', lower_bound=0
)
_PLAN_FAST = flags.DEFINE_bool(
  'plan_fast', True, 'For plan: no code is generated for TPUs; else it is, which takes minutes.'
)


def main(argv):
  """Dispatches on --mode."""
  cli.refuse_words(argv)
  logging.getLogger('matplotlib').setLevel(logging.WARNING)  # it says when it looks for fonts
  reads = _MODE.value in ('eval', 'likelihood', 'sample', 'release')
  for flag in (_STEP, cli.OUT):
    if flag.present and not reads:
      given = f'--{flag.name}={flag.value}'
      sys.exit(f'{given} is for --mode=eval, likelihood, sample and release; leave it out.')
  for flag, mode in ((_CHECKPOINT, 'import_vdm'), (_TOPOLOGY, 'plan')):
    if flag.present and _MODE.value != mode:
      sys.exit(f'--{flag.name}={flag.value} is for --mode={mode}; leave it out.')
  from vdm.system import logs  # after the flags: it imports JAX

  logs.set_up_logging()
  try:
    command = _command(_MODE.value)
  except ValueError as error:  # of --out
    sys.exit(str(error))
  cli.in_one_line(
    command,
    stops_together=_MODE.value == 'train',
    joins=not _TOPOLOGY.value,  # of devices that are not here
  )


def _command(mode: str) -> Callable[[ConfigDict, epath.Path], int]:
  """Returns the command of a mode; what the other modes need is not imported."""
  out = dict(out=files.path_of(cli.OUT.value) if cli.OUT.value else None)
  match mode:
    case 'train':
      from vdm.training import loop

      return loop.train
    case 'eval':
      from vdm.evaluation import evaluate

      return _reads(evaluate.run, **out)
    case 'likelihood':
      from vdm.evaluation import likelihood_table

      return _reads(likelihood_table.run, **out)
    case 'sample':
      from vdm.sampling import run

      return _reads(run.run, **out)
    case 'release':
      from vdm.workdir import release

      return _reads(release.run, **out)
    case 'reconstruct':
      from vdm.workdir import posthoc_ema

      return _reads(posthoc_ema.run)
    case 'import_vdm':
      from vdm.workdir import import_public

      return functools.partial(import_public.run, checkpoint_path=_CHECKPOINT.value)
    case 'plan':
      from vdm.planning import plan

      return lambda config, _: plan.run(
        config, _TOPOLOGY.value, _PLAN_SEARCH.value, _PLAN_FAST.value
      )
  raise AssertionError(mode)


def _reads(command: Callable[..., int], **kwargs) -> Callable[[ConfigDict, epath.Path], int]:
  """Returns a command of (config, workdir) that reads the run of --step for `command`."""
  from vdm.workdir.load import read_run

  return lambda config, workdir: command(read_run(config, workdir, _STEP.value), **kwargs)


def console():
  """Runs the command `vdm`."""
  stop.listen()
  app.run(main, flags_parser=cli.parse_flags)


if __name__ == '__main__':
  console()
