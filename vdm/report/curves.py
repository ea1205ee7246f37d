"""Curves of runs as SVG, in the colours of the page around them."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import matplotlib
import numpy as np

from vdm import cards, style
from vdm.report.markup import Html, element, joined
from vdm.report.run import Card, Run

COLOURS = ('#2f7ed8', '#d9722b', '#2b9a66', '#b4509f', '#8a7a12', '#d24d57', '#6b6bd6', '#5d7f8f')
INK = '#010203'  # stands for the page's colour of text
SVG = {
  'svg.fonttype': 'none',  # text stays text
  'svg.hashsalt': 'vdm',  # the same curves are the same file
  'grid.alpha': 0.15,
  **dict.fromkeys(('text.color', 'axes.edgecolor', 'axes.labelcolor', 'grid.color'), INK),
  **dict.fromkeys(('xtick.color', 'ytick.color'), INK),
}


class Line(NamedTuple):
  """Holds a curve; `errors` are half the lengths of its bars, None for those of training."""

  colour: str
  x: list[float]
  y: list[float]
  errors: list[float] | None


class Panel(NamedTuple):
  """Holds what is drawn into one pair of axes."""

  title: str
  unit: str
  lines: list[Line]
  log: bool = False
  xlabel: str = 'step'


def colour(number: int) -> str:
  """Returns the colour of a run, or of a set of parameters."""
  return COLOURS[number % len(COLOURS)]


def key(labels: list[tuple[str, str]]) -> Html:
  """Returns the legend of (colour, label)s."""
  chip = lambda c: element('span', class_='chip', style=f'background:{c}')
  return element('p', *(element('span', chip(c), label) for c, label in labels), class_='key')


def draw(panels: list[Panel]) -> Html:
  """Returns the panels beside each other, as many as fit."""
  return element('div', *map(_figure, panels), class_='panels')


@style.paper
def _figure(panel: Panel) -> Html:
  with matplotlib.rc_context(SVG):
    figure, axes = style.figure(1, (4.2, 2.7))
    for line in panel.lines:
      if line.errors is None:
        axes.plot(line.x, line.y, '-', color=line.colour, alpha=0.6, linewidth=1.2)
      else:
        axes.errorbar(
          line.x, line.y, line.errors, linestyle='-', color=line.colour, marker='o', markersize=3.5
        )
    axes.set(xlabel=panel.xlabel, ylabel=panel.unit)
    axes.locator_params(axis='x', nbins=6)
    if panel.log:
      axes.set_yscale('log')
      style.plain_numbers(axes.yaxis)
    elif limits := _limits(panel.lines):
      axes.set_ylim(limits)
    svg = style.svg_of(figure)
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg') :], flags=re.DOTALL)
  svg = re.sub(r' id="[a-z_.]+\d+"', '', svg)  # of groups: the page has many figures
  svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
  svg = svg.replace(INK, 'currentColor').replace("'DejaVu Sans'", 'inherit')
  return element('figure', element('figcaption', panel.title), Html(svg))


def _limits(lines: list[Line]) -> tuple[float, float] | None:
  """Returns the ends of an axis without how training begins; None without evaluations."""
  evaluated = [y for line in lines if line.errors is not None for y in line.y]
  trained = [y for line in lines if line.errors is None for y in line.y[len(line.y) // 4 :]]
  if not evaluated or not trained:
    return None
  values = np.array(evaluated + trained)
  margin = 0.05 * np.ptp(values) or 0.1
  return float(values.min() - margin), float(values.max() + margin)


def of_runs(runs: list[Run]) -> Html:
  """Returns the curves of all runs and their legend; nothing where there are none."""
  panels = [p for p in _panels(runs) if any(len(line.x) > 1 for line in p.lines)]
  if not panels:
    return element('p', 'There are no curves yet: too little was trained or evaluated.')
  if len(runs) > 1:
    labels = [(colour(i), run.name) for i, run in enumerate(runs)]
  else:
    labels = [(colour(i), f'{name} parameters') for i, name in enumerate(_names(runs[0]))]
  note = 'Pale: training, means of the steps between. Dots: evaluations, with standard errors.'
  return joined(key(labels), draw(panels), element('p', note, class_='note'))


def _names(run: Run) -> list[str]:
  """Returns the names of the parameters that are evaluated, that of the headline first."""
  names = [series[0]['params'] for series in run.series.values()]
  first = [run.headline[0]['params']] if run.headline else ['ema']
  return list(dict.fromkeys(first + sorted(names)))


def _panels(runs: list[Run]) -> Iterator[Panel]:
  for metric, unit in cards.UNITS.items():
    lines = [
      line
      for i, run in enumerate(runs)
      for line in [*_trained(run, f'train/{metric}', i), *_bounds(run, metric, i, len(runs) == 1)]
    ]
    yield Panel('Variational bound', unit, lines)
  for metric in dict.fromkeys(m for run in runs for m in _distances(run)):
    chosen = [(i, _distances(run)) for i, run in enumerate(runs)]
    lines = [_evaluated(found[metric], i) for i, found in chosen if metric in found]
    yield Panel('Fréchet distance of samples', metric, lines, log=True)
  if len(runs) > 1:
    yield from _bins(runs)
  for tag, title, unit, log in (
    ('loss', 'Loss in training', 'nats/dim', True),
    ('grad_norm', 'Gradient', 'norm', True),
    ('diffusion_cv', 'Spread of the diffusion loss', 'standard deviation / mean', False),
    ('images_per_second', 'Speed', 'images/s', False),
  ):
    lines = [line for i, run in enumerate(runs) for line in _trained(run, f'train/{tag}', i)]
    log = log and all(y > 0 for line in lines for y in line.y)
    yield Panel(title, unit, lines, log=log)


def _trained(run: Run, tag: str, number: int) -> list[Line]:
  """Returns the curve of a scalar of training, if it has one."""
  if tag not in run.scalars:
    return []
  finite = {step: y for step, y in run.scalars[tag].items() if np.isfinite(y)}
  return [Line(colour(number), list(finite), list(finite.values()), None)]


def _bounds(run: Run, metric: str, number: int, each: bool) -> Iterator[Line]:
  """Yields the curve of the bound of the headline's parameters; if `each`, of the others too."""
  bounds = [s for s in run.series.values() if s[0]['metric'] == metric and cards.is_bound(s[0])]
  for i, name in enumerate(_names(run) if each else _names(run)[:1]):
    own = [series for series in bounds if series[0]['params'] == name]
    if own:
      yield _evaluated(max(own, key=len), i if each else number)


def _evaluated(series: list[Card], number: int) -> Line:
  steps, values = [card['step'] for card in series], [card['value'] for card in series]
  return Line(colour(number), steps, values, [cards.at(card, 'stderr') or 0.0 for card in series])


def _distances(run: Run) -> dict[str, list[Card]]:
  """Returns the longest series of each Fréchet distance."""
  distances = [series for series in run.series.values() if cards.is_distance(series[0])]
  return {series[0]['metric']: series for series in sorted(distances, key=len)}


def _bins(runs: list[Run]) -> Iterator[Panel]:
  """Yields what the newest bound spends per unit of log-SNR, by unit."""
  for metric, unit in cards.UNITS.items():
    lines, field = [], f'{metric}_per_log_snr'
    for i, run in enumerate(runs):
      card = run.headline[-1] if run.headline else {}
      if {field, 'log_snr_min', 'log_snr_max'} <= card.keys():
        values = [np.nan if value is None else value for value in card[field]]
        edges = np.linspace(card['log_snr_min'], card['log_snr_max'], len(values) + 1)
        lines.append(Line(colour(i), ((edges[1:] + edges[:-1]) / 2).tolist(), values, None))
    yield Panel('Where the bound is spent', f'{unit} per unit', lines, xlabel='log-SNR')
