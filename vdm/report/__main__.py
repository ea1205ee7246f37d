"""Writes one HTML page of a run, or of several side by side.

  python -m vdm.report runs/digits                          digits.html
  python -m vdm.report runs/a runs/b --out=comparison.html

It reads workdirs, those in use and released models too, and writes nothing into them.
"""

import argparse
import sys

from vdm.report import write
from vdm.system import files


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m vdm.report',
    description='Writes one HTML page of a run, or of several side by side: numbers, curves, '
    'samples, plots, config, versions. Workdirs are only read.',
  )
  parser.add_argument('workdirs', nargs='+', metavar='WORKDIR', help='folder of a run')
  parser.add_argument(
    '--out', metavar='FILE.html', help='the page; else NAME.html here, or report.html of several'
  )
  given = parser.parse_args(argv)
  path = given.out
  try:
    name = files.absolute(files.path_of(given.workdirs[0])).name
    path = path or (f'{name}.html' if len(given.workdirs) == 1 else 'report.html')
    written = write(given.workdirs, path)
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except OSError as error:
    print(f'error: {error.filename or path}: {error.strerror or error}', file=sys.stderr)
    return 1
  print(f'{written}: {written.stat().length / 1e6:.2f} MB')
  return 0


if __name__ == '__main__':
  sys.exit(main())
