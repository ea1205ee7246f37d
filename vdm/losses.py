"""The one loss, in continuous and in discrete time; every term is [B] nats, unreduced."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdm.gaussian import Denoiser, Schedule, log_snr_and_slope, q_sample, sum_over_dims
from vdm.likelihood import prior_loss, reconstruction_loss, to_grid
from vdm.times import discretize
from vdm.weightings import Weighting


class DiffusionTerm(NamedTuple):
  """What the diffusion loss measured at one time per example, each [B]."""

  loss: Array  # weighted, nats
  elbo: Array  # the same with weight 1: a term of the variational bound
  log_snr: Array


def diffusion_loss(
  denoiser: Denoiser,
  schedule: Schedule,
  weighting: Weighting,
  x: Float[Array, 'b ...'],
  t: Float[Array, ' b'],
  eps: Float[Array, 'b ...'],
  num_timesteps: int = 0,
) -> DiffusionTerm:
  """The weighted diffusion loss at times t.

  Continuous time (VDM eq. 17, VDM++ eq. 7): 1/2 w(log_snr) (-dlog_snr/dt) |eps_hat - eps|^2.
  Discrete time (VDM eq. 14): t moves to the end of its step of length 1/T, s = t - 1/T, and
  1/2 T expm1(log_snr_s - log_snr_t) |eps_hat - eps|^2 = T KL(q(z_s | z_t, x) || p(z_s | z_t)).

  Args:
    denoiser: (z, log_snr) -> Prediction.
    schedule: t -> log_snr.
    weighting: log_snr -> w.
    x: data [B ...].
    t: times in [0, 1], [B].
    eps: standard normal noise of x's shape.
    num_timesteps: T; 0 for continuous time.
  """
  if num_timesteps:
    t = discretize(t, num_timesteps)
    log_snr = schedule(t)
    step = num_timesteps * jnp.expm1(schedule(t - 1 / num_timesteps) - log_snr)
  else:
    log_snr, slope = log_snr_and_slope(schedule, t)
    step = -slope
  eps_hat = denoiser(q_sample(x, eps, log_snr), log_snr).eps
  elbo = 0.5 * step * sum_over_dims((eps_hat - eps) ** 2)
  return DiffusionTerm(weighting(log_snr) * elbo, elbo, log_snr)


class Bound(NamedTuple):
  """The terms of the variational bound on -log p(x) (VDM eq. 11), each [B] nats."""

  recon: Array
  prior: Array
  diffusion: DiffusionTerm


def variational_bound(
  denoiser: Denoiser,
  schedule: Schedule,
  weighting: Weighting,
  u: Int[Array, 'b ...'],
  t: Float[Array, ' b'],
  eps_recon: Float[Array, 'b ...'],
  eps: Float[Array, 'b ...'],
  num_values: int,
  num_timesteps: int = 0,
) -> Bound:
  """All three terms for discrete data u, integers in [0, num_values), [B ...].

  The reconstruction and prior terms depend on the end points of the schedule alone. Their noise
  is drawn apart from the diffusion term's, so that each term is unbiased by itself.
  """
  x = to_grid(u, num_values)
  ends = schedule(jnp.array([0.0, 1.0]))
  return Bound(
    recon=reconstruction_loss(u, eps_recon, ends[0], num_values),
    prior=prior_loss(x, ends[1]),
    diffusion=diffusion_loss(denoiser, schedule, weighting, x, t, eps, num_timesteps),
  )
