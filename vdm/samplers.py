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

from vdm.gaussian import (
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

# (keys [B], z_t, memory, denoiser, log_snr_t [B], log_snr_s [B]) -> (z_s, memory)
Step = Callable[[Array, Array, Any, Denoiser, Array, Array], tuple[Array, Any]]


class Sampler(NamedTuple):
  """What `sample` scans."""

  step: Step
  evaluations: int = 1  # of the denoiser in a step
  init: Callable[[Array, Array], Any] = lambda z, log_snrs: ()  # memory before the first step


def ancestral(variance: float = 0.0) -> Sampler:
  """z_s ~ N(mean of q(z_s | z_t, x_hat), the step's variance) (VDM eq. 33; DDPM).

  The variance is sigma_s^2 c, that of q(z_s | z_t, x) (`variance` = 0: VDM's own generative
  step), or sigma_t^2 c, that of q(z_t | z_s) (1); in between it is interpolated in log space,
  as in simple diffusion and VDM++.
  """
  _require(0 <= variance <= 1, 'variance', variance, 'from 0, the lower, to 1, the upper one')

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    mean, lower = posterior(z_t, denoiser(z_t, log_snr_t).x, log_snr_t, log_snr_s)
    scale = jnp.sqrt(lower) * (sigma(log_snr_t) / sigma(log_snr_s)) ** variance
    return mean + expand_to(scale, z_t) * standard_normal(keys, z_t.shape[1:]), memory

  return Sampler(step)


def ddim(eta: float = 0.0) -> Sampler:
  """z_s = alpha_s x_hat + sigma_s (sqrt(1 - eta^2 c) eps_hat + eta sqrt(c) n) (DDIM eq. 12, 16).

  Deterministic for `eta` = 0; for 1 the ancestral step with the lower variance.
  """
  _require(0 <= eta <= 1, 'eta', eta, 'from 0, deterministic, to 1, ancestral')

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    x, eps = denoiser(z_t, log_snr_t)
    h = log_snr_s - log_snr_t
    c = -jnp.expm1(-h)
    keep = jnp.sqrt(jnp.exp(-h) + (1 - eta**2) * c)  # of 1 - eta^2 c, without its cancellation
    noise = standard_normal(keys, z_t.shape[1:])
    eps = expand_to(keep, z_t) * eps + expand_to(eta * jnp.sqrt(c), z_t) * noise
    return q_sample(x, eps, log_snr_s), memory

  return Sampler(step)


def heun(
  s_churn: float = 0.0, s_min: float = 0.0, s_max: float = 1e9, s_noise: float = 1.0
) -> Sampler:
  """EDM's stochastic sampler (EDM algorithm 2): fresh noise, then a step of Heun's method.

  With y = z / alpha at level exp(-log_snr / 2), dy = eps_hat dlevel. Where the level lies in
  [s_min, s_max] it first rises by the factor 1 + gamma, gamma = min(s_churn / N, sqrt(2) - 1) for
  N levels, by noise scaled with `s_noise`; but never above the first level of the grid.
  Deterministic for `s_churn` = 0.
  """
  _require(s_churn >= 0, 's_churn', s_churn, 'zero or more')
  _require(0 <= s_min < s_max, 's_min', s_min, f'in [0, s_max={s_max})')

  def init(z, log_snrs):
    return jnp.minimum(s_churn / len(log_snrs), math.sqrt(2) - 1), log_snrs[0]

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    gamma, log_snr_start = memory
    level = jnp.exp(-log_snr_t / 2)
    gamma = jnp.where((s_min <= level) & (level <= s_max), gamma, 0.0)
    gamma = jnp.minimum(gamma, jnp.expm1((log_snr_t - log_snr_start) / 2))
    log_snr = log_snr_t - 2 * jnp.log1p(gamma)
    noise = s_noise * standard_normal(keys, z_t.shape[1:])
    scale = sigma(log_snr) * jnp.sqrt(gamma * (2 + gamma)) / (1 + gamma)
    z = expand_to(alpha(log_snr) / alpha(log_snr_t), z_t) * z_t + expand_to(scale, z_t) * noise

    x, eps = denoiser(z, log_snr)
    euler = q_sample(x, eps, log_snr_s)
    correction = denoiser(euler, log_snr_s).eps - eps
    # alpha_s (level_s - level) / 2
    half_step = -0.5 * sigma(log_snr_s) * jnp.expm1((log_snr_s - log_snr) / 2)
    return euler + expand_to(half_step, z_t) * correction, memory

  return Sampler(step, evaluations=2, init=init)


def dpmpp_2m() -> Sampler:
  """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), deterministic, second order.

  x_hat is extrapolated to the middle of the step from this and the last one: the step is DDIM's
  with, instead of x_hat, D = x_hat + h / (2 h_last) (x_hat - x_hat_last) in the part that z_t does
  not carry. The first step, whose h_last is infinite, is DDIM's.
  """

  def init(z, log_snrs):
    return jnp.zeros_like(z), jnp.full(z.shape[:1], -jnp.inf)

  def step(keys, z_t, memory, denoiser, log_snr_t, log_snr_s):
    x_last, log_snr_last = memory
    x, eps = denoiser(z_t, log_snr_t)
    h = log_snr_s - log_snr_t
    weight = -alpha(log_snr_s) * jnp.expm1(-h / 2) * h / (2 * (log_snr_t - log_snr_last))
    z_s = q_sample(x, eps, log_snr_s) + expand_to(weight, z_t) * (x - x_last)
    return z_s, (x, log_snr_t)

  return Sampler(step, init=init)


SAMPLERS = {'ancestral': ancestral, 'ddim': ddim, 'heun': heun, 'dpmpp_2m': dpmpp_2m}


def time_grid(schedule: Schedule, num_steps: int) -> Float[Array, ' n']:
  """log_snr at t = 1, 1 - 1/n, ..., 0: the n + 1 ends of n equal steps, from noise to data."""
  return schedule((num_steps - jnp.arange(num_steps + 1)) / num_steps)


def num_evaluations(sampler: Sampler, num_steps: int, denoise_last: bool) -> int:
  """Evaluations of the denoiser for one example; the last step has one if it denoises."""
  return sampler.evaluations * (num_steps - denoise_last) + denoise_last


def sample(
  keys: Array,
  sampler: Sampler,
  denoiser: Denoiser,
  log_snrs: Float[Array, ' n'],
  shape: tuple[int, ...],
  denoise_last: bool = False,
) -> Float[Array, 'b ...']:
  """Draws x from N(0, I) at the first of `log_snrs`.

  Args:
    keys: one per example, [B]: an example depends on its own key alone.
    sampler: e.g. `ancestral()`.
    denoiser: (z, log_snr) -> Prediction.
    log_snrs: increasing grid, noise to data.
    shape: of one example.
    denoise_last: returns x_hat of the last level, which is EDM's last step, to a level of zero;
      else z_0 / alpha_0, whose noise is that of the last level.

  Returns:
    x [B, *shape].
  """
  batch = keys.shape[0]
  key_start, key_steps = jax.vmap(jax.random.split, out_axes=1)(keys)
  at = lambda log_snr: jnp.full((batch,), log_snr)

  def body(carry, inputs):
    number, log_snr_t, log_snr_s = inputs
    step_keys = fold_in(key_steps, jnp.full((batch,), number))
    return sampler.step(step_keys, *carry, denoiser, at(log_snr_t), at(log_snr_s)), None

  z = standard_normal(key_start, shape)
  grid = (jnp.arange(len(log_snrs) - 1), log_snrs[:-1], log_snrs[1:])
  (z, _), _ = jax.lax.scan(body, (z, sampler.init(z, log_snrs)), grid)
  return denoiser(z, at(log_snrs[-1])).x if denoise_last else z / alpha(log_snrs[-1])


def _require(condition: bool, name: str, value: float, constraint: str):
  if not condition:
    raise ValueError(f'config.sample.sampler.{name}={value} must be {constraint}.')
