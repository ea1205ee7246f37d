"""python -m vdm.data: looks at data sets, and converts prepared TFDS data sets."""

import argparse
import sys

from vdm.data.prepare import convert, show


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m vdm.data',
    description='Looks at data sets, and converts prepared TFDS data sets.',
  )
  commands = parser.add_subparsers(required=True)
  for function, text in (
    (show, 'Print the lines of config.data for a data set.'),
    (convert, 'Write ArrayRecord files, which have random access, beside the TFRecord files.'),
  ):
    command = commands.add_parser(function.__name__, help=text, description=text)
    command.set_defaults(function=function)
    command.add_argument(
      '--name', required=True, help="e.g. 'folder', 'arrays' or 'imagenet_resized/64x64'"
    )
    command.add_argument(
      '--data_dir', default='', help='default: $TFDS_DATA_DIR, else ~/tensorflow_datasets'
    )
    if function is show:
      command.add_argument('--path', default='', help='of a folder, or a file of arrays')
      shape = lambda text: tuple(map(int, text.split(',')))
      command.add_argument(
        '--image_shape', type=shape, help='e.g. 64,64,3: pictures of any size become so large'
      )
  args = vars(parser.parse_args(argv))
  function = args.pop('function')
  try:
    print(function(**args))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
