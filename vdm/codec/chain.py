"""Bits-back coding in the order of the forward chain, of one group of images.

The forward chain is Markov from the data upwards, so latents are taken one level at a time, and two
levels are out at once, not T (Kingma, Abbeel and Ho 2019, arXiv 1905.06845, for the order):

  sender                                         receiver, the same backwards
  pop  z_0 ~ q(z_0 | x)                          pop  z_T ~ p(z_T)
  push u   ~ p(u | z_0)                          for i = T, ..., 1:
  for i = 1, ..., T:                               pop  z_(i-1) ~ p(z_(i-1) | z_i)
    pop  z_i     ~ q(z_i | z_(i-1))                push z_i     ~ q(z_i | z_(i-1))
    push z_(i-1) ~ p(z_(i-1) | z_i)              pop  u   ~ p(u | z_0)
  push z_T ~ p(z_T)                              push z_0 ~ q(z_0 | x)

The expected length is the bound at T. Three things keep it there. Latents are coded as offsets from
their rounded mean in a window: the coder gives each symbol 2^-24 at least, so that on a wide grid
q would return an absurd value once in some thousand. The bits that were just pushed for z_(i-1)
would be popped for z_i, and its noise would be a copy: so dimensions are popped in another order
than they were pushed, and the bits to be popped are whitened by a keystream first.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from vdm.codec.grid import Grid
from vdm.codec.message import Message, keystream
from vdm.codec.network import Network

WINDOW_Q = 5.0  # standard deviations either side of the mean, of what is popped from q
WINDOW_P = 6.0  # and of what is pushed under p; what lies outside costs more
ORDER, WHITE = 1, 2  # what pseudo-random numbers are for
GAUSSIAN_BITS = math.log2(2 * math.pi * math.e) / 2  # entropy of a standard normal
# (level, z [G *shape] and x_hat(z) in the network's units): what the network is asked, and says
Watch = Callable[[int, np.ndarray, np.ndarray], None]


class Group(NamedTuple):
  """Holds what both sides share of a group.

  Attributes:
    network: of the model.
    grid: of its levels.
    conditions: of the group, [G ...].
    kept: bool [G *shape], what is coded: not what fills the group up, nor what a mask leaves out.
    seed: of permutations and whitening.
    number: of the group.
  """

  network: Network
  grid: Grid
  conditions: Mapping[str, np.ndarray]
  kept: np.ndarray
  seed: int
  number: int


def permutation(seed: int, number: int, level: int, count: int) -> np.ndarray:
  """Returns the order in which the latents of a group and level are popped."""
  return np.random.RandomState([seed, ORDER, number, level]).permutation(count)


def whitening(seed: int, number: int, level: int, count: int) -> np.ndarray:
  """Returns the words that turn over the top of the message before a level is popped."""
  return keystream(seed, WHITE, number, level, count=count)


def encode(group: Group, message: Message, u: np.ndarray, watch: Watch | None = None):
  """Puts the images u [G *shape] of a group onto the message."""
  last = group.grid.num_timesteps
  z = _draw(group, message, 0, group.network.values[u])
  message.push_values(u[group.kept], _probabilities(group, z))
  for level in range(1, last + 1):
    above = _draw(group, message, level, _in_units(group, level - 1, z))
    _push(group, message, level - 1, z, _predicted(group, level, above, watch))
    z = above
  _push(group, message, last, z, np.zeros(z.shape))


def decode(
  group: Group, message: Message, until: int = 0, watch: Watch | None = None
) -> np.ndarray | None:
  """Takes a group off the message; returns its images u [G *shape], 0 where nothing was coded.

  Args:
    group: as the sender has it.
    message: with the group on top.
    until: a level whose x_hat is the last thing to be found, and None is returned; 0: the images.
    watch: as in `encode`.
  """
  last = group.grid.num_timesteps
  z = _pop(group, message, last, np.zeros(group.kept.shape))
  for level in range(last, 0, -1):
    mean = _predicted(group, level, z, watch)
    if level == until:
      return None
    below = _pop(group, message, level - 1, mean)
    _give_back(group, message, level, z, _in_units(group, level - 1, below))
    z = below
  u = np.zeros(z.shape, np.int64)
  u[group.kept] = message.pop_values(_probabilities(group, z))
  _give_back(group, message, 0, z, group.network.values[u])
  return u


def _draw(group: Group, message: Message, level: int, below: np.ndarray) -> np.ndarray:
  """Pops z [G *shape], in cells, from q given x, for level 0, or z of the level below."""
  centre, *normal, window, order, white = _of_q(group, level, below)
  message.whiten(white)
  offsets = np.empty(len(order), np.int64)
  offsets[order] = message.pop(window, *normal)
  return _placed(group, centre + offsets)


def _give_back(group: Group, message: Message, level: int, z: np.ndarray, below: np.ndarray):
  """Pushes what `_draw` pops."""
  centre, *normal, window, order, white = _of_q(group, level, below)
  message.push((z[group.kept] - centre)[order], window, *normal)
  message.whiten(white)


def _of_q(group: Group, level: int, below: np.ndarray):
  """Returns centres [N], offsets and deviations in the order of popping, window, order, keystream.

  All are in cells. The keystream covers what a pop takes, and two bits per latent more.
  """
  centre, offset, std = _cells(group, level, group.grid.ratio[level] * below, group.grid.std_q)
  count, names = len(centre), (group.seed, group.number, level)
  order = permutation(*names, count)
  bits = (np.log2(std) + GAUSSIAN_BITS + 2).sum()
  white = whitening(*names, math.ceil(bits / 32) + 8)
  window = math.ceil(WINDOW_Q * std.max(initial=0))
  return centre, offset[order], std[order], window, order, white


def _push(group: Group, message: Message, level: int, z: np.ndarray, mean: np.ndarray):
  """Pushes z [G *shape], in cells, under p with this mean in the network's units."""
  centre, offset, std = _cells(group, level, mean, group.grid.std_p)
  window = math.ceil(WINDOW_P * std.max(initial=0))
  message.push_any(z[group.kept] - centre, window, offset, std)


def _pop(group: Group, message: Message, level: int, mean: np.ndarray) -> np.ndarray:
  """Pops what `_push` pushes."""
  centre, offset, std = _cells(group, level, mean, group.grid.std_p)
  window = math.ceil(WINDOW_P * std.max(initial=0))
  return _placed(group, centre + message.pop_any(window, offset, std))


def _cells(group: Group, level: int, mean: np.ndarray, stds: np.ndarray):
  """Returns rounded means int64 [N], what rounding left, and deviations, in cells of a level."""
  of_kept = lambda a: np.broadcast_to(a, group.kept.shape)[group.kept]
  cell = of_kept(group.grid.cell[level])
  mean = mean[group.kept] / cell
  centre = np.rint(mean)
  return centre.astype(np.int64), mean - centre, of_kept(stds[level]) / cell


def _placed(group: Group, coded: np.ndarray) -> np.ndarray:
  """Returns int64 [G *shape] of what is coded, [N]; 0 elsewhere."""
  placed = np.zeros(group.kept.shape, np.int64)
  placed[group.kept] = coded
  return placed


def _in_units(group: Group, level: int, z: np.ndarray) -> np.ndarray:
  """Returns latents in the network's units, float64, of those in cells."""
  return z * group.grid.cell[level]


def _predicted(group: Group, level: int, z: np.ndarray, watch: Watch | None) -> np.ndarray:
  """Returns the mean of p(z_(level - 1) | z_level), float64 [G *shape]."""
  z = _in_units(group, level, z)
  x_hat = group.network.predict(z.astype(np.float32), level, group.conditions)
  if watch:
    watch(level, z, x_hat)
  return group.grid.keep[level] * z + group.grid.gain[level] * x_hat.astype(np.float64)


def _probabilities(group: Group, z: np.ndarray) -> np.ndarray:
  """Returns p(u | z_0) of what is coded, float32 [N K]."""
  z = _in_units(group, 0, z).astype(np.float32)
  rows = [i for i, kept in enumerate(group.kept) if kept.any()]
  each = [group.network.probabilities(z[i])[group.kept[i].reshape(-1)] for i in rows]
  return np.concatenate(each)
