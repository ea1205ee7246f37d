"""Every likelihood of the package against exact values, on data whose best denoiser is known.

  python -m benchmarks.likelihood

Prints one Markdown table, in bits per dimension. `exact` is the mean of the exact value over the
same draws of the data; `difference` that of value - exact, pair by pair, with its standard error.

  density     -log p(z_0) of the latent at log_snr_max, for mixtures of axis-aligned Gaussians. The
              variational bound on it is prior + diffusion + the entropy of z_0 given x.
  mass        -log P(u) of the same mixtures on a grid: products of differences of the Gaussian
              distribution function, summed over components.
  grid        -log P(u) of independent discrete variables: decoder and denoiser know the grid, so
              that the variational bound and the ODE can be compared.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdm.diffusion import ode
from vdm.diffusion.decoders import discrete, prior_loss, to_grid
from vdm.diffusion.elbo import diffusion_loss, variational_bound
from vdm.diffusion.gaussian import Denoiser, Prediction, alpha, expand_to, fold_in, q_sample, sigma
from vdm.diffusion.schedules import linear
from vdm.diffusion.times import stratified
from vdm.diffusion.weightings import elbo

LOG_SNR_MIN, LOG_SNR_MAX = -12.0, 12.0
TIGHT = dict(rtol=1e-6, atol=3e-5, max_steps=1000)
DEFAULT = dict(rtol=1e-4, atol=1e-4, max_steps=1000)  # of configs/default.py
NUM_VALUES = 32  # half a cell is 13 sigma_0, but less than a component's standard deviation


class Mixture(NamedTuple):
  """sum_k weight_k N(mean_k, diag(variance_k)): [K], [K D], [K D]."""

  weight: jax.Array
  mean: jax.Array
  variance: jax.Array


def mixture(num_components: int, num_dims: int, seed: int = 0) -> Mixture:
  """One well inside [-1, 1], with standard deviations between 0.05 and 0.15."""
  rng = np.random.default_rng(seed)
  shape = (num_components, num_dims)
  parts = (
    rng.dirichlet(np.full(num_components, 5.0)),
    rng.uniform(-0.3, 0.3, shape),
    np.exp(rng.uniform(np.log(0.05**2), np.log(0.15**2), shape)),
  )
  return Mixture(*(jnp.asarray(part, jnp.float32) for part in parts))


def sample(m: Mixture, key: jax.Array, count: int) -> jax.Array:
  """Draws [count D]."""
  key_k, key_eps = jax.random.split(key)
  k = jax.random.categorical(key_k, jnp.log(m.weight), shape=(count,))
  eps = jax.random.normal(key_eps, (count, m.mean.shape[1]))
  return m.mean[k] + jnp.sqrt(m.variance[k]) * eps


def _components(m: Mixture, z: jax.Array, log_snr: jax.Array):
  """Of each component at z [B D]: residual and variance [B K D], log of weight x density [B K]."""
  a, s = (expand_to(f(log_snr), z)[:, None] for f in (alpha, sigma))
  variance = a**2 * m.variance[None] + s**2
  residual = z[:, None] - a * m.mean[None]
  nats = 0.5 * (residual**2 / variance + jnp.log(2 * math.pi * variance)).sum(axis=2)
  return residual, variance, jnp.log(m.weight)[None] - nats


def log_density(m: Mixture, z: jax.Array, log_snr: jax.Array) -> jax.Array:
  """log p(z) in nats, [B], of z = alpha x + sigma eps at log_snr [B]."""
  return jax.nn.logsumexp(_components(m, z, log_snr)[2], axis=1)


def denoiser_of(m: Mixture) -> Denoiser:
  """E[x | z] and E[eps | z], each from the residuals: neither cancels at either end."""

  def denoise(z, log_snr):
    residual, variance, joint = _components(m, z, log_snr)
    posterior = jax.nn.softmax(joint, axis=1)[..., None]
    a, s = (expand_to(f(log_snr), z)[:, None] for f in (alpha, sigma))
    x = m.mean[None] + a * m.variance[None] * residual / variance
    return Prediction(
      (posterior * x).sum(axis=1), (posterior * s * residual / variance).sum(axis=1)
    )

  return denoise


def linear_part(m: Mixture, eps: jax.Array) -> Denoiser:
  """The share of `eps` that the best linear denoiser finds: its loss, c^2 eps^2 for each variable,
  goes with the true one's, and has the mean c^2. Their difference is a control variate."""
  variance = m.weight @ (m.variance + m.mean**2) - (m.weight @ m.mean) ** 2

  def denoise(z, log_snr):
    a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
    return Prediction(z, s**2 / (a**2 * variance[None] + s**2) * eps)

  return denoise


def discretise(m: Mixture, key: jax.Array, count: int, num_values: int):
  """u [count D] of y ~ the density of z_0 / alpha_0 on the grid, and log P(u) [count], exact."""
  m = m._replace(variance=m.variance + math.exp(-LOG_SNR_MAX))
  u = jnp.round(((sample(m, key, count) + 1) * num_values - 1) / 2).astype(jnp.int32)
  assert u.min() >= 0 and u.max() < num_values
  centre, std = to_grid(u, num_values)[:, None], jnp.sqrt(m.variance)[None]
  offset = -jnp.abs(centre - m.mean[None])  # to the left, where differences do not cancel
  upper, lower = (offset + 1 / num_values) / std, (offset - 1 / num_values) / std
  log_upper, log_lower = jax.scipy.stats.norm.logcdf(upper), jax.scipy.stats.norm.logcdf(lower)
  log_cell = log_upper + jnp.log(-jnp.expm1(log_lower - log_upper))
  return u, jax.nn.logsumexp(jnp.log(m.weight)[None] + log_cell.sum(axis=2), axis=1)


def grid_denoiser(log_prob: jax.Array, num_values: int) -> Denoiser:
  """Of independent variables with log_prob [D K] on the grid."""
  values = to_grid(jnp.arange(num_values), num_values)[None, None]

  def denoise(z, log_snr):
    a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
    residual = z[..., None] - a[..., None] * values
    logits = log_prob[None] - 0.5 * (residual / s[..., None]) ** 2
    posterior = jax.nn.softmax(logits, axis=2)
    return Prediction((posterior * values).sum(axis=2), (posterior * residual).sum(axis=2) / s)

  return denoise


class Row(NamedTuple):
  """A line of the table: independent pairs of values and exact values, [n] nats each: of examples,
  or, where times are stratified over all of these, of their means over one draw."""

  data: str
  method: str
  values: np.ndarray
  exact: np.ndarray
  num_dims: int
  evaluations: float = math.nan

  def difference(self) -> tuple[float, float]:
    """Mean of value - exact and its standard error, in bits per dimension."""
    d = (np.asarray(self.values, np.float64) - self.exact) / (self.num_dims * math.log(2))
    return d.mean(), d.std(ddof=1) / math.sqrt(len(d))

  def __str__(self) -> str:
    """In Markdown."""
    difference, error = self.difference()
    exact = self.exact.mean() / (self.num_dims * math.log(2))
    cost = '' if math.isnan(self.evaluations) else f'{self.evaluations:.0f}'
    value = exact + difference
    numbers = f'{exact:.4f} | {value:.4f} | {difference:+.5f} | {error:.5f} | {cost}'
    return f'| {self.data} | {self.method} | {numbers} |'


def solve(log_prob: Callable, batch: jax.Array, trace: str, **settings) -> tuple[np.ndarray, float]:
  """-log p in nats [n] and mean evaluations of `log_prob(batch, probes=..., **settings)`."""
  shape = batch.shape[1:]
  if trace == 'exact':
    probes = ode.exact_probes(len(batch), shape)
  else:
    keys = fold_in(jax.random.key(7), jnp.arange(len(batch)))
    count = max(1, 32 // math.prod(shape))  # the trace of few dimensions varies more
    probes = ode.PROBES[trace](keys, (count, *shape))
  solution = jax.jit(lambda batch, probes: log_prob(batch, probes=probes, **settings))(
    batch, probes
  )
  assert solution.finished.all(), 'max_steps reached'
  return -np.asarray(solution.log_prob), float(solution.evaluations.mean())


ENDS = (jnp.float32(LOG_SNR_MAX), jnp.float32(LOG_SNR_MIN))
METHODS = {
  'ODE, exact trace': ('exact', TIGHT),
  'ODE, Hutchinson': ('rademacher', TIGHT),
  'ODE, Hutchinson, default tolerance': ('rademacher', DEFAULT),
}


def density_rows(name: str, m: Mixture, count: int, draws: int, methods=METHODS) -> Iterator[Row]:
  """The continuous variational bound and the ODE against the exact density of z_0."""
  key_x, key_0, key_elbo = jax.random.split(jax.random.key(1), 3)
  denoiser, schedule = denoiser_of(m), linear(LOG_SNR_MIN, LOG_SNR_MAX)
  x = sample(m, key_x, count)
  num_dims = x.shape[1]
  at_0 = jnp.full(count, LOG_SNR_MAX)
  z_0 = q_sample(x, jax.random.normal(key_0, x.shape), at_0)
  exact = -np.asarray(log_density(m, z_0, at_0), np.float64)
  entropy = 0.5 * num_dims * (math.log(2 * math.pi * math.e) + jax.nn.log_sigmoid(-LOG_SNR_MAX))

  ones = jnp.ones_like(x)
  for steps in (0, 1000, 100):

    def draw(key, steps=steps):
      key_t, key_eps = jax.random.split(key)
      t = stratified(key_t, jnp.arange(count), count)
      eps = jax.random.normal(key_eps, x.shape)
      loss = lambda denoiser, eps: diffusion_loss(denoiser, schedule, elbo(), x, t, eps, steps).loss
      control = loss(linear_part(m, eps), eps) - loss(linear_part(m, ones), ones)
      return (loss(denoiser, eps) - control).mean()

    diffusion = jax.lax.map(draw, jax.random.split(key_elbo, draws))
    nats = prior_loss(x, ENDS[1]).mean() + entropy + diffusion
    yield Row(name, _elbo_label(steps), nats, np.full(draws, exact.mean()), num_dims)
  for label, (trace, tolerance) in methods.items():
    log_prob = lambda z, **kw: ode.log_prob(denoiser, z, *ENDS, **kw)
    yield Row(name, label, *_with(solve(log_prob, z_0, trace, **tolerance), exact, num_dims))


def mass_rows(name: str, m: Mixture, count: int, samples=(1, 8, 64)) -> Iterator[Row]:
  """The importance-weighted bound by the ODE against the exact mass of the cells."""
  u, log_mass = discretise(m, jax.random.key(2), count, NUM_VALUES)
  exact = -np.asarray(log_mass, np.float64)
  yield from discrete_rows(name, denoiser_of(m), u, exact, NUM_VALUES, 'uniform', samples)


def discrete_rows(
  name: str,
  denoiser: Denoiser,
  u: jax.Array,
  exact: np.ndarray,
  num_values: int,
  dequantization: str,
  samples: tuple[int, ...],
  traces=('exact', 'rademacher'),
) -> Iterator[Row]:
  """One line a number of importance samples and kind of trace."""
  keys = fold_in(jax.random.key(3), jnp.arange(len(u)))
  dequantize = discrete(num_values).dequantizations[dequantization]
  for number in samples:
    for trace in traces:
      log_prob = lambda u, number=number, **kw: ode.data_log_prob(
        denoiser, u, keys, *ENDS, dequantize, number, **kw
      )
      kind = 'exact trace' if trace == 'exact' else 'Hutchinson'
      label = f'ODE, {dequantization}, K = {number}, {kind}'
      solved = solve(log_prob, u, trace, **TIGHT)
      yield Row(name, label, *_with(solved, exact, u.shape[1]))


def grid_rows(num_dims: int, num_values: int, count: int, draws: int) -> Iterator[Row]:
  """The variational bound with its decoder, and the ODE with either dequantisation."""
  key_p, key_u, key_elbo = jax.random.split(jax.random.key(4), 3)
  log_prob = jax.nn.log_softmax(2 * jax.random.normal(key_p, (num_dims, num_values)))
  u = jax.random.categorical(key_u, log_prob, shape=(count, num_dims)).astype(jnp.int32)
  picked = jnp.take_along_axis(log_prob[None], u[..., None], axis=2)
  exact = -np.asarray(picked.sum(axis=(1, 2)), np.float64)
  denoiser, schedule = grid_denoiser(log_prob, num_values), linear(LOG_SNR_MIN, LOG_SNR_MAX)
  decoder, name = discrete(num_values), f'grid {num_dims}-d, {num_values} values'

  for steps in (0, 1000, 100):

    def draw(key, steps=steps):
      key_t, key_recon, key_eps = jax.random.split(key, 3)
      t = stratified(key_t, jnp.arange(count), count)
      recon, eps = (jax.random.normal(key, u.shape) for key in (key_recon, key_eps))
      terms = variational_bound(denoiser, schedule, decoder, elbo(), u, t, recon, eps, steps)
      return (terms.recon + terms.prior + terms.diffusion.elbo).mean()

    nats = jax.lax.map(draw, jax.random.split(key_elbo, draws))
    yield Row(name, _elbo_label(steps), nats, np.full(draws, exact.mean()), num_dims)
  for dequantization in ('truncated_normal', 'uniform'):
    yield from discrete_rows(
      name, denoiser, u, exact, num_values, dequantization, (1,), traces=('exact',)
    )


def _elbo_label(steps: int) -> str:
  return f'ELBO, T = {steps}' if steps else 'ELBO, continuous'


def _with(solved: tuple, exact: np.ndarray, num_dims: int) -> tuple:
  values, evaluations = solved
  return values, exact, num_dims, evaluations


def table() -> Iterator[str]:
  """The lines of the table as they are computed."""
  yield '| data | method | exact | value | difference | its error | evaluations |'
  yield '|---|---|---|---|---|---|---|'
  for num_dims in (2, 64):
    for components, kind in ((1, 'Gaussian'), (4, 'mixture')):
      m = mixture(components, num_dims)
      yield from map(str, density_rows(f'density, {kind} {num_dims}-d', m, 512, 64))
    yield from map(str, mass_rows(f'mass, {kind} {num_dims}-d', m, 64))
  yield from map(str, grid_rows(num_dims=8, num_values=128, count=256, draws=64))


if __name__ == '__main__':
  for line in table():
    print(line, flush=True)
