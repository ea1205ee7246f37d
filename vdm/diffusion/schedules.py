"""Noise schedules: t in [0, 1] -> log_snr, strictly decreasing; t = 0 is data, t = 1 is noise.

A schedule is one function; alpha, sigma and dlog_snr/dt follow from it (`gaussian`). A fixed
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

from vdm.diffusion.gaussian import Schedule
from vdm.errors import require


class Learned(NamedTuple):
  """Holds a schedule with parameters of its own.

  `init()` returns a dict. What is under 'interior' moves no end point and so, in continuous time,
  no expected loss: it is trained to minimise the variance of the loss, all else by the bound.
  """

  init: Callable[[], Any]
  as_schedule: Callable[..., Schedule]  # (parameters), or if it is conditional (parameters, told)
  multivariate: bool = False  # whether each dimension has its own log_snr
  conditional: bool = False  # whether each example has; `told` is what the network is told


def check_range(log_snr_min: float, log_snr_max: float):
  """Refuses end points of which the first is not below the second, or whose alpha or sigma is 0."""
  for name, value in (('log_snr_min', log_snr_min), ('log_snr_max', log_snr_max)):
    require(abs(value) <= 80, name, value, 'between -80 and 80', 'usual ends are -10 and 15')
  good = log_snr_min < log_snr_max
  require(good, 'log_snr_min', log_snr_min, f'below log_snr_max={log_snr_max}', 'swap them')


def _check_positive(**arguments):
  for name, value in arguments.items():
    require(value > 0, name, value, 'positive', 'the docstring says what it is')


def _check_in_float32(**ends):
  """Refuses end points, each with what the schedule makes it of, where that is 0 in float32."""
  for name, (end, of) in ends.items():
    rule = f'an end that the schedule reaches in float32, but {of:.2g} of it lies beyond'
    require(of >= 1e-37, name, end, rule, "move it nearer to the schedule's middle")


def _truncated(inverse, log_snr, log_snr_min: float, log_snr_max: float) -> Schedule:
  """Returns the part of a base schedule between two end points, stretched back to t in [0, 1].

  With t0 = t(log_snr_max) and t1 = t(log_snr_min) it is log_snr(t0 (1 - t) + t1 t), and its
  p(log_snr) is the base schedule's over t1 - t0.

  Args:
    inverse: log_snr -> (t, 1 - t) of the base schedule, in Python's float64.
    log_snr: (t, 1 - t) -> log_snr, the base schedule. It is given both, each to float32's
      relative precision: near t = 1, where many schedules end in log(1 - t), t alone has lost it.
    log_snr_min: where the truncated schedule ends, at t = 1.
    log_snr_max: where it begins.
  """
  check_range(log_snr_min, log_snr_max)
  (t0, c0), (t1, c1) = inverse(log_snr_max), inverse(log_snr_min)
  _check_in_float32(log_snr_max=(log_snr_max, t0), log_snr_min=(log_snr_min, c1))
  # Not c1 + (c0 - c1) (1 - t): where c0 - c1 is 1 in float32, XLA may add up c1 + 1 and lose c1.
  return lambda t: log_snr(t0 * (1 - t) + t1 * t, c0 * (1 - t) + c1 * t)


def linear(log_snr_min: float, log_snr_max: float) -> Schedule:
  """Returns the schedule linear in t, whose p(log_snr) is uniform (VDM, the initial schedule)."""
  check_range(log_snr_min, log_snr_max)
  return lambda t: log_snr_max - (log_snr_max - log_snr_min) * t


def cosine(log_snr_min: float, log_snr_max: float) -> Schedule:
  """Returns the schedule log_snr = -2 log tan(pi t / 2) (VDM++ table 1).

  It is truncated to the end points. p(log_snr) = sech(log_snr / 2) / (2 pi).
  """
  return shifted_cosine(log_snr_min, log_snr_max, image_size=1, noise_size=1)


def shifted_cosine(
  log_snr_min: float, log_snr_max: float, image_size: int, noise_size: int = 64
) -> Schedule:
  """Returns the cosine schedule for noise of another resolution (simple diffusion, section 2.1).

  log_snr = -2 log tan(pi t / 2) + 2 s, s = log(noise_size / image_size), shifted first and then
  truncated, so that the end points are the ones given. p(log_snr) = sech(log_snr / 2 - s) / (2 pi).
  """
  _check_positive(image_size=image_size, noise_size=noise_size)
  shift = math.log(noise_size / image_size)
  inverse_tan = lambda log_tan: 2 / math.pi * math.atan(math.exp(log_tan))
  return _truncated(
    lambda log_snr: (inverse_tan(-log_snr / 2 + shift), inverse_tan(log_snr / 2 - shift)),
    lambda t, c: 2 * (_log_sin(c) - _log_sin(t) + shift),  # cos(pi t / 2) = sin(pi c / 2)
    log_snr_min,
    log_snr_max,
  )


def ddpm(
  log_snr_min: float, log_snr_max: float, beta_min: float = 0.1, beta_max: float = 20.0
) -> Schedule:
  """Returns the schedule log_snr = -log expm1(b0 t + (b1 - b0) t^2 / 2) (VDM++ table 1; DDPM).

  Its beta is linear in t; below log_snr = -10.05, where DDPM ends, beta goes on growing. p(log_snr)
  is `weightings.ddpm`.
  """
  _check_positive(beta_min=beta_min, beta_max=beta_max)
  require(beta_max >= beta_min, 'beta_max', beta_max, f'at least beta_min={beta_min}', 'swap them')
  growth = beta_max - beta_min

  def inverse(log_snr):
    integral = _softplus(-log_snr)  # of beta from 0 to t
    t = 2 * integral / (beta_min + math.sqrt(beta_min**2 + 2 * growth * integral))
    return t, 1.0  # the schedule does not use 1 - t

  def log_snr(t, c):
    return -_log_expm1(beta_min * t + growth * t**2 / 2)

  return _truncated(inverse, log_snr, log_snr_min, log_snr_max)


def edm_train(
  log_snr_min: float, log_snr_max: float, mean: float = 2.4, std: float = 2.4
) -> Schedule:
  """Returns the schedule log_snr = mean + std Phi^-1(1 - t), EDM's log-normal sigma.

  p(log_snr) = N(mean, std^2) between the end points: log sigma = -log_snr / 2 has mean -1.2 and
  deviation 1.2 (VDM++ table 1; EDM table 1).
  """
  _check_positive(std=std)
  cdf = lambda a: math.erfc(-a / math.sqrt(2)) / 2
  quantile = jax.scipy.special.ndtri
  return _truncated(
    lambda log_snr: (cdf((mean - log_snr) / std), cdf((log_snr - mean) / std)),
    lambda t, c: mean + std * jnp.where(t < c, -1, 1) * quantile(jnp.where(t < c, t, c)),
    log_snr_min,
    log_snr_max,
  )


def edm_sample(
  log_snr_min: float = math.nan,
  log_snr_max: float = math.nan,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> Schedule:
  """Returns the schedule whose sigma^(1 / rho) is linear in t (EDM eq. 5), the grid EDM samples on.

  With sigma = e^(-log_snr / 2) it is
  log_snr = -2 rho log((1 - t) sigma_min^(1 / rho) + t sigma_max^(1 / rho)). A part of this schedule
  is this schedule between nearer ends: where log_snr_max or log_snr_min is given it takes the place
  of sigma_min or sigma_max, whose 0.002 and 80 are log_snr 12.43 and -8.76.
  p(log_snr) ~ e^(-log_snr / (2 rho)).
  """
  _check_positive(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
  log_snr_max = -2 * math.log(sigma_min) if math.isnan(log_snr_max) else log_snr_max
  log_snr_min = -2 * math.log(sigma_max) if math.isnan(log_snr_min) else log_snr_min
  check_range(log_snr_min, log_snr_max)
  least = max(abs(log_snr_min), abs(log_snr_max)) / 160  # below it the powers overflow float32
  require(rho >= least, 'rho', rho, f'{least:.3g} or more', 'EDM has 7')
  start, end = (math.exp(-log_snr / (2 * rho)) for log_snr in (log_snr_max, log_snr_min))
  return lambda t: -2 * rho * jnp.log((1 - t) * start + t * end)


def flow_matching(log_snr_min: float, log_snr_max: float) -> Schedule:
  """Returns the schedule log_snr = 2 log((1 - t) / t) (VDM++ table 1).

  z is proportional to (1 - t) x + t eps, and p(log_snr) = sech^2(log_snr / 4) / 8.
  """
  logistic = lambda a: 1 / (1 + math.exp(-a))
  return _truncated(
    lambda log_snr: (logistic(-log_snr / 2), logistic(log_snr / 2)),
    lambda t, c: 2 * (jnp.log(c) - jnp.log(t)),
    log_snr_min,
    log_snr_max,
  )


def softplus(log_snr_min: float, log_snr_max: float) -> Schedule:
  """Returns the schedule whose softplus(log_snr) is linear in t (Zheng et al. 2023).

  p(log_snr) ~ sigmoid(log_snr) = alpha^2, the weight that an error of v has in the bound
  (arXiv 2305.03935): the best there is for the bound where that error is the same at all levels.
  """
  check_range(log_snr_min, log_snr_max)
  start, end = map(_softplus, (log_snr_max, log_snr_min))
  return lambda t: _log_expm1((1 - t) * start + t * end)


def learned_endpoints(log_snr_min: float, log_snr_max: float) -> Learned:
  """Returns the schedule linear in t between end points that the bound trains.

  See VDM section 4.3 and appendix I. The slope enters as its absolute value: log_snr decreases
  whatever the optimizer does.
  """
  check_range(log_snr_min, log_snr_max)

  return Learned(
    lambda: ends(log_snr_min, log_snr_max),
    lambda params: lambda t: params['log_snr_max'] - jnp.abs(params['slope']) * t,
  )


def learned_net(log_snr_min: float, log_snr_max: float, num_hidden: int = 1024) -> Learned:
  """Returns a monotone network between learned end points (VDM section 4.2, appendix H).

  With h(t) = t + sum_k a_k sigmoid(b_k (2t - 1) + c_k), a_k and b_k positive,

    log_snr(t) = log_snr_max - |slope| (h(t) - h(0)) / (h(1) - h(0)),

  which is the paper's l1 + l3(sigmoid(l2(l1(t)))) after its pinning, which takes out the scale and
  offset of l1 and the offset of l3. The linear part keeps log_snr strictly decreasing whatever the
  optimizer does. It starts almost linear, its hidden units spread evenly over [0, 1].
  """
  check_range(log_snr_min, log_snr_max)
  require(num_hidden >= 1, 'num_hidden', num_hidden, '1 or more', 'try 1024')

  def as_schedule(params):
    h = rising(params['interior'])

    def schedule(t):
      start, end = h(jnp.zeros(())), h(jnp.ones(()))
      return params['log_snr_max'] - jnp.abs(params['slope']) * (h(t) - start) / (end - start)

    return schedule

  init = lambda: ends(log_snr_min, log_snr_max) | {'interior': almost_linear(num_hidden)}
  return Learned(init, as_schedule)


def almost_linear(num_hidden: int) -> dict[str, Any]:
  """Returns the parameters of `rising` that `learned_net` starts from."""
  steepness = 10.0  # of each unit: its rise takes about a third of [0, 1]
  centre = (jnp.arange(num_hidden) + 0.5) / num_hidden
  interior = {
    'a': jnp.full(num_hidden, inverse_softplus(1 / num_hidden)),
    'b': jnp.full(num_hidden, inverse_softplus(steepness)),
    'c': steepness * (1 - 2 * centre),
  }
  return {k: jnp.asarray(v, jnp.float32) for k, v in interior.items()}


def rising(interior: dict[str, Any]) -> Callable[[Any], Any]:
  """Returns the monotone network h of `learned_net`, elementwise."""
  a, b = (jax.nn.softplus(interior[k]) for k in 'ab')
  c = interior['c']

  @jnp.vectorize
  def h(t):
    return t + (a * jax.nn.sigmoid(b * (2 * t - 1) + c)).sum()

  return h


def _log_sin(t):
  """Returns log sin(pi t / 2)."""
  return jnp.log(jnp.sin(math.pi / 2 * t))


def _log_expm1(y):
  """Returns log(e^y - 1), the inverse of softplus, for an array of y > 0; nothing overflows."""
  return y + jnp.log(-jnp.expm1(-y))


def _softplus(x: float) -> float:
  """Returns log(1 + e^x); nothing overflows."""
  return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def inverse_softplus(y: float) -> float:
  """Returns the x with log(1 + e^x) = y, for y > 0."""
  return y + math.log(-math.expm1(-y))


def ends(log_snr_min: float, log_snr_max: float) -> dict[str, Any]:
  """Returns the parameters of learned end points: the greatest log_snr, and its fall."""
  return {
    'log_snr_max': jnp.asarray(log_snr_max, jnp.float32),
    'slope': jnp.asarray(log_snr_max - log_snr_min, jnp.float32),
  }


SCHEDULES: dict[str, Callable] = {
  'linear': linear,
  'cosine': cosine,
  'shifted_cosine': shifted_cosine,
  'ddpm': ddpm,
  'edm_train': edm_train,
  'edm_sample': edm_sample,
  'flow_matching': flow_matching,
  'softplus': softplus,
  'learned_endpoints': learned_endpoints,
  'learned_net': learned_net,
}
