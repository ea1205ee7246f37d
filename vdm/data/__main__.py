"""python -m vdm.data: looks at and converts prepared TFDS data sets."""

import argparse
import sys

from vdm.data.prepare import convert, show


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m vdm.data', description='Looks at and converts prepared TFDS data sets.'
  )
  commands = parser.add_subparsers(required=True)
  for function, text in (
    (show, 'Print the lines of config.data for a data set.'),
    (convert, 'Write ArrayRecord files, which have random access, beside the TFRecord files.'),
  ):
    command = commands.add_parser(function.__name__, help=text, description=text)
    command.set_defaults(function=function)
    command.add_argument('--name', required=True, help="e.g. 'imagenet_resized/64x64'")
    command.add_argument(
      '--data_dir', default='', help='default: $TFDS_DATA_DIR, else ~/tensorflow_datasets'
    )
  args = parser.parse_args(argv)
  try:
    print(args.function(args.name, args.data_dir))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
