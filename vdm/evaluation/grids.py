"""These functions set the finished runs of a grid side by side, in tables, curves and plots."""

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vdm import cards
from vdm.errors import require
from vdm.evaluation.curve_plots import BY_LOG_SNR, plot_curves
from vdm.system import files, writers

SCORES = 'scores.json'  # in a run's folder, written last
CURVES = 'plot', 'line', 'x', 'mean', 'least', 'greatest'  # columns of curves.csv


def folder(labels: dict[str, str]) -> str:
  """Returns the name of a run's folder."""
  return '+'.join(labels.values())


def collect(workdir: pathlib.Path, runs: list) -> Iterator[dict[str, Any]]:
  """Yields what the finished runs left: labels; curves {step: value}; scores; the bound's metric.

  `bound` and `loss` are of the evaluation's images, `train_loss` and `train_cv` of training's,
  `stderr` is the Monte Carlo error of the last bound, None of a single draw;
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
      # what training evaluated, not somebody's look at a part of it or at more
      scored = max(bounds, key=lambda found: (_is_of(found[0], config.eval), len(found)))
      metric = scored[0]['metric']  # bits_per_dim, or nats_per_dim of densities
      scalars, damaged = writers.read_scalars(path / 'tensorboard')
      for line in damaged:
        logging.warning('%s', line)
      curves = {
        'bound': {card['step']: card['value'] for card in scored},
        'loss': {card['step']: card['training_loss']['value'] for card in scored},
        'stderr': cards.at(scored[-1], 'stderr'),
        'train_loss': scalars['train/loss'],
        'train_cv': scalars['train/diffusion_cv'],
        'distances': {},
      }
      distances = [s for s in series.values() if cards.is_distance(s[0])]
      wanted = config.fid.train_images
      distances.sort(key=lambda found: (cards.at(found[0], 'num_samples') == wanted, len(found)))
      for scored in distances:  # the last of a metric is training's
        values = {card['step']: card['value'] for card in scored}
        curves['distances'] |= {scored[0]['metric']: values}
      scores = files.read_json(path / SCORES, 'remove it to have it measured again')
      yield {'labels': labels, 'metric': metric} | curves | scores


def _is_of(card: dict[str, Any], settings: ConfigDict) -> bool:
  """Returns whether a card was evaluated as config.eval says."""
  own, wanted = cards.at(card, 'config.eval') or {}, settings.to_dict()
  leaves = 'draws', 'seed', 'max_images', 'num_timesteps', 'schedule'
  return all(own.get(leaf) == wanted[leaf] for leaf in leaves)


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

  The error beside the bound is that of its draws, where there are any: the spread over seeds does
  not contain it, for all seeds are evaluated with the same noise. `diffusion_cv` is the standard
  deviation over the mean of the training loss of one example, the mean over the last quarter of
  what was logged. Distances are the last that training scored.
  """
  cv = list(run['train_cv'].values())
  last = lambda curve: list(curve.values())[-1]
  numbers = {run['metric']: last(run['bound'])}
  numbers |= {f'{run["metric"]}_stderr': run['stderr']} if run['stderr'] else {}
  numbers |= {
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
  """Writes results.csv, one line per run; results.md, one per group of seeds; curves.csv; plots.

  results.md names the runs that have no result: of a grid that is under way, or those that failed.
  """
  found = list(collect(workdir, runs))
  missing = [folder(labels) for labels, _ in runs if labels not in [run['labels'] for run in found]]
  named = f'{", ".join(missing[:8])}{", ..." if missing[8:] else ""}'
  left = f'Without a result: {len(missing)} of {len(runs)} runs, {named}.'  # to come, or failed
  if not found:
    files.write(workdir / 'results.md', f'{left}\n')
    files.write_table(workdir / 'results.csv', list(runs[0][0]), [])
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
  lines += ['', left] if missing else []
  files.write(workdir / 'results.md', '\n'.join(lines) + '\n')
  groups = {', '.join(own): [run for run, _ in members] for own, members in groups.items()}
  curves = workdir / 'curves.csv'
  files.write_table(curves, CURVES, curves_of(groups))
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
    steps = -np.diff(log_snr)
    return log_snr[1:] + steps / 2, 1 / (steps * len(steps))  # equal shares of the times

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
      values = np.array([y for other, y in found if list(other) == list(x)])
      parts = zip(x, values.mean(0), values.min(0), values.max(0), strict=True)
      rows += [(plot, label, *(f'{number:.5g}' for number in point)) for point in parts]
  return rows
