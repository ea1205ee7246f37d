"""FID, sFID, Inception score, KID, precision and recall, each with an interval.

Intervals are for the value at this number of images, over other draws of as many from the same
sampler; the reference is fixed. They come from random halves of the images, a bootstrap without
replacement: half of n spreads about the value of all n just as n fresh ones about theirs. The usual
bootstrap repeats images, which KID, the nearest neighbours of precision and recall, and the rank of
a covariance all take for structure. Halves carry the bias of n / 2, so their spread alone is used:
value +- their standard deviation times Student's quantile for as many halves.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from scipy import special

from vdm.fid import statistics

if TYPE_CHECKING:  # the distances alone need no network
  from vdm.fid.extractor import Extractor
  from vdm.fid.network import Features
  from vdm.fid.references import Reference
  from vdm.fid.streaming import Collected

SPLITS = 10  # of the Inception score
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
PAIRS = (
  10_000  # images per side for precision and recall, as published numbers use, and KID's interval
)
NEIGHBOUR = 3
SEED = 2020  # of the order of images in splits, and of KID's subsets: torch-fidelity's

Metric = Callable[[np.ndarray], Any]  # numbers of some images -> a value, or several


def inception_score(
  logits: Float[np.ndarray, 'N K'], splits: int = SPLITS, seed: int = SEED
) -> tuple[float, float]:
  """Returns the mean and standard deviation of exp E KL(p(y|x) | p(y)) over splits.

  This is the Inception score (arXiv 1606.03498).
  """
  order = np.random.RandomState(seed).permutation(len(logits))
  scores, splits = [], min(splits, len(order))
  for part in range(splits):
    rows = order[part * len(order) // splits : (part + 1) * len(order) // splits]
    log_p = _log_softmax(np.asarray(logits[rows], np.float64))
    p = np.exp(log_p)
    scores.append(np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def _log_softmax(logits):
  logits = logits - logits.max(axis=1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def kernel(x: Float[np.ndarray, 'N D'], y: Float[np.ndarray, 'M D']) -> Float[np.ndarray, 'N M']:
  """Returns (x . y / D + 1)^3 (arXiv 1801.01401, section 4)."""
  return (x @ y.T / x.shape[1] + 1) ** 3


def unbiased_mmd(xx: np.ndarray, xy: np.ndarray, yy: np.ndarray) -> float:
  """Returns the squared MMD, E k(x, x') + E k(y, y') - 2 E k(x, y), from kernel matrices."""
  within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
  return float(sum(within) - 2 * xy.mean())


def kid(
  x: Float[np.ndarray, 'N D'],
  y: Float[np.ndarray, 'M D'],
  subsets: int = SUBSETS,
  subset_size: int = SUBSET_SIZE,
  seed: int = SEED,
) -> tuple[float, float]:
  """Returns unbiased KID's mean and standard deviation over random subsets, at most all images."""
  size, random = min(subset_size, len(x), len(y)), np.random.RandomState(seed)
  if size == len(x) == len(y):
    subsets = 1  # all would be the same
  values = []
  for _ in range(subsets):
    a, b = (np.float64(z[random.choice(len(z), size, replace=False)]) for z in (x, y))
    values.append(unbiased_mmd(kernel(a, a), kernel(a, b), kernel(b, b)))
  return float(np.mean(values)), float(np.std(values))


def distances(x: Float[np.ndarray, 'N D'], y: Float[np.ndarray, 'M D']) -> Float[np.ndarray, 'N M']:
  """Returns squared Euclidean distances, in float64."""
  x, y = np.float64(x) - x[0], np.float64(y) - x[0]  # near the origin, where less cancels
  product = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * (x @ y.T)
  return np.maximum(product, 0)


def precision_recall(
  generated: np.ndarray, real: np.ndarray, across: np.ndarray, neighbour: int = NEIGHBOUR
) -> tuple[float, float]:
  """Returns the shares of each set in the other's manifold (arXiv 1904.06991, equations 1 and 2).

  Args:
    generated: distances [N, N] within the samples.
    real: distances [M, M] within the reference.
    across: distances [N, M] between them.
    neighbour: k; a manifold is the balls of each point to its k-th neighbour.
  """
  radius_generated, radius_real = (
    np.partition(d, min(neighbour, len(d) - 1), axis=1)[:, min(neighbour, len(d) - 1)]
    for d in (generated, real)  # a point's own distance, 0, comes first
  )
  precision = (across <= radius_real[None]).any(axis=1).mean()
  return float(precision), float((across <= radius_generated[:, None]).any(axis=0).mean())


def spread(metric: Metric, num_images: int, halves: int, seed: int = 0) -> Float[np.ndarray, '*M']:
  """Returns the standard error of metric(all rows), from random halves of them."""
  random = np.random.RandomState(seed)
  draws = [metric(random.permutation(num_images)[: num_images // 2]) for _ in range(halves)]
  rest = num_images - num_images // 2  # halves of odd n: scaled to n exactly
  return np.asarray(np.std(draws, axis=0, ddof=1) * np.sqrt((num_images // 2) / rest))


def measure(
  samples: 'Collected', reference: 'Reference', label: str, halves: int
) -> dict[str, dict[str, Any]]:
  """Returns {name: {value, stderr, low, high, num_images, ...}}; 95 % intervals if halves >= 2.

  `label` is the extractor's. With Inception's the names are fid, sfid, inception_score, kid,
  precision, recall; with any other, L, they are fd_L, fd_spatial_L, score_L, kd_L, precision_L,
  recall_L. What the network, or a reference that has only statistics, has nothing for is left out.
  """
  names = _names(label)
  rows, found = samples.rows, {}
  for kind in sorted(set(reference.gaussians) & set(samples.statistics)):
    found[names[kind]] = _frechet(samples, reference, kind, halves)
  if 'logits' in rows:
    found[names['score']] = _score(rows['logits'], halves)
  if 'features' in reference.rows:
    found[names['kid']] = _kid(rows, reference.rows, halves)
    found |= _precision_recall(rows, reference.rows, halves, names)
  return found


def card_fields(
  name: str, estimate: dict[str, Any], extractor: 'Extractor', reference: 'Reference'
) -> dict[str, Any]:
  """Returns what a card says of one of the metrics of `measure`, so that two can be compared."""
  facts = dict(estimate)
  return {
    'metric': name,
    'num_samples': facts.pop('num_images'),
    **facts,
    'extractor': extractor.name,
    'extractor_sha256': extractor.sha256,
    'reference': reference.facts,
    'flips': False,
  }


def _names(label: str) -> dict[str, str]:
  if label == 'inception':
    own = ('fid', 'sfid', 'inception_score', 'kid', 'precision', 'recall')
  else:
    own = (f'{name}_{label}' for name in ('fd', 'fd_spatial', 'score', 'kd', 'precision', 'recall'))
  kinds = ('features', 'spatial', 'score', 'kid', 'precision', 'recall')
  return dict(zip(kinds, own, strict=True))


def _estimate(
  value: float, error: np.ndarray | float | None, num_images: int, halves: int, **facts
) -> dict[str, Any]:
  interval = {}
  if error is not None:
    error = float(error)
    half = float(special.stdtrit(halves - 1, 0.975)) * error
    interval = {'stderr': error, 'low': value - half, 'high': value + half}
  return {'value': value, **interval, 'num_images': num_images, **facts}


def _frechet(samples: 'Collected', reference: 'Reference', kind: str, halves: int):
  theirs, own = reference.gaussians[kind], samples.statistics[kind]
  root, rows = statistics.square_root(theirs.covariance), samples.rows
  error = None
  if halves > 1 and kind in rows and len(rows[kind]) == own.count:

    def of_some(index):
      return statistics.frechet_distance(statistics.fit(rows[kind][index]), theirs, root)

    error = spread(of_some, own.count, halves)
  value = statistics.frechet_distance(statistics.finish(own), theirs, root)
  return _estimate(value, error, own.count, halves, reference_images=reference.facts['num_images'])


def _score(logits: np.ndarray, halves: int):
  value, deviation = inception_score(logits)
  of_some = lambda index: inception_score(logits[index])[0]
  error = spread(of_some, len(logits), halves) if halves > 1 else None
  return _estimate(value, error, len(logits), halves, std_over_splits=deviation, splits=SPLITS)


def _kid(rows: 'Features', reference: 'Features', halves: int):
  x, y = rows['features'], reference['features']
  value, deviation = kid(x, y)
  error = None
  if halves > 1:
    some_x, some_y = np.float64(x[:PAIRS]), np.float64(y[:PAIRS])
    xx, xy = kernel(some_x, some_x), kernel(some_x, some_y)
    yy = np.zeros((2, 2))  # of the reference, which is fixed
    of_some = lambda index: unbiased_mmd(xx[np.ix_(index, index)], xy[index], yy)
    error = spread(of_some, len(some_x), halves) * np.sqrt(len(some_x) / len(x))
    # which images the subsets have, of the reference too: what this adds is above it if anything
    error = np.hypot(error, deviation / np.sqrt(SUBSETS))
  facts = dict(std_over_subsets=deviation, subset_size=min(SUBSET_SIZE, len(x), len(y)))
  return _estimate(value, error, len(x), halves, reference_images=len(y), **facts)


def _precision_recall(rows: 'Features', reference: 'Features', halves: int, names: dict[str, str]):
  x, y = rows['features'][:PAIRS], reference['features'][:PAIRS]
  generated, real, across = distances(x, x), distances(y, y), distances(x, y)
  values = precision_recall(generated, real, across)
  errors = [None, None]
  if halves > 1:

    def of_some(index):
      return precision_recall(generated[np.ix_(index, index)], real, across[index])

    errors = spread(of_some, len(x), halves)
  return {
    names[name]: _estimate(value, error, len(x), halves, reference_images=len(y))
    for name, value, error in zip(('precision', 'recall'), values, errors, strict=True)
  }
