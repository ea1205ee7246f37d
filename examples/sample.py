"""Draws a grid of pictures from a model: of the checkout's own, or of any run or released one.

python examples/sample.py [WORKDIR] [--out=FILE]
"""

import argparse
import pathlib

import vdm
from vdm.sampling.picture import flat_pictures, image_grid, save_png

SHIPPED = pathlib.Path(__file__).parents[1] / 'pretrained' / 'digits'


def main():
  """Draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', nargs='?', default=SHIPPED, help='default: pretrained/digits')
  parser.add_argument('--out', default='samples.png', help='PNG to write; default: samples.png')
  args = parser.parse_args()
  vdm.use_cores()
  try:
    exp, state = vdm.load(args.workdir)
  except ValueError as error:
    parser.error(str(error))
  pixels = exp.model.decoder.to_pixels(exp.sample(state, 64))
  save_png(pathlib.Path(args.out), image_grid(flat_pictures(pixels)))
  print(args.out)


if __name__ == '__main__':
  main()
