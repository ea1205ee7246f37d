"""The bound of a cascade of Haar scales, the sum of its stages', in bits per dimension of pixels.

  python -m benchmarks.cascade RUN RUN ... --out=samples.png

Each run is of one stage: config.data.derive 'haar_details' at levels 1, 2, ..., and 'haar_coarse'
at the last. With D_s dimensions in stage s of images of D, the bound is

  sum_s D_s nats_s / (D log 2),

for the transform is orthonormal: log p(pixels + noise) = sum_s log p(stage s | what is coarser).
"""

import argparse
import math
import pathlib

import numpy as np

import vdm
from vdm.build.state import TrainState
from vdm.data.wavelet import unhaar
from vdm.errors import require
from vdm.experiment import Experiment
from vdm.sampling.picture import image_grid, save_png

Stage = tuple[Experiment, TrainState]


def in_order(stages: list[Stage]) -> list[Stage]:
  """Returns the stages from the coarsest to the finest.

  Raises:
    ValueError: they are not one cascade.
  """
  of = lambda stage: stage[0].config.data
  ordered = sorted(stages, key=lambda stage: (-of(stage).level, of(stage).derive))
  found = [(of(stage).derive, of(stage).level) for stage in ordered]
  last = of(ordered[0]).level
  asked = [('haar_coarse', last), *(('haar_details', level) for level in range(last, 0, -1))]
  require(found == asked, 'runs', found, f'the stages {asked}', 'name a run of each')
  leaves = 'name', 'path', 'eval_split', 'eval_images', 'dequantize'
  sets = {
    (*(of(stage)[leaf] for leaf in leaves), stage[0].config.model.class_conditional)
    for stage in ordered
  }
  rule = f'of one data set, alike in data.{", data.".join(leaves)} and model.class_conditional'
  require(len(sets) == 1, 'runs', sorted(sets), rule, 'name others')
  return ordered


def bound(stages: list[Stage], **settings) -> list[tuple[str, int, float, float]]:
  """Returns for each stage its name, dimensions, and nats per dimension with their error."""
  rows = []
  for exp, state in stages:
    result, data = exp.bits_per_dim(state, **settings), exp.config.data
    size = math.prod(data.image_shape)
    rows.append((f'{data.derive} {data.level}', size, result.value, result.stderr))
  return rows


def sample(stages: list[Stage], num_images: int, label: np.ndarray | None = None) -> np.ndarray:
  """Returns images [N *spatial C], each stage's drawn given the one before."""
  (exp, state), *finer = stages
  pixels = exp.sample(state, num_images, label=label)
  for exp, state in finer:
    details = exp.sample(state, num_images, condition=pixels, label=label)
    pixels = unhaar(pixels, details)
  return pixels


def as_bytes(images: np.ndarray, num_values: int) -> np.ndarray:
  """Returns images of integers with noise, or of real values (0), in black to white as uint8."""
  low, high = (0, num_values - 1) if num_values else (images.min(), images.max())
  images = np.floor(images) if num_values else images
  return (np.clip((images - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def main():
  """Prints the table, and draws samples."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdirs', nargs='+', metavar='RUN')
  parser.add_argument('--draws', type=int, default=4)
  parser.add_argument('--max_images', type=int, default=0, help='0: all')
  parser.add_argument('--params', default='ema')
  parser.add_argument('--out', help='PNG of 64 samples')
  args = parser.parse_args()
  if args.draws < 2:
    parser.error(f'--draws={args.draws} must be 2 or more: the error is of their spread')
  vdm.use_cores()
  stages = in_order([vdm.load(workdir) for workdir in args.workdirs])
  rows = bound(stages, draws=args.draws, max_images=args.max_images, params=args.params)
  size = sum(dims for _, dims, _, _ in rows)
  shares = [
    (dims / size / math.log(2) * nats, dims / size / math.log(2) * error)
    for _, dims, nats, error in rows
  ]
  print('| stage | dimensions | nats/dim | bits/dim of the pixels |\n|---|---|---|---|')
  for (name, dims, nats, error), (bits, spread) in zip(rows, shares, strict=True):
    print(f'| {name} | {dims} | {nats:.4f} ± {error:.4f} | {bits:.4f} ± {spread:.4f} |')
  total, error = sum(bits for bits, _ in shares), math.hypot(*(spread for _, spread in shares))
  print(f'| all | {size} | | {total:.4f} ± {error:.4f} |')
  if args.out:
    images = as_bytes(sample(stages, 64), stages[0][0].config.data.dequantize)
    save_png(pathlib.Path(args.out), image_grid(images))


if __name__ == '__main__':
  main()
