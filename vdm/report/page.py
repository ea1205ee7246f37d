"""The page: of one run, or of several side by side."""

import json
import os
import pathlib
import time
from collections.abc import Iterable

from etils import epath

import vdm
from vdm import cards
from vdm.report import curves, parts
from vdm.report.markup import Html, element, folded, joined, table
from vdm.report.run import Run, read, varying
from vdm.system import files

SAFE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing from elsewhere


def write(workdirs: Iterable[os.PathLike | str], path: os.PathLike | str) -> epath.Path:
  """Writes the page of one run, or of several side by side, to one HTML file; returns its path.

  The workdirs are only read, so that they may be in use, or another's; released models are
  workdirs too.

  Args:
    workdirs: of the runs.
    path: of the file.

  Raises:
    ValueError: a folder is no workdir, or its config cannot be read.
  """
  path = files.path_of(path)
  files.write(path, page(read(workdirs)))
  return path


def page(runs: list[Run]) -> str:
  """Returns the page of runs that were read."""
  title, body = _alone(runs[0]) if len(runs) == 1 else _side_by_side(runs)
  style = (pathlib.Path(__file__).parent / 'page.css').read_text()
  head = element(
    'head',
    element('meta', charset='utf-8'),
    element('meta', name='viewport', content='width=device-width, initial-scale=1'),
    element('meta', http_equiv='Content-Security-Policy', content=SAFE),
    element('title', title),
    element('style', Html(style)),
  )
  made = f'Written {time.strftime("%Y-%m-%d %H:%M")} by vdm {vdm.__version__}.'
  whole = element('html', head, element('body', body, element('footer', made)), lang='en')
  return f'<!DOCTYPE html>\n{whole}\n'


def _alone(run: Run) -> tuple[str, Html]:
  """Returns the title and body of the page of one run."""
  number = run.headline and f'{parts.value_of(run.headline[-1])} {parts.unit_of(run.headline[-1])}'
  data, network = run.settings['data']['name'], run.settings['model']['name']
  what = f'{run.settings["name"]}: {network} on {data}, {parts.progress(run)}'
  body = joined(
    element('h1', run.name),
    element('p', what, class_='note'),
    parts.damage(run),
    parts.headline(run),
    _sections(run, curves.of_runs([run])),
  )
  return f'{run.name}: {number or "no evaluation yet"}', body


def _sections(run: Run, drawn: Html | None) -> Html:
  """Returns what is below the headline; `drawn` are curves, if they are not elsewhere."""
  named = {
    'Samples': parts.samples(run),
    'Curves': drawn,
    'Numbers': parts.numbers(run),
    'Plots': parts.plots(run),
    'Config': parts.config(run),
    'Where it ran, and how to repeat it': parts.provenance(run),
  }
  found = [(name, part) for name, part in named.items() if part is not None]
  return joined(*(joined(element('h2', name), part) for name, part in found))


def _side_by_side(runs: list[Run]) -> tuple[str, Html]:
  """Returns the title and body of the page of several runs."""
  title = ', '.join(run.name for run in runs)
  damaged = [parts.damage(run) for run in runs]
  sections = {
    'Numbers': joined(_table(runs), _verdict(runs)),
    'Samples': _samples(runs),
    'Curves': curves.of_runs(runs),
    'What differs in the configs': _differences(runs),
    'Each run': joined(*(_folded(run) for run in runs)),
  }
  body = joined(
    element('h1', f'{len(runs)} runs side by side'),
    *damaged,
    *(joined(element('h2', name), part) for name, part in sections.items()),
  )
  return title, body


def _named(runs: list[Run]) -> list[Html]:
  """Returns the names of the runs, each with the colour of its curves."""
  chip = lambda i: element('span', class_='chip', style=f'background:{curves.colour(i)}')
  return [joined(chip(i), run.name) for i, run in enumerate(runs)]


def _newest(run: Run) -> dict[str, dict]:
  """Returns the newest card of each metric but likelihoods; of several, that of most samples."""
  last = [s[-1] for s in run.series.values() if not cards.is_likelihood(s[0])]
  last.sort(key=lambda card: (card['step'], cards.at(card, 'num_samples') or 0))
  return {card['metric']: card for card in last}


def _table(runs: list[Run]) -> Html:
  """Returns the newest numbers of the runs: the headline's, and of each other metric."""
  newest = [_newest(run) for run in runs]
  metrics = sorted({metric for own in newest for metric in own})
  rows = []
  for name, run, own in zip(_named(runs), runs, newest, strict=True):
    card = run.headline[-1] if run.headline else None
    value = f'{parts.value_of(card)} {parts.unit_of(card)}' if card else 'no evaluation yet'
    others = [parts.value_of(own[m]) if m in own else '' for m in metrics]
    what = ', '.join([parts.data_of(card), *cards.description(card)]) if card else ''
    rows.append([name, value, *others, parts.progress(run), what])
  head = ['', 'likelihood', *metrics, 'trained', 'measured on']
  return table(head, rows, [*['short'] * (len(head) - 1), 'long'])


def _verdict(runs: list[Run]) -> Html:
  """Returns whether the headlines may be compared, as `vdm.cards` has it, and what else differs.

  Of the table's other metrics those are named that may not be.
  """
  found = [(run, run.headline[-1]) for run in runs if run.headline]
  if len(found) < 2:
    told = [element('p', 'There are no two numbers to compare.', class_='note')]
  else:
    told = [_compared('likelihoods', found)]
  newest = [(run, _newest(run)) for run in runs]
  for metric in sorted({metric for _, own in newest for metric in own}):
    found = [(run, own[metric]) for run, own in newest if metric in own]
    if cards.compare([card for _, card in found])[0]:
      told.append(_compared(metric, found))
  return joined(*told)


def _compared(what: str, found: list[tuple[Run, dict]]) -> Html:
  """Returns what `cards.compare` says of a card of each of some runs, and which run is which."""
  reasons, notes = cards.compare([card for _, card in found])
  order = '; '.join(f'{i} is {run.name}' for i, (run, _) in enumerate(found, 1))
  if not reasons:
    verdict = element('p', f'The {what} are comparable.')
  else:
    lines = (element('li', f'{what}: {reason}') for reason in reasons)
    verdict = element('ul', *lines, class_='damaged')
  others = folded('What else is not the same', element('ul', *(element('li', n) for n in notes)))
  return joined(verdict, others if notes else None, element('p', order, class_='note'))


def _samples(runs: list[Run]) -> Html:
  """Returns the newest samples of each run, beside each other."""
  shown = []
  for run in runs:
    path = (run.pictures('samples', 'step_*') or parts.grids(run))[-1:]
    text = f'{run.name}, {path[0].stem.replace("_", " ")}' if path else f'{run.name}: no samples'
    shown += [parts.figure(p, text, 'grid') for p in path] or [element('p', text)]
  return element('div', *shown, class_='panels grids')


def _differences(runs: list[Run]) -> Html:
  """Returns the leaves in which the configs differ."""
  rows = [
    [element('code', leaf), *('—' if v is None else json.dumps(v) for v in values)]
    for leaf, values in varying(runs)
  ]
  if not rows:
    return element('p', 'Nothing, but perhaps their names.')
  return table(['', *_named(runs)], rows, ['short'])


def _folded(run: Run) -> Html:
  """Returns all of a run, folded."""
  inside = joined(parts.headline(run), _sections(run, None))
  return element('details', element('summary', run.name), inside, class_='run')
