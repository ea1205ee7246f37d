"""Inception and its metrics against torch-fidelity, with the same random weights in both."""

import importlib.util
import pathlib

import numpy as np
import pytest

# Not importorskip: importing it fails for want of torchvision's operators, which parity declares.
if importlib.util.find_spec('torch_fidelity') is None:
  pytest.skip("pip install -e '.[parity]'", allow_module_level=True)
FEATURES = ('features', 'spatial', 'logits')


@pytest.mark.slow
def test_features_and_metrics_agree_at_every_size(monkeypatch, rank_promotion_allowed):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1])
  parity = importlib.import_module('benchmarks.fid_parity')
  found = list(parity.rows(8, parity.SIZES, fid_sizes=((32, 32),)))
  assert {size for size, *_ in found} == {(32, 32), (64, 64), (299, 299), (40, 56)}
  for size, name, ours, theirs in found:
    if name in FEATURES:
      assert ours < 1e-4, (size, name)
    else:
      np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=f'{size} {name}')
  values = {(size, name): theirs for size, name, _, theirs in found}
  assert values[(32, 32), 'fid'] > 1
  # the images vary for the network, or all of this would hold of constants
  assert all(values[size, 'inception_score'] > 1.01 for size in parity.SIZES)
  assert all(0 < values[size, 'recall'] < 1 for size in parity.SIZES)
