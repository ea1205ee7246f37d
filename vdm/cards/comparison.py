"""Sets cards side by side: what each says of its number, and why two are not comparable."""

import functools
import json
import math
from typing import Any, NamedTuple

from vdm.cards.card import ODE, at


class Field(NamedTuple):
  """Says of a card's field where it is, its column in the table ('' for none), and what it decides.

  Values of cards in which it differs are not comparable, for the reason `why`; '' is a note.
  """

  path: str
  column: str
  why: str


FIELDS = (
  Field('metric', 'metric', 'another quantity'),  # such as a density, and no probability
  Field('decoder', '', 'densities alone, or with probabilities at bounds, or probabilities'),
  Field('estimate', 'estimate', 'bounds differ in how tight they are, and from the likelihood'),
  # of the data
  Field('data.full_name', 'data', 'another data set or version, with other pixels'),
  Field('data.split', 'split', 'other images'),
  Field('num_images', 'images', 'other images'),
  Field('data.image_shape', '', 'images of another size'),
  Field('data.num_values', '', 'another vocabulary: bits/dim of other symbols'),
  Field('data.derive', '', 'another condition, or coefficients of pixels'),
  Field('data.level', '', 'another scale of the Haar transform'),
  Field('data.dequantize', '', 'other integers, or none, with noise added'),
  Field('data.masked', '', 'other dimensions are counted'),
  Field('data.num_bits', '', 'other bits of the pixels'),
  Field('data.resize', '', 'pixels scaled in another way'),
  Field('data.sha256_first_64', '', 'other pixels'),
  Field('conditions', '', 'log p(x | y), or log p(x)'),
  Field('data.sha256_conditions_first_64', '', 'other conditions, or another mask'),
  # of a distance between samples and data
  Field('extractor', 'extractor', 'features of another network'),
  Field('extractor_sha256', '', 'features of another network'),
  Field('reference', '', 'other real images'),
  Field('num_samples', 'samples', 'the fewer samples, the greater the distance'),
  Field('flips', '', 'real images flipped, or not'),
  # notes: what one may want to compare
  Field('params', 'params', ''),
  Field('step', 'step', ''),
  Field('schedule', 'schedule', ''),
  Field('draws_per_image', 'draws', ''),
  Field('sampler', 'sampler', ''),
  Field('network_evaluations', 'evaluations', ''),
  Field('eval_seed', '', ''),
  Field('stderr_over', '', ''),
  Field('dtype', '', ''),
  Field('environment.device', '', ''),
  Field('revision', 'revision', ''),
)


def facts(card: dict[str, Any]) -> dict[str, Any]:
  """Returns the value of each of FIELDS by its path; None if the card does not say."""
  said = functools.partial(at, card)
  revision, plus, changes = str(said('environment.git_revision') or '').partition('+')
  derived = {'revision': revision[:9] + plus + changes}
  if said('bound') and not said('decoder'):  # a card older than the field is of probabilities
    derived['decoder'] = 'discrete'
  if said('bound'):
    derived['conditions'] = _told(card)
  if isinstance(said('data'), dict):  # a card older than these fields is of data as it was
    blank = {'num_bits': 0, 'resize': False, 'masked': False, 'derive': ''}
    blank |= {'level': 0, 'dequantize': 0}
    told = derived.get('conditions') != 'none' or said('data.masked')
    unused = {} if told else {'sha256_conditions_first_64': ''}
    derived['data'] = blank | said('data') | unused
  own, other = said('config.schedule.name'), said('config.eval.schedule.name')
  bound = str(said('bound') or '')
  if bound.startswith(ODE):
    ode = said('config.eval.ode') or {}
    derived['estimate'] = (
      f'ODE, {at(ode, "dequantization")} dequantisation, K = {at(ode, "importance_samples")}'
    )
    derived |= {'schedule': own, 'stderr_over': said('stderr_over') or 'images'}
  elif bound:
    steps = said('config.eval.num_timesteps')
    derived['estimate'] = f'ELBO, {f"T = {steps}" if steps else "continuous"}'
    derived |= {'schedule': own if other in (None, 'schedule') else other, 'stderr_over': 'draws'}
  return {field.path: at(card | derived, field.path) for field in FIELDS}


def _told(card: dict[str, Any]) -> str:
  """Returns what a likelihood's model was told of each example: 'class, vector of 3', or 'none'."""
  said, kinds = functools.partial(at, card), []
  if said('config.model.class_conditional'):
    kinds.append('class')
  if said('data.vector_size'):
    kinds.append(f'vector of {said("data.vector_size")}')
  if said('data.condition_shape'):
    kinds.append(f'field of {" x ".join(map(str, said("data.condition_shape")))}')
  return 'none' if said('conditions') == 'none' else ', '.join(kinds) or 'none'


def compare(cards: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
  """Returns why the cards' values are not comparable, and what else differs, one per line."""
  found, reasons, notes = [facts(card) for card in cards], [], []
  for field in FIELDS:
    groups = {}
    for number, fact in enumerate(found, 1):
      groups.setdefault(_text(fact[field.path]) or 'not said', []).append(str(number))
    if len(groups) > 1:
      values = '; '.join(f'{text} ({", ".join(numbers)})' for text, numbers in groups.items())
      if field.why:
        reasons.append(f'not comparable, {field.path}: {values}: {field.why}')
      else:
        notes.append(f'note, {field.path}: {values}')
  return reasons, notes


def table(paths: list[str], cards: list[dict[str, Any]]) -> str:
  """Returns the cards as a Markdown table, aligned, without the columns that none of them has."""
  rows = [['', 'value', *(field.column for field in FIELDS if field.column), 'file']]
  for number, (path, card) in enumerate(zip(paths, cards, strict=True), 1):
    stderr = at(card, 'stderr')
    known = isinstance(stderr, int | float) and math.isfinite(stderr)
    value = f'{card["value"]:.4f}' + (f' ± {stderr:.4f}' if known else '')
    fact = facts(card)
    cells = [_text(fact[field.path]) for field in FIELDS if field.column]
    rows.append([str(number), value, *cells, path])
  columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
  widths = [max(map(len, column)) for column in columns]
  lines = [
    '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |'
    for row in zip(*columns, strict=True)
  ]
  rule = '|' + '|'.join('-' * (width + 2) for width in widths) + '|'
  return '\n'.join([lines[0], rule, *lines[1:]])


def _text(value: Any) -> str:
  if value is None:
    return ''
  return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
