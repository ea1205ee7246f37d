"""Trains a grid of variations of one config, and sets their results side by side.

  python -m vdm.ablate --config=configs/ablations/weightings.py --workdir=DIR
  python -m vdm.ablate --config=configs/ablations/weightings.py --workdir=DIR --workers=2
  python -m vdm.ablate --config=configs/ablations/weightings.py --workdir=DIR --index=7

The config has `base`, any complete config; `axes`, a dict from the name of an axis to a dict from a
label to the blocks and leaves that it changes in the base (a block with a `name` replaces the
base's); `evaluations`, the numbers of sampler steps at which samples are scored; and `reference`,
{axis: label} of the runs whose last loss the others are timed against, or {}. Runs are the
product of the axes, each in a folder of its own; the same command goes on where it stopped. After
every run DIR/results.csv, results.md, curves.csv and *.png are written anew from all that is there.
An axis called `seed` is what means and spreads are over.
"""

import itertools
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict

from vdm import build, cards, cli, data, fid
from vdm.build.state import named_params
from vdm.diffusion.gaussian import mean_over_dims
from vdm.diffusion.samplers import num_evaluations
from vdm.errors import require
from vdm.evaluation.curve_plots import BY_LOG_SNR, plot_curves
from vdm.sampling.draw import make_sampler
from vdm.system import files, hosts, logs, writers
from vdm.training import loop
from vdm.workdir import config_file
from vdm.workdir.load import Run, read_run

_INDEX = flags.DEFINE_list('index', None, 'Runs of the grid, for arrays of jobs: 7, or 0,2,4.')
_WORKERS = flags.DEFINE_integer(
  'workers',
  1,
  'Processes that share the runs, on CPUs; more than one have one device each.',
)
SCORES = 'scores.json'


def expand(grid: ConfigDict) -> list[tuple[dict[str, str], ConfigDict]]:
  """Returns the runs of an ablation, [({axis: label}, complete config)], seeds fastest."""
  for leaf in ('base', 'axes', 'evaluations', 'reference'):
    require(leaf in grid, f'config.{leaf}', None, 'given', 'vdm/ablate.py says what it is')
  for axis, label in grid.reference.items():
    known = axis in grid.axes and label in grid.axes[axis]
    require(
      known, f'config.reference.{axis}', label, 'of config.axes', 'name an axis and its label'
    )
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


def folder(labels: dict[str, str]) -> str:
  """Returns the name of a run's folder."""
  return '+'.join(labels.values())


def _change(run: ConfigDict, axis: str, block: str, change: Any):
  if block not in run:
    raise ValueError(
      f'config.axes.{axis} changes {block}, which config.base lacks; see its leaves.'
    )
  if not isinstance(change, dict):
    run[block] = change
  elif 'name' in change:
    with run.unlocked():
      run[block] = ConfigDict(change)
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
  reference = source.fetch(np.arange(len(source)))['image']
  params = named_params(state, config.sample.params)
  fitted, distances = _fit(reference, model), {}
  for count in steps:
    config.sample.num_steps = count
    images = np.concatenate(list(make_sampler(config, model, mesh)(params)))
    evaluations = num_evaluations(
      build.sampler(config.sample.sampler), count, config.sample.denoise_last
    )
    distances[evaluations] = fid.frechet_distance(_fit(images, model), fitted)
  schedule = model.training_schedule(state.params, state.adaptive)
  log_snr = mean_over_dims(schedule(jnp.linspace(0.0, 1.0, 101)))
  result = {
    'fd_pixels': distances,
    'log_snr': np.asarray(log_snr).tolist(),
    'weight': np.asarray(model.weighting(log_snr)).tolist(),
  }
  files.write(epath.Path(workdir) / SCORES, files.json_text(result))


def _fit(images: np.ndarray, model: build.Model) -> fid.Gaussian:
  x = model.decoder.to_model(images)
  return fid.fit(np.asarray(x).reshape(len(images), -1))


def collect(workdir: pathlib.Path, runs: list) -> Iterator[dict[str, Any]]:
  """Yields what the finished runs left: labels; curves {step: value}; scores; the bound's metric.

  `bound` and `loss` are of the evaluation's images, `train_loss` and `train_cv` of training's;
  `distances`, of samples by metric, are those that training scored.
  """
  for labels, config in runs:
    path = workdir / folder(labels)
    if (path / SCORES).exists():
      params = config.eval.params.split(',')[-1]
      series = cards.series(path)
      bounds = [s for s in series.values() if cards.is_bound(s[0]) and s[0]['params'] == params]
      rule, remedy = 'of which it has evaluations', 'the grid was evaluated with others'
      require(bool(bounds), 'config.eval.params', params, rule, remedy)
      scored = max(bounds, key=len)  # what training evaluated, not somebody's look at a part of it
      metric = scored[0]['metric']  # bits_per_dim, or nats_per_dim of densities
      scalars, damaged = writers.read_scalars(path / 'tensorboard')
      for line in damaged:
        logging.warning('%s', line)
      curves = {
        'bound': {card['step']: card['value'] for card in scored},
        'loss': {card['step']: card['training_loss']['value'] for card in scored},
        'train_loss': scalars['train/loss'],
        'train_cv': scalars['train/diffusion_cv'],
        'distances': {},
      }
      for scored in sorted(series.values(), key=len):  # the longest of a metric is training's
        if cards.is_distance(scored[0]):
          values = {card['step']: card['value'] for card in scored}
          curves['distances'] |= {scored[0]['metric']: values}
      scores = files.read_json(path / SCORES, 'remove it to have it measured again')
      yield {'labels': labels, 'metric': metric} | curves | scores


def steps_to(curve: dict[int, float], loss: float) -> float:
  """Returns the step at which the curve first comes down to the loss; nan if it never does.

  Between two steps the curve is taken for a straight line.
  """
  steps, values = (np.array(list(part), float) for part in (curve, curve.values()))
  below = np.flatnonzero(values <= loss)
  if not below.size:
    return math.nan
  i = below[0]
  return float(np.interp(-loss, -values[i - 1 : i + 1], steps[i - 1 : i + 1]) if i else steps[0])


def numbers_of(run: dict[str, Any], found: list[dict], reference: dict[str, str]) -> dict:
  """Returns the columns of a run in the table, by name.

  `diffusion_cv` is the standard deviation over the mean of the training loss of one example, the
  mean over the last quarter of what was logged. Distances are the last that training scored.
  """
  cv = list(run['train_cv'].values())
  last = lambda curve: list(curve.values())[-1]
  numbers = {
    run['metric']: last(run['bound']),
    'loss': last(run['loss']),
    'diffusion_cv': float(np.mean(cv[-max(1, len(cv) // 4) :])),
  }
  scored = set.intersection(*(set(other['distances']) for other in found))
  numbers |= {metric: last(run['distances'][metric]) for metric in sorted(scored)}
  if reference:
    wanted = run['labels'] | reference
    losses = [last(other['loss']) for other in found if other['labels'] == wanted]
    numbers['steps_to_reference'] = steps_to(run['loss'], losses[0]) if losses else math.nan
  return numbers | {f'fd_pixels_{n}_evaluations': v for n, v in run['fd_pixels'].items()}


def write_results(workdir: pathlib.Path, runs: list, reference: dict[str, str]):
  """Writes results.csv, one line per run; results.md, one per group of seeds; curves.csv; plots."""
  found = list(collect(workdir, runs))
  if not found:
    return
  numbers = [numbers_of(run, found, reference) for run in found]
  columns = list(dict.fromkeys(name for n in numbers for name in n))
  rows = [
    [*run['labels'].values(), *(n.get(name, '') for name in columns)]
    for run, n in zip(found, numbers, strict=True)
  ]
  files.write_table(workdir / 'results.csv', [*found[0]['labels'], *columns], rows)
  groups = {}
  for run, n in zip(found, numbers, strict=True):
    own = tuple(v for k, v in run['labels'].items() if k != 'seed')
    groups.setdefault(own, []).append((run, n))
  axes = [axis for axis in found[0]['labels'] if axis != 'seed']
  head = [*axes, 'runs', *(name.replace('_', ' ') for name in columns)]
  lines = [f'| {" | ".join(head)} |', '|' + '---|' * len(head)]
  best = lambda item: np.mean([n[columns[0]] for _, n in item[1]])
  for own, members in sorted(groups.items(), key=best):
    cells = [_cell([n[name] for _, n in members if name in n]) for name in columns]
    lines.append(f'| {" | ".join([*own, str(len(members)), *cells])} |')
  files.write(workdir / 'results.md', '\n'.join(lines) + '\n')
  groups = {', '.join(own): [run for run, _ in members] for own, members in groups.items()}
  curves = workdir / 'curves.csv'
  files.write_table(curves, ('plot', 'line', 'x', 'mean', 'least', 'greatest'), curves_of(groups))
  plot_curves(curves, workdir)


def _cell(values: list[float]) -> str:
  if not values:  # of another number of evaluations, perhaps
    return ''
  return 'never' if np.isnan(values).any() else over_seeds(values)


def over_seeds(values: Sequence[float], mean: str = '.4g', spread: str = '.2g') -> str:
  """Returns the mean as text; of several values with ± and their sample standard deviation.

  Args:
    values: one per seed.
    mean: how the mean is written, as Python's `format` has it.
    spread: how the deviation is.
  """
  error = f' ± {np.std(values, ddof=1):{spread}}' if len(values) > 1 else ''
  return f'{np.mean(values):{mean}}{error}'


def curves_of(groups: dict[str, list[dict]]) -> list[tuple]:
  """Returns the rows of curves.csv: of each plot and group of seeds the points of its curve.

  A row is the plot's name, the group's, x, and the mean, the least and the greatest over the runs.
  Each run has its density at its own log-SNR: those of the first are kept.
  """
  pairs = lambda table: ([float(k) for k in table], list(table.values()))
  relative = lambda loss: (list(loss), np.array(list(loss.values())) / next(iter(loss.values())))

  def density(run):
    log_snr = np.array(run['log_snr'])
    return (log_snr[1:] + log_snr[:-1]) / 2, -1 / (np.diff(log_snr) * len(log_snr))

  runs = [run for members in groups.values() for run in members]
  points = {
    runs[0]['metric']: lambda run: pairs(run['bound']),
    'fd_pixels': lambda run: pairs(run['fd_pixels']),
    'loss': lambda run: relative(run['train_loss']),
    'diffusion_cv': lambda run: pairs(run['train_cv']),
    'weight': lambda run: (run['log_snr'], np.array(run['weight']) / max(run['weight'])),
    'density': density,
  }
  for metric in sorted(set.intersection(*(set(run['distances']) for run in runs))):
    points[metric] = lambda run, m=metric: pairs(run['distances'][m])
  rows = []
  for plot, of in points.items():
    for label, members in groups.items():
      found = [of(run) for run in (members[:1] if plot in BY_LOG_SNR else members)]
      x = found[0][0]
      values = np.array([y for _, y in found if len(y) == len(x)])
      parts = zip(x, values.mean(0), values.min(0), values.max(0), strict=True)
      rows += [(plot, label, *(f'{number:.5g}' for number in point)) for point in parts]
  return rows


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


def _share(indices: list[int]) -> int:
  """Deals the runs out to --workers processes; returns the first status that is not 0, or 0."""
  hands = (indices[k :: _WORKERS.value] for k in range(_WORKERS.value))
  env = {'JAX_NUM_CPU_DEVICES': '1'} | os.environ  # one core each
  children = [
    subprocess.Popen(
      [
        *(sys.executable, '-m', 'vdm.ablate', *sys.argv[1:]),
        *('--workers=1', f'--index={",".join(map(str, hand))}'),  # the last of a flag counts
      ],
      env=env,
    )
    for hand in hands
    if hand
  ]
  try:
    return next((status for status in [child.wait() for child in children] if status), 0)
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
  found = config_file.differences(before, now)
  for leaf in ('train.num_steps', 'eval.params'):  # a run may change them, but not within a grid
    if before.get(leaf) != now[leaf] and not any(leaf in line for line in found):
      found.append(f'config.{leaf}={before.get(leaf)}, not {now[leaf]}')
  rule, remedy = 'as the grid has it', 'choose another --workdir, or restore these values'
  require(not found, 'run', str(path), f'{rule}, but it has {", and ".join(found)}', remedy)


def run(grid: ConfigDict, workdir: pathlib.Path) -> int:
  """Runs what is left of the grid, or of run --index alone, and writes the results."""
  runs, reference = expand(grid), grid.reference.to_dict()
  indices = _indices(len(runs))
  if _WORKERS.value < 1:
    raise ValueError(f'--workers={_WORKERS.value} must be at least 1; give 2 for two cores.')
  # a bad one is refused before the first is trained
  metrics = {build.model(run_config).decoder.metric for _, run_config in runs}
  found = ' and '.join(sorted(metrics))
  remedy = 'leave decoder and data out of the axes, or give each unit a grid of its own'
  require(len(metrics) == 1, 'config.axes', found, 'of one unit', remedy)
  for labels, run_config in runs:
    _check_same(workdir / folder(labels), run_config)
  if _WORKERS.value > 1:
    status = _share([i for i in indices if not (workdir / folder(runs[i][0]) / SCORES).exists()])
    write_results(workdir, runs, reference)
    return status
  hosts.keep_compiled()
  for number in indices:
    labels, run_config = runs[number]
    path = workdir / folder(labels)
    if (path / SCORES).exists():
      continue
    logging.info('run %d of %d: %s', number, len(runs), folder(labels))
    try:
      status = loop.train(run_config, path)
    except FloatingPointError as error:
      logging.error('%s: %s; the grid goes on without it.', path, error)
      continue
    if status:
      return status
    score(read_run(run_config, path), grid.evaluations)
    jax.clear_caches()  # of programs that no other run uses
    write_results(workdir, runs, reference)
  write_results(workdir, runs, reference)
  return 0


def _main(argv):
  cli.refuse_words(argv)
  logs.set_up_logging()
  cli.in_one_line(run, is_grid=True, works_on=works_on)


if __name__ == '__main__':
  app.run(_main, flags_parser=cli.parse_flags)
