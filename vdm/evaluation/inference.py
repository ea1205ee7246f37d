"""Posteriors of what a model is conditioned on, from its likelihoods on a grid."""

from typing import NamedTuple

import numpy as np
from scipy import special

from vdm.errors import require
from vdm.evaluation.likelihood import STRATA, standard_error


class Posterior(NamedTuple):
  """Holds p(theta | x) at G points theta.

  Attributes:
    probability: [... G], which sums to one.
    stderr: of log p(theta | x) less that of the most probable point, of the draws, [... G].
  """

  probability: np.ndarray
  stderr: np.ndarray


def on_grid(estimates: np.ndarray, log_prior: np.ndarray | float = 0.0) -> Posterior:
  """Returns the posterior by Bayes' rule, from estimates of log p(x | theta) with the same noise.

  Args:
    estimates: in nats, [draws ... G], those of `Experiment.log_prob_given` at each theta.
    log_prior: log p(theta) up to a constant, [G]; a number: the same at all points.
  """
  estimates = np.asarray(estimates, np.float64)
  log_joint = estimates.mean(axis=0) + log_prior
  best = log_joint.argmax(axis=-1, keepdims=True)
  relative = estimates - np.take_along_axis(estimates, best[None], axis=-1)
  return Posterior(special.softmax(log_joint, axis=-1), standard_error(relative, STRATA))


def interval(
  probability: np.ndarray, values: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ends of the interval that leaves (1 - level) / 2 out on either side, [...] each.

  Args:
    probability: of one parameter at A values, [... A]; of several, the sum over the others.
    values: equally spaced, ascending, [A]; each stands for the cell around it.
    level: in (0, 1).
  """
  require(0 < level < 1, 'level', level, 'in (0, 1)', 'usual: 0.95')
  half = (values[1] - values[0]) / 2
  edges = np.append(values - half, values[-1] + half)
  below = np.cumsum(probability, axis=-1)
  below = np.concatenate([np.zeros_like(below[..., :1]), below], axis=-1)

  def quantile(share):
    """Returns where the distribution function is `share`, linear within a cell."""
    found = [np.interp(share, row, edges) for row in below.reshape(-1, len(edges))]
    return np.reshape(found, probability.shape[:-1])

  return quantile((1 - level) / 2), quantile((1 + level) / 2)
