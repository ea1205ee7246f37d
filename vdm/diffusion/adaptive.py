"""The adaptive schedule of VDM++ (arXiv 2303.00848, appendix F): times where the loss is.

Pure functions in the manner of optax: `init()` gives the state, `as_schedule(state)` the Schedule
that training draws from, `update(state, hits)` the next state. The expected loss does not depend on
the schedule; its variance is small where the density of log_snr follows the loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm.diffusion.gaussian import Schedule
from vdm.errors import require

FLOOR = 1e-4  # least density of a bin, as a share of the mean: every bin is visited in the end
PRIOR = 10  # each bin starts as if so many examples in it had had the mean loss of all


class Hits(NamedTuple):
  """Holds a batch's losses by bin, [num_bins] each; they add up over devices and microbatches."""

  total: Array
  count: Array  # type: ignore[assignment]  # tuples have a method of that name


class Average(NamedTuple):
  """Holds the state: the average loss of each bin, and its weight in [0, 1), [num_bins] each."""

  mean: Array
  weight: Array


class Adaptive(NamedTuple):
  """Holds an adaptive schedule's functions: its settings are frozen in, its state is separate."""

  init: Callable[[], Average]
  hits: Callable[[Array, Array], Hits]
  update: Callable[[Average, Hits], Average]
  density: Callable[[Average], Float[Array, ' n']]
  as_schedule: Callable[[Average], Schedule]


def adaptive(
  log_snr_min: float, log_snr_max: float, num_bins: int = 100, decay: float = 0.999
) -> Adaptive:
  """Returns the schedule whose density follows the loss, in equal bins of log_snr:

    p(log_snr) proportional to E[w(log_snr) |eps_hat - eps|^2 | log_snr].

  The state is an exponential moving average of that, from log_snr_min up, which decays by `decay`
  per example: n examples in a bin move it by 1 - decay^n towards their mean; a bin that is not
  visited keeps its value. |.|^2 is a sum over dimensions. The paper's average starts at ones, and
  a loss of another size takes 1 / (1 - decay) examples in each bin to be seen; this one has the
  weight of what it has seen, 1 - decay^n, and a few examples of the mean over bins beside it, so
  that it moves from the first steps on and does not depend on the scale of the loss.

  Args:
    log_snr_min: the least log_snr.
    log_snr_max: the greatest; it belongs to the last bin.
    num_bins: of equal width.
    decay: per example.

  Returns:
    `init()`; `hits(log_snr [B], value [B])`, value = w |eps_hat - eps|^2; `update(state, hits)`;
    `density(state)` of the bins, up to a factor; `as_schedule(state)`, the inverse of the piecewise
    linear distribution function.
  """
  good = log_snr_min < log_snr_max
  require(good, 'log_snr_min', log_snr_min, f'below log_snr_max={log_snr_max}', 'swap them')
  require(num_bins >= 1, 'num_bins', num_bins, '1 or more', 'try 100')
  require(0 <= decay < 1, 'decay', decay, 'in [0, 1)', 'try 0.999')

  def hits(log_snr, value):
    position = (log_snr - log_snr_min) / (log_snr_max - log_snr_min) * num_bins
    number = jnp.clip(position.astype(jnp.int32), 0, num_bins - 1)
    both = jnp.stack([value, jnp.ones_like(value)], axis=1)  # one scatter: both in one bin
    sums = jnp.zeros((num_bins, 2)).at[number].add(both)
    return Hits(sums[:, 0], sums[:, 1])

  def update(state, hits):
    kept = decay**hits.count * state.weight
    new = 1 - decay**hits.count
    mean = hits.total / jnp.maximum(hits.count, 1)
    weight = kept + new
    moved = (kept * state.mean + new * mean) / jnp.where(weight > 0, weight, 1.0)
    return Average(moved, weight)

  def density(state):
    seen = state.weight.sum()
    overall = jnp.where(seen > 0, (state.weight * state.mean).sum() / seen, 1.0)
    prior = 1 - decay**PRIOR
    smooth = (state.weight * state.mean + prior * overall) / (state.weight + prior)
    return jnp.maximum(smooth, FLOOR * smooth.mean())

  def as_schedule(state):
    mass = density(state)[::-1]  # t runs from log_snr_max down
    distribution = jnp.concatenate([jnp.zeros(1), jnp.cumsum(mass) / mass.sum()])
    edges = jnp.linspace(log_snr_max, log_snr_min, num_bins + 1)

    def schedule(t):
      number = jnp.clip(jnp.searchsorted(distribution, t, side='right') - 1, 0, num_bins - 1)
      start, end = distribution[number], distribution[number + 1]
      share = (t - start) / (end - start)
      return edges[number] + share * (edges[number + 1] - edges[number])

    return schedule

  def init():
    return Average(jnp.zeros(num_bins), jnp.zeros(num_bins))

  return Adaptive(init, hits, update, density, as_schedule)


def predicted_reduction(density: Float[Array, ' n']) -> Float[Array, '']:
  """Returns the loss's mean square under the adaptive schedule over that under a uniform log_snr.

  It is E[v]^2 / E[v^2] over the bins v, as if the loss were a function of log_snr alone.
  """
  return density.mean() ** 2 / (density**2).mean()
