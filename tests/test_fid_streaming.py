"""The same numbers on 1, 2 and 8 devices and on 2 processes; last batches that are not full.

The network's arithmetic is exact in float32, in any order of summation, so that what is left is
that of the statistics.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vdm import fid
from vdm.system import hosts, parallel

COUNT = 43  # not a multiple of any batch
pytestmark = pytest.mark.usefixtures('rank_promotion_allowed')


def images(seed):
  return np.random.default_rng(seed).integers(0, 256, (COUNT, 6, 6, 3)).astype(np.uint8)


def network():
  weights = np.random.default_rng(9).integers(-8, 9, (108, 10)).astype(np.float32)

  def apply(params, x):
    features = x.reshape(len(x), -1) @ params
    spatial = jnp.maximum(features[:, :3], features[:, 3:6])
    return {'features': features, 'spatial': spatial, 'logits': features / 8}

  return fid.Network('random', 'inception', 'none', 10, weights, lambda u: u / 256.0, apply)


def score(mesh, batch_size):
  """All metrics between two sets of images."""
  extractor = fid.Extractor(network(), mesh, 256)

  def collected(seed):
    parts = np.split(images(seed), [5, 5, 20])  # arrays of any length
    return fid.collect(extractor, fid.batches_of(parts, extractor, batch_size), keep=COUNT)

  samples, real = collected(0), collected(1)
  gaussians = {k: fid.statistics.finish(part) for k, part in real.statistics.items()}
  reference = fid.Reference(gaussians, real.rows, {'num_images': COUNT})
  assert samples.statistics['features'].count == COUNT and len(samples.rows['logits']) == COUNT
  return {k: v['value'] for k, v in fid.measure(samples, reference, extractor.label, 3).items()}


@pytest.fixture(scope='module')
def expected():
  features = [
    np.float64(images(seed)).reshape(COUNT, -1) / 256 @ network().params for seed in (0, 1)
  ]
  return {
    'fid': fid.frechet_distance(*map(fid.fit, features)),
    'sfid': fid.frechet_distance(*(fid.fit(np.maximum(f[:, :3], f[:, 3:6])) for f in features)),
  }


@pytest.mark.parametrize('devices, batch_size', [(1, 43), (1, 7), (2, 16), (8, 9)])
def test_devices_and_batches_do_not_matter(devices, batch_size, expected):
  mesh = Mesh(np.array(jax.devices()[:devices]).reshape(-1, 1), parallel.BATCH_AXES)
  found = score(mesh, batch_size)
  assert set(found) == {'fid', 'sfid', 'inception_score', 'kid', 'precision', 'recall'}
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-12)


def test_keep_keeps_the_first_images_alone():
  extractor = fid.Extractor(network(), parallel.make_mesh(), 256)
  some = fid.collect(extractor, fid.batches_of([images(0)], extractor, 8), keep=21)
  every = fid.collect(extractor, fid.batches_of([images(0)], extractor, 8), keep=COUNT)
  assert some.statistics['features'].count == COUNT
  assert {name: len(rows) for name, rows in some.rows.items()} == dict.fromkeys(every.rows, 21)
  np.testing.assert_array_equal(some.rows['features'], every.rows['features'][:21])


def test_images_that_are_not_what_was_said_are_refused():
  extractor = fid.Extractor(network(), parallel.make_mesh(), 17)
  with pytest.raises(
    ValueError, match=r'values up to 255, must be below config.data.num_values=17'
  ):
    extractor(images(0))
  with pytest.raises(ValueError, match='dtype float32, must be uint8'):
    extractor(images(0).astype(np.float32))


@pytest.mark.slow
def test_two_processes_are_one(expected):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  command = [sys.executable, __file__, str(port)]
  processes = [
    subprocess.Popen([*command, str(number)], env=env, stdout=subprocess.PIPE, text=True)
    for number in (0, 1)
  ]
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  found = [json.loads(output.splitlines()[-1]) for output in outputs]
  assert found[0] == found[1]
  for name, value in expected.items():
    assert found[0][name] == pytest.approx(value, rel=1e-12)


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  hosts.initialize(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]), 100)
  print(json.dumps(score(parallel.make_mesh(), 16)))
