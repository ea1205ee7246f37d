"""Noise schedules: t in [0, 1] -> log_snr, strictly decreasing; t = 0 is data, t = 1 is noise.

A schedule is one function; alpha, sigma and dlog_snr/dt follow from it (`vdm.gaussian`). A fixed
schedule is that function. A learned one is a `Learned` pair: `init()` gives its parameters and
`as_schedule(params)` the function that closes over them.

  def my_schedule(log_snr_min, log_snr_max):  # five lines, in a user's own config file
    return lambda t: log_snr_max + (log_snr_min - log_snr_max) * t**2
  SCHEDULES['mine'] = my_schedule
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdm.gaussian import Schedule


class Learned(NamedTuple):
  """A schedule with parameters of its own.

  `init()` is a dict. What it holds under 'interior' moves no end point and so, in continuous time,
  no expected loss: it is trained to minimise the variance of the loss, all else by the bound.
  """

  init: Callable[[], Any]
  as_schedule: Callable[[Any], Schedule]


def _check_range(log_snr_min: float, log_snr_max: float):
  if not log_snr_min < log_snr_max:
    raise ValueError(
      f'config.schedule.log_snr_min={log_snr_min} must be below '
      f'config.schedule.log_snr_max={log_snr_max}; swap them.'
    )


def _truncated(inverse, log_snr, log_snr_min: float, log_snr_max: float) -> Schedule:
  """The part of a base schedule between two end points, stretched back to t in [0, 1]."""
  _check_range(log_snr_min, log_snr_max)
  t0, t1 = inverse(log_snr_max), inverse(log_snr_min)
  return lambda t: log_snr(t0 + (t1 - t0) * t)


def linear(log_snr_min: float, log_snr_max: float) -> Schedule:
  """log_snr falls linearly in t; p(log_snr) is uniform (VDM, the initial schedule)."""
  _check_range(log_snr_min, log_snr_max)
  return lambda t: log_snr_max - (log_snr_max - log_snr_min) * t


def cosine(log_snr_min: float, log_snr_max: float) -> Schedule:
  """log_snr = -2 log tan(pi t / 2) (VDM++ table 1), truncated to the end points."""
  return shifted_cosine(log_snr_min, log_snr_max, image_size=1, noise_size=1)


def shifted_cosine(
  log_snr_min: float, log_snr_max: float, image_size: int, noise_size: int = 64
) -> Schedule:
  """The cosine schedule for noise defined at another resolution (simple diffusion, section 2.1).

  log_snr = -2 log tan(pi t / 2) + 2 log(noise_size / image_size), shifted first and then
  truncated, so that the end points are the ones given.
  """
  shift = math.log(noise_size / image_size)
  return _truncated(
    lambda log_snr: 2 / math.pi * math.atan(math.exp(-log_snr / 2 + shift)),
    lambda t: -2 * jnp.log(jnp.tan(math.pi / 2 * t)) + 2 * shift,
    log_snr_min,
    log_snr_max,
  )


def learned_endpoints(log_snr_min: float, log_snr_max: float) -> Learned:
  """Linear in t between end points that are trained by the bound (VDM section 4.3, appendix I).

  The slope enters as its absolute value: log_snr decreases whatever the optimizer does.
  """
  _check_range(log_snr_min, log_snr_max)

  return Learned(
    lambda: _ends(log_snr_min, log_snr_max),
    lambda params: lambda t: params['log_snr_max'] - jnp.abs(params['slope']) * t,
  )


def learned_net(log_snr_min: float, log_snr_max: float, num_hidden: int = 1024) -> Learned:
  """A monotone network between learned end points (VDM section 4.2, appendix H).

  With h(t) = t + sum_k a_k sigmoid(b_k (2t - 1) + c_k), a_k and b_k positive,

    log_snr(t) = log_snr_max - |slope| (h(t) - h(0)) / (h(1) - h(0)),

  which is the paper's l1 + l3(sigmoid(l2(l1(t)))) after its pinning, which takes out the scale and
  offset of l1 and the offset of l3. The linear part keeps log_snr strictly decreasing whatever the
  optimizer does. It starts almost linear, its hidden units spread evenly over [0, 1].
  """
  _check_range(log_snr_min, log_snr_max)
  if num_hidden < 1:
    raise ValueError(f'config.schedule.num_hidden={num_hidden} must be 1 or more; try 1024.')

  def init():
    steepness = 10.0  # of each unit: its rise takes about a third of [0, 1]
    centre = (jnp.arange(num_hidden) + 0.5) / num_hidden
    interior = {
      'a': jnp.full(num_hidden, inverse_softplus(1 / num_hidden)),
      'b': jnp.full(num_hidden, inverse_softplus(steepness)),
      'c': steepness * (1 - 2 * centre),
    }
    interior = {k: jnp.asarray(v, jnp.float32) for k, v in interior.items()}
    return _ends(log_snr_min, log_snr_max) | {'interior': interior}

  def as_schedule(params):
    a, b = (jax.nn.softplus(params['interior'][k]) for k in 'ab')
    c = params['interior']['c']

    @jnp.vectorize
    def h(t):
      return t + (a * jax.nn.sigmoid(b * (2 * t - 1) + c)).sum()

    def schedule(t):
      start, end = h(jnp.zeros(())), h(jnp.ones(()))
      return params['log_snr_max'] - jnp.abs(params['slope']) * (h(t) - start) / (end - start)

    return schedule

  return Learned(init, as_schedule)


def inverse_softplus(y: float) -> float:
  """The x with log(1 + e^x) = y, for y > 0."""
  return y + math.log(-math.expm1(-y))


def _ends(log_snr_min: float, log_snr_max: float) -> dict[str, Any]:
  return {
    'log_snr_max': jnp.asarray(log_snr_max, jnp.float32),
    'slope': jnp.asarray(log_snr_max - log_snr_min, jnp.float32),
  }


SCHEDULES = {
  'linear': linear,
  'cosine': cosine,
  'shifted_cosine': shifted_cosine,
  'learned_endpoints': learned_endpoints,
  'learned_net': learned_net,
}
