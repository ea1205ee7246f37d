"""The levels of the chain, and the grid that the latents of each live on; float64 NumPy.

The latents z_0, ..., z_T are those at t = 0, 1/T, ..., 1. With c_i = -expm1(log_snr_i -
log_snr_(i-1)), the share of level i's noise that was added since the level below,

  q(z_0 | x)             = N(alpha_0 x, sigma_0^2)
  q(z_i | z_(i-1))       = N((alpha_i / alpha_(i-1)) z_(i-1), sigma_i^2 c_i)
  p(z_(i-1) | z_i)       = N(mean, sigma_(i-1)^2 c_i), mean as in `gaussian.posterior` at x_hat(z_i)
  p(z_T)                 = N(0, 1)                                         (VDM eq. 20, 25 to 33).

A latent is a whole number of its level's cells. They are narrow against both of its distributions,
and not narrower than that: each halving costs two bits of each latent of a group, once a stream.
"""

from typing import NamedTuple

import numpy as np

from vdm.errors import require


class Grid(NamedTuple):
  """Holds what a level is, [T + 1 ...]; trailing axes are those of a multivariate schedule.

  Attributes:
    log_snr: of each level, from that of the data down.
    cell: width of a cell.
    std_q: standard deviation of what is drawn: q(z_0 | x), q(z_i | z_(i-1)).
    std_p: of what is predicted: p(z_i | z_(i+1)), and 1 for the last.
    ratio: mean of q over what it is given: alpha_0, alpha_i / alpha_(i-1).
    keep: weight of z_i in the mean of p(z_(i-1) | z_i); nan for level 0.
    gain: weight of x_hat there.
  """

  log_snr: np.ndarray
  cell: np.ndarray
  std_q: np.ndarray
  std_p: np.ndarray
  ratio: np.ndarray
  keep: np.ndarray
  gain: np.ndarray

  @property
  def num_timesteps(self) -> int:
    """Returns T."""
    return len(self.log_snr) - 1


def make(log_snr: np.ndarray, cells: float) -> Grid:
  """Returns the grid of the levels log_snr [T + 1 ...], with `cells` in the narrower deviation.

  Raises:
    ValueError: there are fewer than two levels, or log_snr does not fall strictly.
  """
  log_snr = np.asarray(log_snr, np.float64)
  require(1 <= cells <= 1024, 'cells', cells, 'from 1 to 1024', 'try 2')
  steps = len(log_snr) - 1
  require(steps >= 1, 'num_timesteps', steps, '1 or more', 'try 200')
  falls = bool((np.diff(log_snr, axis=0) < 0).all())
  remedy = 'two of its times are one in float32: ask for fewer steps'
  require(falls, 'num_timesteps', steps, 'few enough that log_snr falls at every step', remedy)
  alpha, sigma = _root_sigmoid(log_snr), _root_sigmoid(-log_snr)
  share = -np.expm1(np.diff(log_snr, axis=0))  # c_1 .. c_T
  std_q = sigma.copy()
  std_q[1:] *= np.sqrt(share)
  std_p = np.ones_like(sigma)
  std_p[:-1] = sigma[:-1] * np.sqrt(share)
  ratio = alpha.copy()
  ratio[1:] /= alpha[:-1]
  keep, gain = np.full_like(alpha, np.nan), np.full_like(alpha, np.nan)
  keep[1:] = (1 - share) / ratio[1:]
  gain[1:] = alpha[:-1] * share
  return Grid(log_snr, np.minimum(std_q, std_p) / cells, std_q, std_p, ratio, keep, gain)


def _root_sigmoid(a: np.ndarray) -> np.ndarray:
  return np.sqrt(1 / (1 + np.exp(-a)))
