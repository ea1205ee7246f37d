"""Rate and distortion along the chain: what pictures are before all of their bits are there.

python -m vdm.codec.curve TABLE.csv PLOT.png     # draws a report's rate_distortion.csv again
"""

import math
import pathlib
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdm import style
from vdm.codec import rivals
from vdm.codec.network import count_values
from vdm.diffusion.decoders import Decoder
from vdm.system import files

Points = dict[str, list[tuple[float, float, float]]]  # by codec: (setting, bits/dim, PSNR in dB)
HEADER = ('codec', 'setting', 'bits_per_dim', 'psnr_db')


class Along:
  """Adds up what the latents of images cost, level by level, and how far x_hat is from the images.

  To know z_i costs KL(q(z_T | x) || p(z_T)) and KL(q(z_(j-1) | z_j, x) || p(z_(j-1) | z_j)) of all
  j > i, the expected net length down to there (Ho, Jain and Abbeel 2020, arXiv 2006.11239, section
  4.3). The noise of z_i, which says nothing of the images, is not counted: the words of it lie on
  top in a file, as initial bits that a receiver who stops never gives back.
  """

  def __init__(self, images: np.ndarray, decoder: Decoder, valid: np.ndarray | None = None):
    """Takes the images [N *spatial C], what knows their units, and which dimensions count."""
    self._images, self._decoder, self._num_values = images, decoder, count_values(decoder)
    self._valid = np.ones(images.shape, bool) if valid is None else valid
    self._squares: dict[int, float] = {}  # by level: of x_hat as a picture, in values
    self._errors: dict[int, np.ndarray] = {}  # and in the network's units, [*shape]

  def __call__(self, rows: slice, level: int, z: np.ndarray, x_hat: np.ndarray):
    """Takes what the network says of some images at a level (`coder.Watch`)."""
    u, valid = self._images[rows], self._valid[rows]
    x = np.asarray(self._decoder.to_model(jnp.asarray(u)), np.float64)
    picture = np.asarray(self._decoder.from_model(jnp.asarray(x_hat)), np.float64)
    self._squares[level] = self._squares.get(level, 0.0) + ((picture - u) ** 2 * valid).sum()
    self._errors[level] = self._errors.get(level, 0.0) + ((x_hat - x) ** 2 * valid).sum(axis=0)

  def points(self, log_snr: np.ndarray) -> list[tuple[float, float, float]]:
    """Returns (log-SNR, bits/dim, PSNR in dB) of the pictures of each level, in decoding order.

    Args:
      log_snr: of the levels, float64 [T + 1 ...].
    """
    snr, found = np.exp(log_snr), []
    x = np.asarray(self._decoder.to_model(jnp.asarray(self._images)), np.float64)
    a2, s2 = snr[-1] / (1 + snr[-1]), 1 / (1 + snr[-1])
    nats = (0.5 * (a2 * x**2 + s2 - np.log(s2) - 1) * self._valid).sum()
    num_dims = self._valid.sum()
    for level in range(len(snr) - 1, 0, -1):
      bits = float(nats / (math.log(2) * num_dims))
      square = self._squares[level] / num_dims
      found.append((float(log_snr[level].mean()), bits, rivals.psnr(square, self._num_values)))
      nats += (0.5 * (snr[level - 1] - snr[level]) * self._errors[level]).sum()
    return found


def write(folder: pathlib.Path, name: str, points: Points):
  """Writes the curve as a table and as a plot, <name>.csv and <name>.png."""
  rows = [(codec, *point) for codec, of_codec in points.items() for point in of_codec]
  finite = [row for row in rows if math.isfinite(row[-1])]
  files.write_table(folder / f'{name}.csv', HEADER, finite)
  plot(points, folder / f'{name}.png')


@style.paper
def plot(points: Points, path: pathlib.Path) -> np.ndarray:
  """Draws PSNR against the bits spent, a line for each codec."""
  drawn, axes = style.figure(1, (5.2, 3.4))
  lines: dict[str, Any] = {}
  for codec, of_codec in points.items():
    shown = np.array([point for point in of_codec if math.isfinite(point[2])])
    marker = {} if len(shown) > 50 else {'marker': 'o', 'markersize': 3}
    (lines[codec],) = axes.plot(shown[:, 1], shown[:, 2], **marker)
  axes.set_xlabel('bits/dim')
  axes.set_ylabel('PSNR (dB)')
  axes.set_xlim(left=0)
  style.label_ends(axes, lines)
  return style.save(drawn, path)


def main(argv: list[str]) -> int:
  """Draws a table of `write` again; returns the exit status."""
  if len(argv) != 2:
    print(__doc__, file=sys.stderr)
    return 1
  points: Points = {}
  header, *rows = files.read_table(pathlib.Path(argv[0]))
  for row in rows:
    codec, *numbers = (row[header.index(name)] for name in HEADER)
    setting, bits, psnr = map(float, numbers)
    points.setdefault(codec, []).append((setting, bits, psnr))
  plot(points, pathlib.Path(argv[1]))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
