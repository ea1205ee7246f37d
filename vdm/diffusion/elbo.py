"""The one loss, in continuous and in discrete time; every term is [B] nats, unreduced."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from vdm.diffusion.decoders import Decoder, prior_loss
from vdm.diffusion.gaussian import (
  Denoiser,
  Schedule,
  count_dims,
  end_points,
  expand_to,
  log_snr_and_slope,
  mean_over_dims,
  q_sample,
  sigma,
  sum_over_dims,
)
from vdm.diffusion.times import discretize
from vdm.diffusion.weightings import Weighting


class DiffusionTerm(NamedTuple):
  """Holds what the diffusion loss measured at one time per example, each [B] but the last."""

  loss: Array  # weighted, nats
  elbo: Array  # the same with weight 1: a term of the variational bound
  log_snr: Array
  slope: Array  # dlog_snr/dt; in discrete time the mean of it over the step
  by_dim: Array | None = None  # `elbo` by dimension, [B ...]; 0 where none is valid
  second: Array | None = None  # the second-order loss, weighted likewise, nats; None: not asked for


def diffusion_loss(
  denoiser: Denoiser,
  schedule: Schedule,
  weighting: Weighting,
  x: Float[Array, 'b ...'],
  t: Float[Array, ' b'],
  eps: Float[Array, 'b ...'],
  num_timesteps: int = 0,
  probe: tuple[Array, Array] | None = None,
  valid: Shaped[Array, 'b ...'] | None = None,
  signs: Float[Array, 'b ...'] | None = None,
) -> DiffusionTerm:
  """Returns the weighted diffusion loss at times t, with its unweighted value, log_snr and slope.

  Continuous time has 1/2 w(log_snr) (-dlog_snr/dt) |eps_hat - eps|^2 (VDM eq. 17, VDM++ eq. 7). In
  discrete time (VDM eq. 14) t moves to the end of its step of length 1/T, s = t - 1/T, and w
  multiplies
  1/2 T expm1(log_snr_s - log_snr_t) |eps_hat - eps|^2 = T KL(q(z_s | z_t, x) || p(z_s | z_t)).

  Args:
    denoiser: (z, log_snr) -> Prediction.
    schedule: t -> log_snr.
    weighting: log_snr -> w.
    x: data [B ...].
    t: times in [0, 1], [B].
    eps: standard normal noise of x's shape.
    num_timesteps: T; 0 for continuous time.
    probe: zeros of log_snr's shape, added to log_snr and dlog_snr/dt in continuous time: the
      gradient of the mean loss by them is 1/B that of each example's loss (`interior_gradient`).
    valid: the dimensions that count, broadcasting against x; None: all.
    signs: random ones, -1 or 1 of x's shape, asks for `second_order` too, in continuous time.
  """
  if num_timesteps:
    t = discretize(t, num_timesteps)
    log_snr, log_snr_s = schedule(t), schedule(t - 1 / num_timesteps)
    slope = num_timesteps * (log_snr - log_snr_s)
    step = num_timesteps * jnp.expm1(log_snr_s - log_snr)
  else:
    log_snr, slope = log_snr_and_slope(schedule, t)
    if probe:
      log_snr, slope = (a + expand_to(p, a) for a, p in zip((log_snr, slope), probe, strict=True))
    step = -slope
  predict = lambda z: denoiser(z, log_snr).eps
  z, second = q_sample(x, eps, log_snr), None
  if signs is None:
    eps_hat = predict(z)
  else:
    eps_hat, gap = second_order(predict, z, eps, log_snr, signs, valid)
    second = 0.5 * weighting(log_snr) * step * gap
  elbo = 0.5 * expand_to(step, x) * (eps_hat - eps) ** 2
  loss = expand_to(weighting(log_snr), x) * elbo
  # each dimension has its own step and weight before the sum, for a multivariate schedule
  return DiffusionTerm(
    sum_over_dims(loss, valid),
    sum_over_dims(elbo, valid),
    mean_over_dims(log_snr),
    mean_over_dims(slope),
    elbo if valid is None else jnp.where(valid, elbo, 0),
    second,
  )


def second_order(
  predict: Callable[[Array], Array],
  z: Float[Array, 'b ...'],
  eps: Float[Array, 'b ...'],
  log_snr: Float[Array, ' b'],
  signs: Float[Array, 'b ...'],
  valid: Shaped[Array, 'b ...'] | None = None,
) -> tuple[Float[Array, 'b ...'], Float[Array, ' b']]:
  """Returns eps_hat, and how far its divergence is from what its error says, squared, over D.

  The exact eps_hat = E[eps | z] has, since the covariance of eps given z is I - sigma d eps_hat/dz,

    E[|eps_hat - eps|^2 | z] = D - sigma tr(d eps_hat / dz),

  and the ODE's likelihood is an integral of that trace. So the loss is (D - sigma tr(d eps_hat/dz)
  - |eps_hat - eps|^2)^2 / D, the error taken as a constant (Zheng et al. 2023, arXiv 2305.03935,
  there for v, which is the same loss), the trace by one probe v, v^T (d eps_hat/dz) v.

  Args:
    predict: z -> eps_hat.
    z: [B ...].
    eps: that z was made with.
    log_snr: of z, [B].
    signs: the probe, -1 or 1 each.
    valid: the dimensions that count, broadcasting against z; None: all.
  """
  eps_hat, pull_back = jax.vjp(predict, z)
  if valid is not None:
    signs = jnp.where(valid, signs, 0)
  trace = sum_over_dims(signs * pull_back(signs)[0])
  error = jax.lax.stop_gradient(sum_over_dims((eps_hat - eps) ** 2, valid))
  num_dims = count_dims(z.shape[1:], valid)
  return eps_hat, (num_dims - sigma(log_snr) * trace - error) ** 2 / num_dims


def interior_gradient(
  as_schedule: Callable[[Any], Schedule],
  params: dict[str, Any],
  t: Float[Array, ' b'],
  loss: Float[Array, ' b'],
  probe_gradients: tuple[Array, Array],
) -> Any:
  """Returns the gradient of mean(loss^2) for params['interior'], without a second backward pass.

  In continuous time the interior of a schedule does not change the expected loss, so that the mean
  square is the variance up to a constant (VDM appendix I.2). Through its own time alone,

    d mean(loss^2) = sum_i 2 loss_i / B (dloss_i/dlog_snr_i dlog_snr_i + dloss_i/dslope_i dslope_i).

  Args:
    as_schedule: params -> Schedule.
    params: of the schedule.
    t: [B].
    loss: the diffusion loss of each example, [B].
    probe_gradients: of the mean of `loss`, by the probe of `diffusion_loss`.
  """

  def values(interior):
    return log_snr_and_slope(as_schedule(params | {'interior': interior}), t)

  _, pull_back = jax.vjp(values, params['interior'])
  return pull_back(tuple(2 * expand_to(loss, g) * g for g in probe_gradients))[0]


def moments(term: DiffusionTerm, log_snr_range: Array) -> Float[Array, 'b 3']:
  """Returns the loss, its square, and its square times range / |slope|, [B, 3].

  The mean of the last is the mean square had log_snr been drawn uniformly: a loss is then range /
  |slope| times what it is here, and |slope| / range times as likely. Means over examples go into
  `coefficients_of_variation`.
  """
  square = term.loss**2
  return jnp.stack([term.loss, square, square * log_snr_range / -term.slope], axis=1)


def coefficients_of_variation(means):
  """Returns the standard deviation over the mean of the loss of one example at one time, twice.

  The first is of times as they are drawn, the second as if log_snr were drawn uniformly, both from
  the means of `moments`. An estimate by importance of few examples may have a negative square, and
  is nan then, as is that of a loss of zero.
  """
  mean, *squares = map(float, means)
  squares = [square / mean**2 - 1 if mean else math.nan for square in squares]
  return tuple(math.sqrt(square) if square >= 0 else math.nan for square in squares)


class Bound(NamedTuple):
  """Holds the terms of the variational bound on -log p(x) (VDM eq. 11), each [B] nats."""

  recon: Array
  prior: Array
  diffusion: DiffusionTerm


def variational_bound(
  denoiser: Denoiser,
  schedule: Schedule,
  decoder: Decoder,
  weighting: Weighting,
  u: Shaped[Array, 'b ...'],
  t: Float[Array, ' b'],
  eps_recon: Float[Array, 'b ...'],
  eps: Float[Array, 'b ...'],
  num_timesteps: int = 0,
  probe: tuple[Array, Array] | None = None,
  valid: Shaped[Array, 'b ...'] | None = None,
  signs: Float[Array, 'b ...'] | None = None,
) -> Bound:
  """Returns the three terms of the bound for data u [B ...], in the decoder's units.

  The reconstruction and prior terms depend on the end points of the schedule alone. Their noise
  is drawn apart from the diffusion term's, so that each term is unbiased by itself. Where `valid`
  is given the dimensions that are not have no part in it: their u may be anything.
  """
  x = decoder.to_model(u)
  if valid is not None:
    u, x = jnp.where(valid, u, jnp.zeros_like(u)), jnp.where(valid, x, 0)
  log_snr_max, log_snr_min = end_points(schedule)
  return Bound(
    recon=decoder.loss(u, eps_recon, log_snr_max, valid),
    prior=prior_loss(x, log_snr_min, valid),
    diffusion=diffusion_loss(
      denoiser, schedule, weighting, x, t, eps, num_timesteps, probe, valid, signs
    ),
  )
