"""Sets folders of class-conditional samples under one another: a row per image, a column per class.

  for W in 1 2 4; do python -m vdm.main --config=configs/fashion_mnist_full.py --mode=sample \\
    --workdir=pretrained/fashion_mnist_full --out=DIR/$W \\
    --config.sample.num_images=30 --config.sample.batch_size=30 \\
    --config.sample.sampler.name=dpmpp_2m --config.sample.num_steps=32 \\
    --config.sample.grid.name=edm_sample \\
    --config.sample.guidance.kind=classifier_free --config.sample.guidance.weight=$W; done
  python examples/guidance.py guidance.png DIR/*/samples/*/ \\
    --classes=T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,boot
"""

import argparse
import json
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vdm.diffusion.decoders import discrete
from vdm.sampling.folder import read_shards
from vdm.sampling.picture import image_grid


def main():
  """Draws the picture."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('picture', help='PNG to write')
  parser.add_argument('folders', nargs='+', type=pathlib.Path, help='of --mode=sample, in order')
  parser.add_argument('--classes', required=True, help='names, separated by commas')
  parser.add_argument('--rows', type=int, default=3, help='images of each class')
  args = parser.parse_args()
  classes = args.classes.split(',')
  figure = Figure((len(classes) * 0.62 + 1, len(args.folders) * args.rows * 0.62 + 0.4))
  FigureCanvasAgg(figure)
  panels = figure.subplots(len(args.folders), 1, squeeze=False, gridspec_kw={'hspace': 0.05})[:, 0]
  for axes, folder in zip(panels, args.folders, strict=True):
    manifest = json.loads((folder / 'manifest.json').read_text())
    images = np.concatenate(list(read_shards(folder)))[: args.rows * len(classes)]
    stored = manifest['num_values'] if manifest['format'] == 'npz' else 256
    pixels = discrete(stored).to_pixels(images)
    picture = image_grid(pixels, columns=len(classes))
    axes.imshow(picture if picture.shape[2] == 3 else picture[..., 0], 'gray', vmin=0, vmax=255)
    axes.set_ylabel(f'guidance {manifest["guidance"]["weight"]:g}')
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
      spine.set_visible(False)
  width = picture.shape[1] / len(classes)
  panels[0].xaxis.tick_top()
  panels[0].set_xticks((np.arange(len(classes)) + 0.5) * width, classes, fontsize='small')
  panels[0].tick_params(length=0)
  figure.savefig(args.picture, dpi=110, bbox_inches='tight')


if __name__ == '__main__':
  main()
