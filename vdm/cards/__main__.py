"""Sets number cards side by side.

  python -m vdm.cards a.json b.json ...     a table, and what keeps the values from being compared

The status is 0 if nothing does, 1 otherwise.
"""

import argparse
import sys

from vdm.cards.card import load
from vdm.cards.comparison import compare, table


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m vdm.cards',
    description='Sets number cards side by side, and says which of their values are not '
    'comparable, and why. Status 0 where all are, 1 otherwise.',
  )
  parser.add_argument('cards', nargs='+', metavar='CARD.json', help="a run's cards/*.json")
  paths = parser.parse_args(argv).cards
  try:
    cards = [load(path) for path in paths]
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  reasons, notes = compare(cards)
  verdict = [] if reasons else ['The values are comparable.']
  print('\n'.join([table(paths, cards), '', *reasons, *notes, *verdict]))
  return 1 if reasons else 0


if __name__ == '__main__':
  sys.exit(main())
