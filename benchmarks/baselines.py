"""Bits per dimension of two models without a network, on the split that a config names.

  python -m benchmarks.baselines --config=configs/digits.py

  histogram   each sub-pixel by itself: its training histogram, smoothed
  gaussian    one Gaussian fitted to the training images, discretised: a pixel's probability is the
              mass of its cell under its conditional given the pixels before it in raster order;
              the outermost cells reach to infinity

The smoothing and the ridge on the covariance are chosen from a list by the score on the test images
themselves, which flatters the baselines.
"""

import numpy as np
from absl import app
from ml_collections import config_flags
from scipy.special import ndtr

from vdm import data
from vdm.system import files

_CONFIG = config_flags.DEFINE_config_file('config', 'configs/digits.py', 'Config file.')
SMOOTHINGS = (0.01, 0.03, 0.1, 0.3, 1.0)  # counts added to each value of each pixel
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # variance added to each pixel, in squared grey levels


def histogram(train: np.ndarray, test: np.ndarray, num_values: int, smoothing: float) -> float:
  """Bits/dim of `test` [N D] integers under the smoothed per-pixel histograms of `train`."""
  counts = np.stack([(train == value).sum(axis=0) for value in range(num_values)])  # [K D]
  probs = (counts + smoothing) / (len(train) + smoothing * num_values)
  return -np.log2(np.take_along_axis(probs, test, axis=0)).mean()


def gaussian(train: np.ndarray, test: np.ndarray, num_values: int, ridge: float) -> float:
  """Bits/dim of `test` under the discretised conditionals of a Gaussian fitted to `train`."""
  mean = train.mean(axis=0)
  cholesky = np.linalg.cholesky(np.cov(train.T) + ridge * np.eye(train.shape[1]))
  std = np.diag(cholesky)
  # x = mean + L e, so a pixel's conditional mean is what the earlier e contribute.
  noise = np.linalg.solve(cholesky, (test - mean).T).T
  centre = test - noise * std
  upper = np.where(test == num_values - 1, np.inf, (test + 0.5 - centre) / std)
  lower = np.where(test == 0, -np.inf, (test - 0.5 - centre) / std)
  # The mass of a cell far out on the right is taken on the left, where it does not cancel.
  flip = lower > 0
  mass = ndtr(np.where(flip, -lower, upper)) - ndtr(np.where(flip, -upper, lower))
  return -np.log2(np.maximum(mass, 1e-300)).mean()


def main(_):
  """Prints one JSON line."""
  config = _CONFIG.value.data
  splits = {}
  for split in ('train', 'eval'):
    source = data.load(config, split)
    images = np.stack([source[i]['image'] for i in range(len(source))])
    splits[split] = images.reshape(len(images), -1).astype(np.int64)
  arguments = (splits['train'], splits['eval'], config.num_values)
  print(
    files.json_text(
      {
        'data': config.name,
        'train_images': len(splits['train']),
        'test_images': len(splits['eval']),
        'histogram_bits_per_dim': min(histogram(*arguments, s) for s in SMOOTHINGS),
        'gaussian_bits_per_dim': min(gaussian(*arguments, r) for r in RIDGES),
      },
      indent=None,
    ).rstrip()
  )


if __name__ == '__main__':
  app.run(main)
