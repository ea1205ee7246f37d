"""Mean and covariance of features, streamed in float64, and the Fréchet distance between two."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float


class Gaussian(NamedTuple):
  """Holds the Gaussian fitted to some features, in float64."""

  mean: Float[np.ndarray, ' D']
  covariance: Float[np.ndarray, 'D D']


class Statistics(NamedTuple):
  """Holds the number of rows seen so far, their mean, and sum of outer products about the mean."""

  count: int
  mean: Float[np.ndarray, ' D']
  scatter: Float[np.ndarray, 'D D']


def init(num_features: int) -> Statistics:
  """Returns the statistics of no rows."""
  return Statistics(0, np.zeros(num_features), np.zeros((num_features, num_features)))


def of_rows(rows: Float[np.ndarray, 'N D']) -> Statistics:
  """Returns the statistics of these rows alone."""
  rows = np.asarray(rows, np.float64)
  if not len(rows):
    return init(rows.shape[1])
  mean = rows.mean(axis=0)
  centred = rows - mean
  return Statistics(len(rows), mean, centred.T @ centred)


def merge(a: Statistics, b: Statistics) -> Statistics:
  """Merges the statistics of both (Chan, Golub and LeVeque 1979): no sum of squares cancels."""
  count = a.count + b.count
  if not count:
    return a
  difference = b.mean - a.mean
  mean = a.mean + difference * (b.count / count)
  between = np.outer(difference, difference) * (a.count * b.count / count)
  return Statistics(count, mean, a.scatter + b.scatter + between)


def update(statistics: Statistics, rows: Float[np.ndarray, 'N D']) -> Statistics:
  """Returns the statistics with further rows; none at all is fine."""
  return merge(statistics, of_rows(rows))


def gather(array: np.ndarray) -> list[np.ndarray]:
  """Returns every process's `array`, of one shape, to the bit: JAX itself knows no float64."""
  if jax.process_count() == 1:
    return [array]
  raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  parts = np.asarray(multihost_utils.process_allgather(raw))
  return [part.view(array.dtype).reshape(array.shape) for part in parts]


def merge_hosts(statistics: Statistics) -> Statistics:
  """Returns the statistics of the rows of all processes, the same on each."""
  count, *others = (gather(np.asarray(part)) for part in statistics)
  total = init(len(statistics.mean))
  for parts in zip(map(int, count), *others, strict=True):
    total = merge(total, Statistics(*parts))
  return total


def finish(statistics: Statistics) -> Gaussian:
  """Returns the fitted Gaussian, with N - 1 in the covariance."""
  return Gaussian(statistics.mean, statistics.scatter / (statistics.count - 1))


def fit(rows: Float[np.ndarray, 'N D']) -> Gaussian:
  """Returns the Gaussian of these rows."""
  return finish(of_rows(rows))


def square_root(covariance: Float[np.ndarray, 'D D']) -> Float[np.ndarray, 'D D']:
  """Returns the symmetric root of a positive semi-definite matrix."""
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet_distance(
  a: Gaussian, b: Gaussian, root_b: Float[np.ndarray, 'D D'] | None = None
) -> float:
  """Returns |mean_a - mean_b|^2 + tr(A + B) - 2 tr (B^1/2 A B^1/2)^1/2 (arXiv 1706.08500, eq. 6).

  It uses symmetric eigen-decompositions in float64, which stay real where A or B is singular.

  Args:
    a: one Gaussian.
    b: the other.
    root_b: square_root(b.covariance), for those who measure many against one.
  """
  root = square_root(b.covariance) if root_b is None else root_b
  product = root @ a.covariance @ root
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
  squared = ((a.mean - b.mean) ** 2).sum()
  return float(squared + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def stream(batches: Iterable[np.ndarray], num_features: int) -> Statistics:
  """Returns the statistics of the rows of all batches."""
  statistics = init(num_features)
  for rows in batches:
    statistics = update(statistics, rows)
  return statistics
