"""Exact likelihood by the probability-flow ODE, and dequantisation of discrete data for it.

The ODE with the marginals of the diffusion (Song et al. 2021, arXiv 2011.13456, section 4.3) is, in
log_snr and with z = alpha x + sigma eps,

  dz / dlog_snr = 1/2 alpha sigma (sigma x_hat - alpha eps_hat),

since dalpha / dlog_snr = alpha sigma^2 / 2 and dsigma / dlog_snr = -sigma alpha^2 / 2. Where each
dimension has its own log_snr, t is the variable, and dlog_snr/dt of each a factor. The density
needs reverse mode only: one vector-Jacobian product gives the field and its divergence.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from vdm.diffusion.decoders import Dequantization
from vdm.diffusion.gaussian import (
  Denoiser,
  Schedule,
  alpha,
  count_dims,
  expand_to,
  fold_in,
  log_snr_and_slope,
  sigma,
  standard_normal,
  sum_over_dims,
)

# A 64-d Gaussian at rtol = atol = 1e-4, evaluations and error in bits/dim: Tsit5 67 and 0.0008,
# Dopri5 67 and 0.0009, Bosh3 114 and 0.0014, Heun 477 and 0.0004 (at 1e-3 165 and 0.0030).
SOLVER = diffrax.Tsit5()
EVALUATIONS_PER_STEP = 6  # of SOLVER, whose last stage is the first of the next step
FIRST_STEPS = 20  # the first step is one of so many to the end; the controller goes on from there
PROBES_AT_ONCE = 8  # vector-Jacobian products that are in memory together


class Solution(NamedTuple):
  """Holds what a solve gives, each [B]."""

  log_prob: Array  # nats
  evaluations: Array  # of the denoiser and its vector-Jacobian product, rejected steps included
  finished: Array  # False: max_steps were not enough, and log_prob means nothing


def log_prob(
  denoiser: Denoiser,
  z_0: Float[Array, 'b ...'],
  log_snr_max: Float[Array, '...'],
  log_snr_min: Float[Array, '...'],
  probes: Float[Array, 'b n ...'],
  rtol: float | Float[Array, ''],
  atol: float | Float[Array, ''],
  max_steps: int,
  valid: Shaped[Array, 'b ...'] | None = None,
  schedule: Schedule | None = None,
) -> Solution:
  """Returns log p(z_0) in nats at log_snr_max, by the change of variables (Song et al. eq. 39):

    log p(z_0) = log N(z_1; 0, I) + int_{log_snr_max}^{log_snr_min} tr(df/dz) dlog_snr,

  where f is the field above. The trace is the mean over probes v of v^T (df/dz) v (eq. 40;
  Hutchinson).

  The state is (z, log-determinant per dimension that counts). Every example takes its own steps, so
  that its result does not depend on the others in the batch: a step's error is the larger of the
  root mean square over the dimensions of z that count and that of the log-determinant, in units of
  atol + rtol |state|.

  Args:
    denoiser: (z, log_snr) -> Prediction, for the whole batch.
    z_0: [B ...].
    log_snr_max: of z_0, a scalar, traced or not, if there is no schedule.
    log_snr_min: where z is taken for standard normal, likewise.
    probes: [B N ...], frozen during the solve; see `PROBES` and `exact_probes`.
    rtol: relative tolerance of a step.
    atol: absolute tolerance of a step; z is of order one, the log-determinant is in nats/dim.
    max_steps: most steps of one example.
    valid: the dimensions that count; in the others z_0, x_hat and eps_hat are zero.
    schedule: a multivariate one, along which the solve goes from t = 0 to 1; None: the solve is in
      log_snr, of which all schedules are functions.
  """
  num_dims = jnp.broadcast_to(jnp.float32(count_dims(z_0.shape[1:], valid)), len(z_0))
  start, end = (jnp.zeros(()), jnp.ones(())) if schedule else (log_snr_max, log_snr_min)

  def flow(z, variable):
    if not schedule:
      return velocity(denoiser, variable)(z)
    log_snr, slope = log_snr_and_slope(schedule, variable)
    return slope * velocity(denoiser, log_snr)(z)

  # The rule below is traced inside loops, where it may not close over what the denoiser does.
  arrays, static = equinox.partition(
    equinox.filter_closure_convert(flow, z_0, jnp.zeros(len(z_0))), equinox.is_array
  )

  # The solver is mapped over examples; the denoiser still sees the batch, at a log_snr for each.
  @jax.custom_batching.custom_vmap
  def field(variable, z, probes, num_dims, arrays):
    return z, jnp.zeros(())  # for shapes only

  @field.def_vmap
  def field_of_batch(size, in_batched, variable, z, probes, num_dims, arrays):
    variable = jnp.broadcast_to(variable, size)  # a scalar before the first step
    converted = equinox.combine(arrays, static)
    dz, trace = velocity_and_trace(lambda z: converted(z, variable), z, probes)
    return (dz, trace / num_dims), (True, True)

  def solve(z_0, probes, num_dims):
    return diffrax.diffeqsolve(
      diffrax.ODETerm(
        lambda variable, state, _: field(variable, state[0], probes, num_dims, arrays)
      ),
      SOLVER,
      t0=start,
      t1=end,
      dt0=(end - start) / FIRST_STEPS,
      y0=(z_0, jnp.zeros(())),
      stepsize_controller=diffrax.PIDController(rtol, atol, norm=_ErrorNorm(num_dims)),
      adjoint=diffrax.ForwardMode(),  # nobody differentiates this
      max_steps=max_steps,
      throw=False,
    )

  solution = jax.vmap(solve)(z_0, probes, num_dims)
  z_1, log_det = (leaf[:, 0] for leaf in solution.ys)
  log_normal = -0.5 * sum_over_dims(z_1**2 + math.log(2 * math.pi), valid)
  return Solution(
    log_normal + num_dims * log_det,
    EVALUATIONS_PER_STEP * solution.stats['num_steps'] + 1,
    solution.result == diffrax.RESULTS.successful,
  )


def velocity(denoiser: Denoiser, log_snr: Float[Array, 'b ...']) -> Callable[[Array], Array]:
  """Returns f: z [B ...] -> dz / dlog_snr = 1/2 alpha sigma (sigma x_hat - alpha eps_hat)."""

  def f(z):
    a, s = expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z)
    prediction = denoiser(z, log_snr)
    return 0.5 * a * s * (s * prediction.x - a * prediction.eps)

  return f


def velocity_and_trace(
  f: Callable[[Array], Array], z: Float[Array, 'b ...'], probes: Float[Array, 'b n ...']
) -> tuple[Float[Array, 'b ...'], Float[Array, ' b']]:
  """Returns f(z), and the mean over probes of v^T (df/dz) v, for an f that keeps examples apart."""
  dz, pullback = jax.vjp(f, z)

  def quadratic(v):
    return sum_over_dims(v * pullback(v)[0])

  if probes.shape[1] == 1:
    return dz, quadratic(probes[:, 0])
  traces = jax.lax.map(quadratic, probes.swapaxes(0, 1), batch_size=PROBES_AT_ONCE)
  return dz, traces.mean(axis=0)


class _ErrorNorm(equinox.Module):
  """Returns the larger of z's root mean square and the log-determinant's, lest either drown."""

  num_dims: Array  # that count; in the others z has no error

  def __call__(self, error):
    z, log_det = error
    return jnp.maximum(jnp.sqrt(jnp.sum(z**2) / self.num_dims), jnp.abs(log_det))


def exact_probes(batch_size: int, shape: tuple[int, ...]) -> Float[Array, 'b n ...']:
  """Returns the D basis vectors times sqrt(D); the mean of their quadratic forms is the trace."""
  num_dims = math.prod(shape)
  basis = math.sqrt(num_dims) * jnp.eye(num_dims).reshape(1, num_dims, *shape)
  return jnp.broadcast_to(basis, (batch_size, num_dims, *shape))


# Hutchinson's probes are independent v with E v v^T = I: (keys [B], shape) -> [B *shape].
PROBES = {
  'rademacher': lambda keys, shape: jax.vmap(lambda k: jax.random.rademacher(k, shape, float))(
    keys
  ),
  'gaussian': standard_normal,
}


def data_log_prob(
  denoiser: Denoiser,
  u: Shaped[Array, 'b ...'],
  keys: Array,
  log_snr_max: Float[Array, '...'],
  log_snr_min: Float[Array, '...'],
  dequantize: Dequantization,
  importance_samples: int,
  probes: Float[Array, 'b n ...'],
  rtol: float | Float[Array, ''],
  atol: float | Float[Array, ''],
  max_steps: int,
  valid: Shaped[Array, 'b ...'] | None = None,
  schedule: Schedule | None = None,
) -> Solution:
  """Returns a lower bound on log P(u), the mass of u's cell under the density of y = z_0 / alpha_0:

    log (1/K) sum_k p(y_k) / q(y_k | u),   y_k ~ q(y | u),

  with log p(y) = log p(z_0) + sum_d log alpha_0d. K = 1 is the variational bound; more draws
  tighten it (Burda et al. 2016, arXiv 1509.00519). The probes are those of the image, not of the
  draw: the error of the trace is then nearly common to all draws and passes through the logarithm,
  where independent errors would raise the value above the bound.

  Args:
    denoiser: (z, log_snr) -> Prediction.
    u: data, [B ...].
    keys: one per example, [B].
    log_snr_max: of the latent z_0, a scalar, or that of a multivariate schedule (`end_points`).
    log_snr_min: of the prior, likewise.
    dequantize: one of `Decoder.dequantizations`.
    importance_samples: K of the equation; one solve each.
    probes: as in `log_prob`.
    rtol: as there.
    atol: as there.
    max_steps: as there.
    valid: the dimensions that count.
    schedule: as in `log_prob`.
  """
  if schedule:
    each = jnp.broadcast_to(0.5 * jax.nn.log_sigmoid(log_snr_max), u.shape)
    log_alphas = sum_over_dims(each, valid)
  else:
    log_alphas = count_dims(u.shape[1:], valid) * 0.5 * jax.nn.log_sigmoid(log_snr_max)

  def draw(number):
    own = fold_in(keys, jnp.full(len(u), number))
    y, log_q = dequantize(own, u, log_snr_max, valid)
    z_0 = alpha(log_snr_max) * (y if valid is None else jnp.where(valid, y, 0))
    ends = (log_snr_max, log_snr_min)
    solution = log_prob(denoiser, z_0, *ends, probes, rtol, atol, max_steps, valid, schedule)
    return solution._replace(log_prob=solution.log_prob + log_alphas - log_q)

  draws = jax.lax.map(draw, jnp.arange(importance_samples))
  return Solution(
    jax.nn.logsumexp(draws.log_prob, axis=0) - math.log(importance_samples),
    draws.evaluations.sum(axis=0),
    draws.finished.all(axis=0),
  )
