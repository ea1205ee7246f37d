"""Number cards: a reported value as JSON, with all that makes it comparable.

vdm.cards.load('runs/digits/cards/bits_per_dim_ema_....json')['value']
"""

from vdm.cards.card import (
  ODE,
  UNITS,
  at,
  best,
  description,
  environment,
  error_fields,
  headline,
  is_bound,
  is_distance,
  is_likelihood,
  last_result,
  load,
  path_of,
  plus_minus,
  read,
  series,
  stderr_of,
  write,
)
from vdm.cards.comparison import compare, facts

ORDER = ('card', 'comparison', '__init__', '__main__')
__all__ = (
  'ODE',
  'ORDER',
  'UNITS',
  'at',
  'best',
  'compare',
  'description',
  'environment',
  'error_fields',
  'facts',
  'headline',
  'is_bound',
  'is_distance',
  'is_likelihood',
  'last_result',
  'load',
  'path_of',
  'plus_minus',
  'read',
  'series',
  'stderr_of',
  'write',
)
