"""Statistics, the Fréchet distance and metrics against closed forms and others' code."""

import functools

import numpy as np
import pytest
import scipy.linalg
from sklearn.metrics import pairwise_distances
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from vdm import fid
from vdm.fid import metrics, statistics
from vdm.fid.references import Reference


def normal(seed, shape, mean=0.0):
  return np.random.default_rng(seed).normal(mean, 1, shape)


def test_streamed_and_merged_statistics_are_those_of_all_rows_at_once():
  rows = normal(0, (50, 6)) + 1e6  # squares of sums would cancel
  streamed = statistics.init(6)
  for part in (rows[:7], rows[7:7], rows[7:8], rows[8:41]):
    streamed = statistics.update(streamed, part)
  merged = statistics.merge(streamed, statistics.of_rows(rows[41:]))
  gaussian = statistics.finish(merged)
  assert merged.count == 50
  np.testing.assert_allclose(gaussian.mean, rows.mean(axis=0), rtol=1e-14)
  np.testing.assert_allclose(gaussian.covariance, np.cov(rows.T), rtol=1e-8, atol=1e-9)


def test_frechet_distance_is_that_of_scipys_square_root():
  a = normal(0, (500, 6)) @ normal(1, (6, 6))
  b = normal(2, (400, 6)) @ normal(3, (6, 6)) + 1
  cov_a, cov_b = np.cov(a.T), np.cov(b.T)
  root = scipy.linalg.sqrtm(cov_a @ cov_b).real
  want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
  fits = fid.fit(a), fid.fit(b)
  assert fid.frechet_distance(*fits) == pytest.approx(want, rel=1e-9)
  assert fid.frechet_distance(*fits[::-1]) == pytest.approx(want, rel=1e-9)
  assert abs(fid.frechet_distance(fits[0], fits[0])) < 1e-9


def test_frechet_distance_of_diagonals_and_of_singular_covariances():
  """Closed form: sum of squared differences of means and of standard deviations."""
  std_a, std_b = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 0.0])
  a = fid.Gaussian(np.zeros(3), np.diag(std_a**2))
  b = fid.Gaussian(np.ones(3), np.diag(std_b**2))
  assert fid.frechet_distance(a, b) == pytest.approx(3 + 4 + 2.25, rel=1e-12)
  few = fid.fit(normal(0, (4, 30)))  # fewer rows than dimensions
  # the root of a zero eigenvalue is the root of its rounding
  assert abs(fid.frechet_distance(few, few)) < 1e-5


def test_inception_score_is_one_of_equal_images_and_the_number_of_certain_classes():
  assert metrics.inception_score(np.ones((40, 5)), splits=4) == pytest.approx((1.0, 0.0))
  certain = 1e3 * np.eye(5)[np.arange(100) % 5]
  assert metrics.inception_score(certain, splits=1)[0] == pytest.approx(5.0)


def test_kid_is_the_unbiased_estimate_with_the_cubic_kernel():
  x, y = normal(0, (30, 4)), normal(1, (25, 4), 0.3)
  xx, xy, yy = (
    polynomial_kernel(*pair, degree=3, gamma=1 / 4, coef0=1) for pair in ((x, x), (x, y), (y, y))
  )
  want = (xx.sum() - np.trace(xx)) / (30 * 29) + (yy.sum() - np.trace(yy)) / (25 * 24)
  want -= 2 * xy.mean()
  got = metrics.unbiased_mmd(*(metrics.kernel(*pair) for pair in ((x, x), (x, y), (y, y))))
  assert got == pytest.approx(want, rel=1e-12)
  # zero on average between draws of one distribution, at any size
  values = [
    metrics.kid(normal(2 * i, (20, 3)), normal(2 * i + 1, (20, 3)), 1)[0] for i in range(300)
  ]
  assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)


def test_precision_and_recall_by_nearest_neighbours():
  x, y = normal(0, (60, 3)), normal(1, (50, 3), 0.8)

  def covered(points, others):
    radius = NearestNeighbors(n_neighbors=4).fit(others).kneighbors(others)[0][:, 3]
    return (pairwise_distances(points, others) <= radius[None]).any(axis=1).mean()

  pairs = [metrics.distances(*pair) for pair in ((x, x), (y, y), (x, y))]
  got = metrics.precision_recall(*pairs)
  assert got == pytest.approx((covered(x, y), covered(y, x)))
  assert 0 < got[0] < 1 and 0 < got[1] < 1
  assert metrics.precision_recall(pairs[0], pairs[0], pairs[0]) == (1.0, 1.0)


def collected(rows, logits):
  parts = {'features': rows, 'logits': logits}
  return fid.Collected({'features': statistics.of_rows(rows)}, parts)


def test_intervals_are_as_wide_as_fresh_draws_spread():
  real = normal(999, (300, 4), 0.5)
  reference = Reference({'features': fid.fit(real)}, {'features': real}, {'num_images': 300})
  weights = normal(998, (4, 3))
  values, errors = [], []
  for seed in range(24):
    rows = normal(seed, (300, 4))
    found = fid.measure(collected(rows, rows @ weights), reference, 'inception', halves=12)
    values.append([entry['value'] for entry in found.values()])
    errors.append([(e['high'] - e['low']) / (2 * 2.201) for e in found.values()])
  assert list(found) == ['fid', 'inception_score', 'kid', 'precision', 'recall']
  ratio = np.mean(errors, axis=0) / np.std(values, axis=0)
  assert (ratio > 0.6).all() and (ratio < 1.6).all(), dict(zip(found, ratio, strict=True))


@pytest.mark.parametrize('shift', [0.0, 0.3])
def test_the_error_of_kid_holds_that_of_its_subsets(monkeypatch, shift):
  """Where samples are as the reference the subsets decide: all pairs at once vary far less."""
  subsets, size = 20, 200
  monkeypatch.setattr(metrics, 'SUBSETS', subsets)
  monkeypatch.setattr(metrics, 'PAIRS', 1000)
  few = functools.partial(metrics.kid, subsets=subsets, subset_size=size)
  monkeypatch.setattr(metrics, 'kid', few)
  real, values, errors = normal(999, (1000, 4)), [], []
  for seed in range(40):
    found = metrics._kid({'features': normal(seed, (8000, 4), shift)}, {'features': real}, 10)
    values.append(found['value'])
    errors.append(found['stderr'])
  ratio = np.sqrt(np.mean(np.square(errors))) / np.std(values)
  assert 0.8 < ratio < 1.6, ratio


def test_only_inceptions_distances_are_called_fid():
  rows = normal(0, (40, 4))
  reference = Reference({'features': fid.fit(rows)}, {'features': rows}, {'num_images': 40})
  found = fid.measure(collected(rows, rows), reference, 'classifier', halves=0)
  names = 'fd_classifier score_classifier kd_classifier precision_classifier recall_classifier'
  assert sorted(found) == sorted(names.split())
  assert set(found['fd_classifier']) == {'value', 'num_images', 'reference_images'}
  without_rows = reference._replace(rows={})
  found = fid.measure(collected(rows, rows), without_rows, 'classifier', halves=0)
  assert sorted(found) == ['fd_classifier', 'score_classifier']
