"""Samplers: steps from z_t to z_s, and the one scan that runs them over a grid of log_snr.

A step needs only (x_hat, eps_hat) and log_snr at both ends. With h = log_snr_s - log_snr_t > 0 the
share of the noise at t that was added after s is c = -expm1(-h), and the probability flow moves
x_hat + noise eps_hat to `q_sample(x_hat, eps_hat, log_snr_s)` where the prediction is constant.
Methods stated for the variance-exploding state y = z / alpha at noise level exp(-log_snr / 2) are
written here for z.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm.diffusion.gaussian import (
  Denoiser,
  Schedule,
  alpha,
  expand_to,
  fold_in,
  posterior,
  q_sample,
  sigma,
  standard_normal,
)
from vdm.errors import require

# (keys [B], z_t, memory, denoiser, log_snr_t [B], log_snr_s [B]) -> (z_s, x_hat, memory)
Step = Callable[[Array, Array, Any, Denoiser, Array, Array], tuple[Array, Array, Any]]


class Sampler(NamedTuple):
  """Holds what `sample` scans."""

  step: Step
  evaluations: int = 1  # of the denoiser in a step
  # (z, log_snr [B ...] at the start, number of levels) -> memory before the first step
  init: Callable[[Array, Array, int], Any] = lambda z, log_snr, levels: ()


def ancestral(variance: float = 0.0) -> Sampler:
  """Returns the sampler of z_s ~ N(mean of q(z_s | z_t, x_hat), variance) (VDM eq. 33; DDPM).

  The step's variance is sigma_s^2 c, that of q(z_s | z_t, x) (`variance` = 0: VDM's own generative
  step), or sigma_t^2 c, that of q(z_t | z_s) (1); in between it is interpolated in log space,
  as in simple diffusion and VDM++.
  """
  require(0 <= variance <= 1, 'variance', variance, 'from 0, the lower, to 1', 'try 1')

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    x = denoiser(z_t, log_snr_t).x
    mean, lower = posterior(z_t, x, log_snr_t, log_snr_s)
    scale = jnp.sqrt(lower) * (sigma(log_snr_t) / sigma(log_snr_s)) ** variance
    return mean + expand_to(scale, z_t) * standard_normal(keys, z_t.shape[1:]), x, memory

  return Sampler(step)


def ddim(eta: float = 0.0) -> Sampler:
  """Returns DDIM's sampler (DDIM eq. 12, 16), with standard normal noise n:

    z_s = alpha_s x_hat + sigma_s (sqrt(1 - eta^2 c) eps_hat + eta sqrt(c) n).

  It is deterministic for `eta` = 0; for 1 it is the ancestral step with the lower variance.
  """
  require(0 <= eta <= 1, 'eta', eta, 'from 0, deterministic, to 1, ancestral', 'try 0')

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    x, eps = denoiser(z_t, log_snr_t)
    h = log_snr_s - log_snr_t
    c = -jnp.expm1(-h)
    keep = jnp.sqrt(jnp.exp(-h) + (1 - eta**2) * c)  # of 1 - eta^2 c, without its cancellation
    noise = standard_normal(keys, z_t.shape[1:])
    eps = expand_to(keep, z_t) * eps + expand_to(eta * jnp.sqrt(c), z_t) * noise
    return q_sample(x, eps, log_snr_s), x, memory

  return Sampler(step)


def heun(
  s_churn: float = 0.0, s_min: float = 0.0, s_max: float = 1e9, s_noise: float = 1.0
) -> Sampler:
  """Returns EDM's stochastic sampler (EDM algorithm 2): fresh noise, then a step of Heun's method.

  With y = z / alpha at level exp(-log_snr / 2), dy = eps_hat dlevel. Where the level lies in
  [s_min, s_max] it first rises by the factor 1 + gamma, gamma = min(s_churn / N, sqrt(2) - 1) for
  N levels, by noise scaled with `s_noise`; but never above the first level of the grid. The sampler
  is deterministic for `s_churn` = 0.
  """
  require(s_churn >= 0, 's_churn', s_churn, 'zero or more', 'give 0 for no noise')
  require(0 <= s_min < s_max, 's_min', s_min, f'in [0, s_max={s_max})', 'swap them')

  def init(z, log_snr, levels):
    stays, rule = s_churn == 0 or log_snr.ndim == 1, '0 under a multivariate schedule'
    require(stays, 's_churn', s_churn, rule, 'the noise would leave its path: give 0')
    return jnp.minimum(s_churn / levels, math.sqrt(2) - 1), log_snr

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    gamma, log_snr_start = memory
    level = jnp.exp(-log_snr_t / 2)
    gamma = jnp.where((s_min <= level) & (level <= s_max), gamma, 0.0)
    room = jnp.expm1((log_snr_t - log_snr_start) / 2)  # at the start 0, or what rounding left
    gamma = jnp.minimum(gamma, jnp.maximum(room, 0.0))
    log_snr = log_snr_t - 2 * jnp.log1p(gamma)
    noise = s_noise * standard_normal(keys, z_t.shape[1:])
    scale = sigma(log_snr) * jnp.sqrt(gamma * (2 + gamma)) / (1 + gamma)
    z = expand_to(alpha(log_snr) / alpha(log_snr_t), z_t) * z_t + expand_to(scale, z_t) * noise

    x, eps = denoiser(z, log_snr)
    euler = q_sample(x, eps, log_snr_s)
    correction = denoiser(euler, log_snr_s).eps - eps
    # alpha_s (level_s - level) / 2
    half_step = -0.5 * sigma(log_snr_s) * jnp.expm1((log_snr_s - log_snr) / 2)
    return euler + expand_to(half_step, z_t) * correction, x, memory

  return Sampler(step, evaluations=2, init=init)


def dpmpp_2m() -> Sampler:
  """Returns DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), deterministic and of second order.

  x_hat is extrapolated to the middle of the step from this and the last one: the step is DDIM's
  with, instead of x_hat, D = x_hat + r / 2 (x_hat - x_hat_last) in the part that z_t does not
  carry. r is h / h_last, but at most 1 (`_lead`). The first step, whose h_last is infinite, is
  DDIM's.
  """

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    x, eps = denoiser(z_t, log_snr_t)
    weight = -alpha(log_snr_s) * jnp.expm1((log_snr_t - log_snr_s) / 2)
    lead = _lead(x, memory, log_snr_t, log_snr_s)
    z_s = q_sample(x, eps, log_snr_s) + expand_to(weight, z_t) * lead
    return z_s, x, (x, log_snr_t)

  return Sampler(step, init=_nothing_yet)


def dpmpp_2m_sde() -> Sampler:
  """Returns SDE-DPM-Solver++(2M) (arXiv 2211.01095), which is stochastic.

  It is `dpmpp_2m` for the reverse SDE: the ancestral step with the lower variance and, instead of
  x_hat, the same D. The mean and variance of what it draws converge to second order.
  """

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    x = denoiser(z_t, log_snr_t).x
    ahead = x + _lead(x, memory, log_snr_t, log_snr_s)
    mean, variance = posterior(z_t, ahead, log_snr_t, log_snr_s)
    noise = standard_normal(keys, z_t.shape[1:])
    return mean + expand_to(jnp.sqrt(variance), z_t) * noise, x, (x, log_snr_t)

  return Sampler(step, init=_nothing_yet)


def _nothing_yet(z, log_snr, levels):
  """Returns (x_hat_last, log_snr_last) before the first step, at an infinite distance."""
  return jnp.zeros_like(z), jnp.full_like(log_snr, -jnp.inf)


def _lead(x, memory, log_snr_t, log_snr_s):
  """Returns D - x_hat of DPM-Solver++(2M), half the last change of x_hat times min(h / h_last, 1).

  x_hat comes to rest as the noise vanishes, in proportion to exp(-log_snr). A last step much longer
  than the one before, as grids by cosine have, would go on in a straight line far beyond, which
  makes data of standard deviation 0.2 come out with up to 0.29. The bound on the ratio is from
  github.com/crowsonkb/k-diffusion/issues/56; it costs no order, for where h / h_last exceeds 1 by
  O(h), a step changes by O(h^3). The usual remedy, a first-order last step, is too coarse there.
  """
  x_last, log_snr_last = memory
  ratio = jnp.minimum((log_snr_s - log_snr_t) / (log_snr_t - log_snr_last), 1.0)
  return expand_to(ratio / 2, x) * (x - x_last)


def deis() -> Sampler:
  """Returns rho-AB-DEIS of third order (arXiv 2204.13902), which is deterministic.

  With y = z / alpha at level exp(-log_snr / 2), dy = eps_hat dlevel is integrated over the parabola
  in the level through this and the last two eps_hat: the method of Adams and Bashforth for unequal
  steps. The first step is DDIM's, the second follows a line. The levels of all usual grids come
  closer towards the data, so that it never extrapolates by more than the step before.
  """

  def init(z, log_snr, levels):
    far = lambda distance: log_snr - distance
    return jnp.zeros_like(z), jnp.zeros_like(z), far(60.0), far(120.0)  # of no weight: e^-30

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    eps_last, slope_last, log_snr_last, log_snr_before = memory
    x, eps = denoiser(z_t, log_snr_t)
    # all levels over that at t, less one
    away = lambda log_snr: jnp.expm1((log_snr_t - log_snr) / 2)
    ahead, last, before = map(away, (log_snr_s, log_snr_last, log_snr_before))
    # Newton's divided differences
    slope = (eps_last - eps) / expand_to(last, z_t)
    slope_last = slope_last / expand_to(1 + last, z_t)  # per level at t, not at the last one
    curve = (slope_last - slope) / expand_to(before, z_t)
    integral = expand_to(ahead**2 / 2, z_t) * slope
    integral += expand_to(ahead**3 / 3 - last * ahead**2 / 2, z_t) * curve
    level = sigma(log_snr_s) * jnp.exp((log_snr_s - log_snr_t) / 2)  # alpha_s level_t
    z_s = q_sample(x, eps, log_snr_s) + expand_to(level, z_t) * integral
    return z_s, x, (eps, slope, log_snr_t, log_snr_last)

  return Sampler(step, init=init)


SAMPLERS = {
  'ancestral': ancestral,
  'ddim': ddim,
  'heun': heun,
  'dpmpp_2m': dpmpp_2m,
  'dpmpp_2m_sde': dpmpp_2m_sde,
  'deis': deis,
}


def times(num_steps: int) -> Float[Array, ' n']:
  """Returns t = 1, 1 - 1/n, ..., 0, the n + 1 ends of equal steps from noise to data."""
  return (num_steps - jnp.arange(num_steps + 1)) / num_steps


def time_grid(schedule: Schedule, num_steps: int) -> Float[Array, 'n ...']:
  """Returns log_snr at t = 1, 1 - 1/n, ..., 0."""
  return schedule(times(num_steps))


def num_evaluations(sampler: Sampler, num_steps: int, denoise_last: bool) -> int:
  """Returns the denoiser's evaluations for one example; the last step has one if it denoises."""
  return sampler.evaluations * (num_steps - denoise_last) + denoise_last


def sample(
  keys: Array,
  sampler: Sampler,
  denoiser: Denoiser,
  grid: Float[Array, ' n'],
  shape: tuple[int, ...],
  denoise_last: bool = False,
  trajectory: bool = False,
  schedule: Schedule | None = None,
) -> Float[Array, 'b ...'] | tuple[Float[Array, 'b ...'], Float[Array, 'm b ...']]:
  """Draws x from N(0, I) at the first level of the grid.

  Args:
    keys: one per example, [B]: an example depends on its own key alone.
    sampler: e.g. `ancestral()`.
    denoiser: (z, log_snr) -> Prediction.
    grid: log_snr of each level, increasing, noise to data, [n].
    shape: of one example.
    denoise_last: returns x_hat of the last level, which is EDM's last step, to a level of zero;
      else z_0 / alpha_0, whose noise is that of the last level: of variance exp(-log_snr_max).
    trajectory: returns the x_hat of every step too, which takes memory for all of them.
    schedule: level [B] -> log_snr [B ...] of a multivariate schedule, if any: the grid holds what
      that takes, the times of a schedule (`times`), or the mean levels of `multivariate.on_path`.

  Returns:
    x [B, *shape]; with `trajectory` (x, x_hat [num_steps, B, *shape]), the first step's first.
  """
  batch = keys.shape[0]
  key_start, key_steps = jax.vmap(jax.random.split, out_axes=1)(keys)
  at = lambda level: jnp.broadcast_to(level, (batch,))
  log_snr_at = (lambda t: schedule(at(t))) if schedule else at

  def body(carry, inputs):
    number, level_t, level_s = inputs
    step_keys = fold_in(key_steps, jnp.full((batch,), number))
    ends = log_snr_at(level_t), log_snr_at(level_s)
    z, x, memory = sampler.step(step_keys, *carry, denoiser, *ends)
    return (z, memory), x if trajectory else None

  z = standard_normal(key_start, shape)
  memory = sampler.init(z, log_snr_at(grid[0]), len(grid))
  inputs = (jnp.arange(len(grid) - 1), grid[:-1], grid[1:])
  (z, _), x_hats = jax.lax.scan(body, (z, memory), inputs)
  last = log_snr_at(grid[-1])
  x = denoiser(z, last).x if denoise_last else z / expand_to(alpha(last), z)
  if not trajectory:
    return x
  return x, jnp.concatenate([x_hats, x[None]]) if denoise_last else x_hats
