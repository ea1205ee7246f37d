"""Makes three sets of 28 x 28 pictures that Fashion-MNIST's likelihoods are set beside.

  python examples/other_sets.py DATA_DIR FOLDER

DATA_DIR has Fashion-MNIST as TFDS prepares it. FOLDER gets photos.npz, crops of scikit-learn's two
photographs; digits.npz, its handwritten digits drawn larger; and square.npz, ten garments, one of
them with a white square in its middle. docs/per_example.md has the commands that score them.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

import vdm

COUNT, SIZE = 300, 28


def photos(rng: np.random.Generator) -> np.ndarray:
  """Returns grey crops of two photographs, at a third of their size, uint8 [N 28 28 1]."""
  crops = []
  pictures = [Image.fromarray(picture).convert('L') for picture in load_sample_images().images]
  for number in range(COUNT):
    picture = pictures[number % len(pictures)]
    left, top = (int(rng.integers(0, side - 3 * SIZE)) for side in picture.size)
    crop = picture.crop((left, top, left + 3 * SIZE, top + 3 * SIZE))
    crops.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
  return np.stack(crops)[..., None]


def digits() -> np.ndarray:
  """Returns digits of 8 x 8 pixels drawn at 20 x 20 on black, as MNIST has them, [N 28 28 1]."""
  drawn = np.zeros((COUNT, SIZE, SIZE, 1), np.uint8)
  for number, image in enumerate(load_digits().images[:COUNT]):
    grey = Image.fromarray(np.uint8(image * 255 / 16))
    drawn[number, 4:24, 4:24, 0] = np.asarray(grey.resize((20, 20), Image.Resampling.BICUBIC))
  return drawn


def garments(data_dir: str) -> np.ndarray:
  """Returns a garment of each class, the pullover with a white square, uint8 [10 28 28 1]."""
  exp, _ = vdm.load('pretrained/fashion_mnist_full', overrides={'data.dir': data_dir})
  first = exp.source('eval').fetch(np.arange(200))
  chosen = [np.flatnonzero(first['label'] == label)[0] for label in range(10)]
  images = first['image'][chosen].copy()
  images[2, 11:17, 11:17] = 255
  return images


def main():
  """Writes the three sets."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('data_dir')
  parser.add_argument('folder', type=pathlib.Path)
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  np.savez(args.folder / 'photos.npz', x=photos(np.random.default_rng(0)))
  np.savez(args.folder / 'digits.npz', x=digits())
  np.savez(args.folder / 'square.npz', x=garments(args.data_dir))


if __name__ == '__main__':
  main()
