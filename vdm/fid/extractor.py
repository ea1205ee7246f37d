"""A feature extractor over a mesh: images of this host in, features of this host's images out."""

import importlib

import jax
import numpy as np
from jax.sharding import Mesh

from vdm.errors import require
from vdm.fid.classifier import classifier_network
from vdm.fid.network import Features, Network, check_range, inception_network
from vdm.system import parallel


class Extractor:
  """Runs a Network, jitted, split over all devices and hosts.

  Attributes:
    name: of the network with its weights: what a reference is compared by.
    label: short, for the names of metrics.
    sha256: of the network's parameters.
    num_features: length of a feature vector.
  """

  def __init__(self, network: Network, mesh: Mesh, num_values: int):
    self.name, self.label, self.sha256 = network.name, network.label, network.sha256
    self.num_features = network.num_features
    self._mesh, self._num_values = mesh, num_values
    sharded, replicated = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    self._params = jax.device_put(network.params, replicated)
    # Two programs: only the first, which is small, is compiled for every size of images.
    self._prepare = jax.jit(network.prepare, out_shardings=sharded)
    self._apply = jax.jit(network.apply, out_shardings=sharded)

  def batch_size(self, wanted: int) -> int:
    """Returns the least number of images from `wanted` up that all hosts' devices share evenly."""
    return -(-wanted // self._mesh.size) * self._mesh.size

  def __call__(self, images: np.ndarray) -> Features:
    """Returns features, numpy float32 [b, ...] each, of this host's images uint8 [b, H, W, C].

    b is the same on every host, and is filled up to what the devices share evenly. All hosts have
    to call it together.
    """
    check_range(images, self._num_values)
    local = self._mesh.local_mesh.size
    filling = -len(images) % local
    padded = np.pad(images, ((0, filling), (0, 0), (0, 0), (0, 0)))
    features = self._apply(self._params, self._prepare(parallel.to_devices(self._mesh, padded)))
    return {name: _local_rows(value)[: len(images)] for name, value in features.items()}


def _local_rows(array: jax.Array) -> np.ndarray:
  """Returns, in order, the rows on this host's devices of an array that is split over devices."""
  shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards])


def make(settings, data, mesh: Mesh, image_shape: tuple[int, ...] = ()) -> Extractor:
  """Returns the extractor that config.fid names; refuses at once what it lacks.

  config.fid.features is 'inception', 'classifier', or the dotted path of a function
  (settings, image_shape, data.num_values) -> vdm.fid.Network.

  Args:
    settings: config.fid.
    data: config.data.
    mesh: the devices.
    image_shape: of the images, if it is not config.data.image_shape.

  Raises:
    ValueError: weights are missing or damaged, or the images are not what the network takes.
  """
  shape = tuple(image_shape or data.image_shape)
  if settings.features == 'classifier':
    require(
      shape == tuple(data.image_shape),
      'config.data.image_shape',
      tuple(data.image_shape),
      f'{shape}, the shape of the images',
      "the classifier knows its data set's alone",
    )
    network = classifier_network(settings, data)
  elif settings.features == 'inception':
    network = inception_network(settings, shape, data.num_values)
  else:
    network = _by_path(settings.features)(settings, shape, data.num_values)
  return Extractor(network, mesh, data.num_values)


def _by_path(path: str):
  module, _, function = path.rpartition('.')
  try:
    return getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f"config.fid.features={path!r} must be 'inception', 'classifier' or package.module.function, "
      f'and that cannot be imported ({error}); correct it.'
    ) from error
