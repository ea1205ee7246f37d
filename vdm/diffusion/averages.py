"""Averages of the parameters over training: exponential ones, and power-function ones (EDM2).

A power-function average (Karras et al. 2024, arXiv 2312.02696, section 3) weighs the parameters of
step tau by tau^gamma: its length is a fixed share of training, `std` of it. Two of them, stored now
and then, span the others: `combination` gives the weights with which the stored ones add up to one
of any length, after training.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def exponential_share(
  step: jax.Array | int, batch_size: int, halflife_images: float, rampup_ratio: float
) -> jax.Array:
  """Returns the share of the newest parameters, 1 - 0.5 ** (batch_size / halflife).

  A share is exact where 1 less a decay would have lost its digits. Early on the half-life is at
  most a share `rampup_ratio` of the images seen, so that the average forgets the initial parameters
  (EDM).
  """
  halflife = jnp.float32(halflife_images)
  if rampup_ratio:
    # as floats: a long run sees more images than an int32 can count
    halflife = jnp.minimum(halflife, (jnp.float32(step) + 1) * (batch_size * rampup_ratio))
  return -jnp.expm1(-math.log(2) * batch_size / halflife)


def power_share(step: jax.Array | int, std: float) -> jax.Array:
  """Returns the share of update number t = `step` + 1, 1 - (1 - 1/t)^(gamma + 1) (EDM2 eq. 127)."""
  return -jnp.expm1((exponent(std) + 1) * jnp.log1p(-1 / (jnp.float32(step) + 1)))


def exponent(std: float) -> float:
  """Returns gamma of the profile tau^gamma on [0, 1] of standard deviation `std` (EDM2 eq. 123).

  It solves std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which falls from 1/sqrt(12) at
  gamma = 0 to 0.
  """
  if not 0 < std < 12**-0.5:
    raise ValueError(f'config.ema.power_stds: {std} must be in (0, 0.288); try 0.05.')
  a = std**-2.0
  # (g + 2)^2 (g + 3) - a (g + 1) = 0
  roots = np.roots([1, 7, 16 - a, 12 - a])
  return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


def combination(
  times: np.ndarray, stds: np.ndarray, target_time: float, target_std: float
) -> np.ndarray:
  """Returns weights [N] of sum one with which N stored averages make another (EDM2, algorithm 3).

  The closest profile in the mean square has weights whose sum falls short of one, the more the
  fewer averages there are, and parameters so weighted are too small by as much: EDM2's code divides
  by the sum.

  Args:
    times: the step after which each was stored, [N].
    stds: the length of each, [N].
    target_time: the step at which the other one ends.
    target_std: its length.
  """
  times, exponents = np.asarray(times, np.float64), np.array([exponent(s) for s in stds])
  overlaps = _overlap(times[:, None], exponents[:, None], times[None], exponents[None])
  wanted = _overlap(times, exponents, float(target_time), exponent(target_std))
  weights = np.linalg.lstsq(overlaps, wanted, rcond=1e-14)[0]
  return weights / weights.sum()


def _overlap(t_a, gamma_a, t_b, gamma_b):
  """Returns int p_a p_b, where p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]."""
  least = np.minimum(t_a, t_b)
  height = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
  return height * (least / t_a) ** gamma_a * (least / t_b) ** gamma_b * least / (t_a * t_b)
