"""Sets folders of class-conditional samples under one another: a row per image, a column per class.

  for W in 1 2 4; do python -m vdm.main --config=configs/fashion_mnist_full.py --mode=sample \\
    --workdir=pretrained/fashion_mnist_full --out=DIR/$W \\
    --config.sample.num_images=30 --config.sample.batch_size=30 \\
    --config.sample.sampler.name=dpmpp_2m --config.sample.num_steps=32 \\
    --config.sample.guidance.kind=classifier_free --config.sample.guidance.weight=$W; done
  python examples/guidance.py guidance.png DIR/*/samples/*/ \\
    --classes=T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,boot
"""

import argparse
import json
import pathlib

import numpy as np

from vdm import style
from vdm.diffusion.decoders import discrete
from vdm.sampling.folder import read_shards
from vdm.sampling.picture import image_grid


def draw(folders: list[pathlib.Path], classes: list[str], rows: int, path: pathlib.Path):
  """Draws the picture, a block of `rows` rows per folder."""
  blocks = {}
  for folder in folders:
    manifest = json.loads((folder / 'manifest.json').read_text())
    images = np.concatenate(list(read_shards(folder)))[: rows * len(classes)]
    stored = manifest['num_values'] if manifest['format'] == 'npz' else 256
    name = f'guidance {manifest["guidance"]["weight"]:g}' if len(folders) > 1 else ''
    blocks[name] = image_grid(discrete(stored).to_pixels(images), columns=len(classes))
  style.save(style.label_grid(blocks, classes), path)


def main():
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('picture', type=pathlib.Path, help='PNG to write')
  parser.add_argument('folders', nargs='+', type=pathlib.Path, help='of --mode=sample, in order')
  parser.add_argument('--classes', required=True, help='names, separated by commas')
  parser.add_argument('--rows', type=int, default=3, help='images of each class')
  args = parser.parse_args()
  draw(args.folders, args.classes.split(','), args.rows, args.picture)


if __name__ == '__main__':
  main()
