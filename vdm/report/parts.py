"""The parts of a page, each about one run."""

import json
from typing import Any

from etils import epath

from vdm import cards
from vdm.report.markup import Html, element, folded, joined, picture, table
from vdm.report.run import Card, Run, command
from vdm.system import files
from vdm.training.tags import describe
from vdm.workdir.config_file import changes

MOST_GRIDS = 4  # of samples along training


def value_of(card: Card) -> str:
  """Returns a card's value with its standard error, as far as that lets one say it."""
  return cards.plus_minus(card['value'], cards.at(card, 'stderr')).replace('+-', '±')


def unit_of(card: Card) -> str:
  """Returns the unit of a likelihood; of any other card its metric."""
  return cards.UNITS[card['metric']] if cards.is_likelihood(card) else card['metric']


def data_of(card: Card) -> str:
  """Returns the data's full name, '' if the card does not say."""
  return cards.at(card, 'data.full_name') or ''


def progress(run: Run) -> str:
  """Returns how far a run has come."""
  if run.is_released:
    return f'released, at step {run.step:,}'
  if run.step < run.num_steps:
    return f'step {run.step:,} of {run.num_steps:,} so far'
  return f'{run.num_steps:,} steps'


def headline(run: Run) -> Html:
  """Returns the number that a run is known by: error, unit, and what it was measured on."""
  if not run.headline:
    trained = [v for k, v in run.scalars.items() if k.removeprefix('train/') in cards.UNITS]
    last = f' The last step of training had {list(trained[0].values())[-1]:.3f}.' if trained else ''
    return element('p', f'No evaluation yet.{last}', class_='note')
  card, best = run.headline[-1], cards.best(run.headline)
  number = element('p', value_of(card), ' ', element('small', unit_of(card)), class_='headline')
  what = ', '.join([*cards.description(card), f'step {card["step"]:,}'])
  facts = [f'Lower is better. Data: {data_of(card)}.']
  if interval := cards.at(card, 'interval_95'):
    facts.append(f'95 % interval: {interval[0]:.4f} to {interval[1]:.4f}.')
  if terms := cards.at(card, 'terms'):
    said = (f'{name} {term["value"]:.4f}' for name, term in terms.items())
    facts.append(f'Terms: {", ".join(said)}.')
  exact = cards.at(card, 'data.exact_nats_per_dim')
  if exact is not None and card['whole_split']:
    facts.append(f'Exact: {exact:.4f}.')
  if len(run.headline) > 1:
    whose = 'This is' if best is card else f'{value_of(best)} at step {best["step"]:,} is'
    facts.append(f'{whose} the best of {len(run.headline)} evaluations.')
  return joined(number, element('p', what), element('p', ' '.join(facts), class_='note'))


def numbers(run: Run) -> Html:
  """Returns the newest card of every series, with what it is, and the headline's facts and JSON."""
  rows, notes = [], {}
  order = lambda series: (not cards.is_likelihood(series[0]), series[0]['metric'])
  for series in sorted(run.series.values(), key=order):
    card, best, name = series[-1], cards.best(series), series[0]['metric']
    if not cards.is_likelihood(card) and (meaning := describe(f'eval/{name}')):
      notes[name] = element('li', element('code', name), ' ', meaning)
    lowest = cards.is_likelihood(card) or cards.is_distance(card)
    rows.append(
      [
        unit_of(card),
        value_of(card),
        f'{card["step"]:,}',
        f'{best["value"]:.4g} at {best["step"]:,}' if lowest and len(series) > 1 else '',
        ', '.join(cards.description(card)[0 if cards.is_likelihood(card) else 1 :]),
      ]
    )
  if not rows:
    return element('p', 'There is no number card yet.')
  head = ('', 'newest', 'step', 'lowest', 'what it is')
  parts = [table(head, rows, ('short', 'number', 'number', 'short', 'long'))]
  if notes:
    parts.append(folded('What these are', element('ul', *notes.values())))
  if run.headline:
    card = run.headline[-1]
    facts = [(k, _plain(v)) for k, v in cards.facts(card).items() if v not in (None, '')]
    parts.append(folded('What the number above can be compared by', table((), facts)))
    shown = {k: v for k, v in card.items() if k not in ('config', 'path')}
    text = element('pre', json.dumps(shown, indent=2, ensure_ascii=False))
    parts.append(folded(f'The card itself, but for the config: {card["path"]}', text))
  return joined(*parts)


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figure(path: epath.Path, text: str, class_: str = '') -> Html:
  """Returns a picture with its name, or what is wrong with it."""
  try:
    shown = picture(path, text)
  except ValueError as error:
    shown = element('span', str(error), class_='damaged')
  return element('figure', shown, element('figcaption', text), class_=class_ or None)


def grids(run: Run) -> list[epath.Path]:
  """Returns the pictures of samples: those of training, then those that --mode=sample drew."""
  training = run.pictures('samples', 'step_*')
  names = {path.name for path in training} | {p.name for p in run.pictures('samples', 'progr*')}
  return training + [p for p in run.pictures('samples') if p.name not in names]


def samples(run: Run) -> Html:
  """Returns samples along training and newest, and the newest progressive denoising."""
  training = run.pictures('samples', 'step_*')
  drawn = [path for path in grids(run) if path not in training]
  if len(training) > MOST_GRIDS:
    last = len(training) - 1
    training = [training[round(i * last / (MOST_GRIDS - 1))] for i in range(MOST_GRIDS)]
  shown = [figure(path, f'step {int(path.stem[5:]):,}', 'grid') for path in training]
  shown += [figure(path, path.stem, 'grid') for path in drawn]
  if not shown:
    return element('p', 'No samples are drawn yet.')
  progressive = run.pictures('samples', 'progressive_*')[-1:]
  text = 'what the network sees (z) and says (x_hat), by log-SNR'
  wide = [figure(path, text, 'progressive') for path in progressive]
  return joined(element('div', *shown, class_='panels grids'), *wide)


def plots(run: Run) -> Html:
  """Returns the plots of the workdir, but for that of likelihoods, which are among the curves."""
  found = [path for path in run.pictures('plots') if path.stem not in cards.UNITS]
  if not found:
    return element('p', 'There are no plots yet.')
  shown = [figure(path, path.stem.replace('_', ' ')) for path in found]
  return element('div', *shown, class_='panels wide')


def config(run: Run) -> Html:
  """Returns what of the config differs from the defaults, and then all of it."""
  rows = [
    (element('code', leaf), _plain(value), '' if usual is None else _plain(usual))
    for leaf, value, usual in changes(run.settings)
  ]
  whole = element('pre', json.dumps(run.settings, indent=2, ensure_ascii=False))
  return joined(
    element('p', 'What differs from configs/default.py:'),
    table(('', 'here', 'default'), rows),
    folded('The whole config', whole),
  )


def provenance(run: Run) -> Html:
  """Returns devices, versions and revision of the newest evaluation, and what repeats the run."""
  parts = []
  newest = max((s[-1] for s in run.series.values()), key=lambda card: card['step'], default={})
  said = lambda name: cards.at(newest, f'environment.{name}') or ''
  versions = {'python': said('python')} | (said('versions') or {})
  rows = [
    ('devices', f'{said("num_devices")} x {said("device")}, hosts: {said("num_hosts")}'),
    ('versions', ', '.join(f'{name} {version}' for name, version in versions.items())),
    ('git revision', said('git_revision') or 'none: not in a checkout'),
  ]
  place = ('workdir', str(files.absolute(run.workdir)))
  parts.append(table((), [*rows, place] if newest else [place]))
  parts += [element('p', 'To train it again:'), element('pre', command(run))]
  return joined(*parts)


def damage(run: Run) -> Html | None:
  """Returns which files could not be read, if any."""
  if not run.damaged:
    return None
  return element('ul', *(element('li', line) for line in run.damaged), class_='damaged')
