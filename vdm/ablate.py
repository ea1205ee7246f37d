"""Trains a grid of variations of one config, and sets their results side by side.

  python -m vdm.ablate --config=configs/ablations/weightings.py --workdir=DIR
  python -m vdm.ablate --config=configs/ablations/weightings.py --workdir=DIR --workers=2
  python -m vdm.ablate --config=configs/ablations/weightings.py --workdir=DIR --index=7

The config has `base`, any complete config; `axes`, a dict from the name of an axis to a dict from a
label, text without dots, to the blocks and leaves that it changes in the base (a block with a
`name` replaces the base's, of which it takes the leaves that are None in it); `evaluations`, the
numbers of sampler steps at which samples are scored; and `reference`, {axis: label} of the runs
whose last loss the others are timed against, or {}. Runs are the product of the axes, each in a
folder of its own; the same command goes on where it stopped. After every run DIR/results.csv,
results.md, curves.csv and *.png are written anew from all that is there. An axis called `seed` is
what means and spreads are over.
"""

import itertools
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from vdm import build, cli, data, fid
from vdm.build.state import named_params
from vdm.diffusion.gaussian import mean_over_dims
from vdm.diffusion.samplers import num_evaluations
from vdm.errors import require
from vdm.evaluation.grids import SCORES, folder, write_results
from vdm.evaluation.pictures import x_of
from vdm.sampling.draw import make_sampler
from vdm.system import files, hosts, logs
from vdm.training import loop
from vdm.workdir import config_file
from vdm.workdir.load import Run, read_run

_INDEX = flags.DEFINE_list('index', None, 'Runs of the grid, for arrays of jobs: 7, or 0,2,4.')
_WORKERS = flags.DEFINE_integer(
  'workers',
  1,
  'Processes that share the runs, on CPUs; more than one have one device each.',
)


def expand(grid: ConfigDict) -> list[tuple[dict[str, str], ConfigDict]]:
  """Returns the runs of an ablation, [({axis: label}, complete config)], seeds fastest."""
  for leaf in ('base', 'axes', 'evaluations', 'reference'):
    require(leaf in grid, f'config.{leaf}', None, 'given', 'vdm/ablate.py says what it is')
  for axis, label in grid.reference.items():
    known = axis in grid.axes and label in grid.axes[axis]
    require(
      known, f'config.reference.{axis}', label, 'of config.axes', 'name an axis and its label'
    )
  for axis, labels in grid.axes.items():
    for label in labels:
      remedy = f'write {str(label)!r}'
      require(isinstance(label, str), f'config.axes.{axis}', label, 'a label that is text', remedy)
  axes = dict(sorted(grid.axes.to_dict().items(), key=lambda item: item[0] == 'seed'))
  runs = []
  for labels in itertools.product(*axes.values()):
    run = ConfigDict(grid.base.to_dict()).lock()
    for axis, label in zip(axes, labels, strict=True):
      for block, change in axes[axis][label].items():
        _change(run, axis, block, change)
    named = dict(zip(axes, labels, strict=True))
    with run.unlocked():
      run.name = folder(named)
    runs.append((named, run))
  names = [run.name for _, run in runs]
  twice = sorted({name for name in names if names.count(name) > 1})
  rule, remedy = 'that give each run a name of its own', 'change a label'
  require(not twice, 'config.axes', ', '.join(twice), f'of labels {rule}', remedy)
  bad = [name for name in names if re.search(r'[/\\|]', name)]
  require(not bad, 'config.axes', ', '.join(bad), 'of labels without / and |', remedy)
  return runs


def works_on(grid: ConfigDict, num_devices: int) -> bool:
  """Returns whether every run can have so many devices."""
  return all(build.works_on(run, num_devices) for _, run in expand(grid))


def _change(run: ConfigDict, axis: str, block: str, change: Any):
  if block not in run:
    raise ValueError(
      f'config.axes.{axis} changes {block}, which config.base lacks; see its leaves.'
    )
  if not isinstance(change, dict):
    run[block] = change
  elif 'name' in change:
    for leaf in [leaf for leaf, value in change.items() if value is None]:
      if leaf not in run[block]:
        raise ValueError(
          f'config.axes.{axis} takes {block}.{leaf} from config.base, which lacks it.'
        )
    with run.unlocked():
      run[block] = ConfigDict(
        {leaf: run[block][leaf] if value is None else value for leaf, value in change.items()}
      )
  else:
    for leaf in change:
      if leaf not in run[block]:
        raise ValueError(f'config.axes.{axis} changes {block}.{leaf}, which config.base lacks.')
    run[block].update(change)


def score(run: Run, steps: tuple[int, ...]):
  """Writes scores.json: Fréchet distances of samples by network evaluations, w and p of log_snr."""
  config, model, mesh, state, workdir = run
  config = config.copy_and_resolve_references()
  source = data.load(config.data, 'eval')
  reference = source.fetch(np.arange(len(source)))
  params = named_params(state, config.sample.params)
  fitted, distances = _fit(x_of(model.decoder, reference)), {}
  for count, evaluations in zip(steps, _evaluations(config, steps), strict=True):
    config.sample.num_steps = count
    images = np.concatenate(list(make_sampler(config, model, mesh)(params)))
    distances[evaluations] = fid.frechet_distance(_fit(model.decoder.to_model(images)), fitted)
  schedule = model.training_schedule(state.params, state.adaptive)
  log_snr = mean_over_dims(schedule(jnp.linspace(0.0, 1.0, 101)))
  result = {
    'fd_pixels': distances,
    'log_snr': np.asarray(log_snr).tolist(),
    'weight': np.asarray(model.weighting(log_snr)).tolist(),
  }
  files.write(epath.Path(workdir) / SCORES, files.json_text(result))


def _fit(x: jax.Array) -> fid.Gaussian:
  """Returns the Gaussian of images in the network's units."""
  return fid.fit(np.asarray(x).reshape(len(x), -1))


def _indices(count: int) -> list[int]:
  """Returns the runs that --index names, or all."""
  if _INDEX.value is None:
    return list(range(count))
  for text in _INDEX.value:
    if not text.isdecimal() or int(text) >= count:
      raise ValueError(
        f'--index={text} must be from 0 to {count - 1}, one of the runs; or left out.'
      )
  return [int(text) for text in _INDEX.value]


def _is_done(path: pathlib.Path, run_config: ConfigDict, steps: tuple[int, ...]) -> bool:
  """Returns whether a run was scored, with these numbers of sampler steps."""
  if not (path / SCORES).exists():
    return False
  scored = files.read_json(path / SCORES, 'remove it to have it measured again')['fd_pixels']
  return set(scored) == {str(count) for count in _evaluations(run_config, steps)}


def _evaluations(run_config: ConfigDict, steps: tuple[int, ...]) -> list[int]:
  """Returns the evaluations of the network by its sampler in these numbers of steps."""
  made, last = build.sampler(run_config.sample.sampler), run_config.sample.denoise_last
  return [num_evaluations(made, count, last) for count in steps]


def _share(indices: list[int]) -> int:
  """Deals the runs out to --workers processes; returns the greatest of their statuses.

  So where one has a run that failed, 1, and another one was stopped, 75, or killed, 128 and more,
  the grid is to go on.
  """
  hands = (indices[k :: _WORKERS.value] for k in range(_WORKERS.value))
  env = {'JAX_NUM_CPU_DEVICES': '1'} | os.environ  # one core each
  children = [
    subprocess.Popen(
      [
        *(sys.executable, '-m', 'vdm.ablate', *sys.argv[1:]),
        # the last of a flag counts; each is alone, whatever job this is a process of
        *('--workers=1', '--num_processes=1', f'--index={",".join(map(str, hand))}'),
      ],
      env=env,
    )
    for hand in hands
    if hand
  ]
  try:
    statuses = [child.wait() for child in children]
    return max((status if status >= 0 else 128 - status for status in statuses), default=0)
  finally:
    for child in children:  # where this process is stopped, they save and stop as well
      child.terminate()
      child.wait()


def _check_same(path: pathlib.Path, run_config: ConfigDict):
  """Refuses a run that is finished with other settings, which would stand beside new ones."""
  if not (path / SCORES).exists():
    return
  settled = config_file.plain(config_file.settled(run_config, path))
  before, now = map(config_file.flat, (config_file.saved_config(path), settled))
  found = config_file.differences(before, now, measured=True)
  rule, remedy = 'as the grid has it', 'choose another --workdir, or restore these values'
  require(not found, 'run', str(path), f'{rule}, but it has {", and ".join(found)}', remedy)


def run(grid: ConfigDict, workdir: pathlib.Path) -> int:
  """Runs what is left of the grid, or of run --index alone, and writes the results.

  Returns:
    An exit status: 0, 1 where runs failed and the others are done, or that of a run that stopped.
  """
  runs, reference = expand(grid), grid.reference.to_dict()
  indices = _indices(len(runs))
  task = 'SLURM_STEP_NODELIST' in os.environ and os.environ.get('SLURM_NTASKS') != '1'
  alone = not cli.named_job() and not task
  rule, remedy = '1 in a job of several processes', 'leave it out, or start it outside the job'
  require(_WORKERS.value <= 1 or alone, '--workers', _WORKERS.value, rule, remedy)
  if _WORKERS.value < 1:
    raise ValueError(f'--workers={_WORKERS.value} must be at least 1; give 2 for two cores.')
  # a bad one is refused before the first is trained
  metrics = {build.model(run_config).decoder.metric for _, run_config in runs}
  found = ' and '.join(sorted(metrics))
  remedy = 'leave decoder and data out of the axes, or give each unit a grid of its own'
  require(len(metrics) == 1, 'config.axes', found, 'of one unit', remedy)
  for labels, run_config in runs:
    _check_same(workdir / folder(labels), run_config)

  def is_done(number):
    labels, run_config = runs[number]
    return _is_done(workdir / folder(labels), run_config, grid.evaluations)

  if _WORKERS.value > 1:
    status = _share([i for i in indices if not is_done(i)])
    write_results(workdir, runs, reference)
    return status
  hosts.keep_compiled()
  failed = []
  if (workdir / 'results.md').exists():  # it may name runs that are no more
    write_results(workdir, runs, reference)
  for number in filter(lambda i: not is_done(i), indices):
    labels, run_config = runs[number]
    path = workdir / folder(labels)
    logging.info('run %d of %d: %s', number, len(runs), folder(labels))
    try:
      status = loop.train(run_config, path)
    except FloatingPointError as error:
      logging.error('%s: %s; the grid goes on without it.', path, error)
      failed.append(folder(labels))
      continue
    if status:
      return status
    score(read_run(run_config, path), grid.evaluations)
    jax.clear_caches()  # of programs that no other run uses
    write_results(workdir, runs, reference)
  write_results(workdir, runs, reference)
  if failed:
    logging.error('%d of %d runs failed: %s', len(failed), len(indices), ', '.join(failed))
  return 1 if failed else 0


def _main(argv):
  cli.refuse_words(argv)
  logs.set_up_logging()
  alone = _WORKERS.value > 1  # what runs is its children
  cli.in_one_line(run, is_grid=True, works_on=works_on, stops_together=True, joins=not alone)


if __name__ == '__main__':
  app.run(_main, flags_parser=cli.parse_flags)
