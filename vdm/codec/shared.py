"""Makes and compares what sender and receiver share: the model at T levels, and the groups."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import vdm
from vdm import build
from vdm.codec import chain, grid, network
from vdm.codec.message import keystream, require_coder
from vdm.errors import require
from vdm.system import files

INITIAL, PROBE = 0, 3  # what pseudo-random words are for, beside `chain.ORDER` and `chain.WHITE`
PACKAGES = ('jax', 'jaxlib', 'constriction')
# What has to agree, in the order in which it is compared, and what to do where it does not.
REMEDIES = {
  'environment': 'decompress it where they agree, or try in any environment: checksums still hold',
  'model': 'name the model that it was written with',
  'schedule': 'name the model that it was written with',
  'grid': 'the levels are rounded in another way here: decompress it on a machine like the sender',
  'conditions': 'give the conditions that the sender gave, as a file or by the split',
  'outputs': 'the network gives other bits here: decompress it on a machine like the sender',
}


class Settings(NamedTuple):
  """Holds what the sender chooses.

  Attributes:
    num_timesteps: T; the expected length is the bound at T.
    group_size: images that the network sees at once. Initial bits are those of one group.
    streams: messages that do not depend on each other, each with initial bits of its own.
    cells: of the grid in a standard deviation, 2 to 4; the fewer, the fewer initial bits.
    seed: of all pseudo-random numbers, 0 .. 2^32 - 1.
  """

  num_timesteps: int = 200
  group_size: int = 16
  streams: int = 1
  cells: float = 2.0
  seed: int = 0


DEFAULTS = Settings()


class Shared(NamedTuple):
  """Holds what is the same on both sides.

  Attributes:
    network: the model at the levels.
    grid: of the levels; of a conditional schedule those of no conditions.
    settings: of the code.
    conditions: of all images, [N ...].
    num_images: N.
    facts: what is compared, in plain values.
  """

  network: network.Network
  grid: grid.Grid
  settings: Settings
  conditions: dict[str, np.ndarray]
  num_images: int
  facts: dict[str, dict[str, Any]]

  @property
  def num_groups(self) -> int:
    """Returns how many groups there are; the last one may be filled up."""
    return -(-self.num_images // self.settings.group_size)

  @property
  def streams(self) -> list[list[int]]:
    """Returns the numbers of the groups of each stream, in the order of decoding."""
    parts = np.array_split(np.arange(self.num_groups), self.settings.streams)
    return [part.tolist() for part in parts]

  def rows(self, number: int) -> slice:
    """Returns which images a group has."""
    start = number * self.settings.group_size
    return slice(start, min(start + self.settings.group_size, self.num_images))

  def group(self, number: int) -> chain.Group:
    """Returns a group; what fills it up has the conditions of its last image, and is not coded."""
    rows, size = self.rows(number), self.settings.group_size
    filled = np.minimum(rows.start + np.arange(size), rows.stop - 1)
    conditions = {name: value[filled] for name, value in self.conditions.items()}
    kept = np.zeros((size, *self.network.shape), bool)
    there = rows.stop - rows.start
    kept[:there] = conditions['valid'][:there] if 'valid' in conditions else True
    levels, made = self.grid, self.network
    if made.given:
      made = made.given(conditions)
      levels = grid.make(made.log_snr, self.settings.cells)
    return chain.Group(made, levels, conditions, kept, self.settings.seed, number)

  def initial(self, stream: int) -> Callable[[int], np.ndarray]:
    """Returns count -> the words below a stream's message, from the top down."""

    def words(count):
      found = keystream(self.settings.seed, INITIAL, stream, count=count)
      found[:1] |= np.uint32(2**31)  # the topmost word of a message is not 0
      return found

    return words


def share(
  model: build.Model,
  params: Any,
  settings: Settings,
  count: int,
  told: Mapping[str, Any],
  config_hash: str = '',
) -> Shared:
  """Returns what a side has to share with the other.

  Args:
    model: with a discrete decoder.
    params: of the model.
    settings: of the code.
    count: of images.
    told: label, vector, condition and mask as the user gave them, None for those that are not.
    config_hash: of the model's config, if it is known.

  Raises:
    ValueError: settings or conditions are refused, or the coder is not installed.
  """
  require_coder()
  require(count > 0, 'images', count, 'one or more', 'give some')
  groups = -(-count // max(settings.group_size, 1))
  within = {
    'num_timesteps': (1, 2**20),
    'group_size': (1, 2**20),
    'streams': (1, groups),
    'seed': (0, 2**32 - 1),
  }
  for name, (least, most) in within.items():
    value = getattr(settings, name)
    good = isinstance(value, int) and least <= value <= most
    why = f'there are {groups} groups of images' if name == 'streams' else 'choose another'
    require(good, name, value, f'an integer from {least} to {most}', why)
  conditions = {
    name: value if name in ('label', 'valid') else value.astype(np.float32)
    for name, value in model.takes.given(model.image_shape, count, **told).items()
  }
  made = network.of_model(model, params, settings.num_timesteps, settings.group_size)
  levels = grid.make(made.log_snr, settings.cells)
  names = {name: 'valid' if name == 'mask' else name for name in told}
  facts: dict[str, dict[str, Any]] = {
    'environment': environment(),
    'model': {
      'network': model.network,
      'dtype': model.dtype,
      'config': config_hash,
      'params': digest(params),
    },
    'schedule': {
      'log_snr_max': float(levels.log_snr[0].mean()),
      'log_snr_min': float(levels.log_snr[-1].mean()),
    },
    'grid': {'window': [chain.WINDOW_Q, chain.WINDOW_P], 'sha256': digest(levels)},
    'conditions': {
      name: 'none' if told[name] is None else digest(conditions[own])
      for name, own in names.items()
      if own in conditions
    },
    'outputs': {'sha256': _outputs(made, settings)},
  }
  return Shared(made, levels, settings, conditions, count, facts)


def environment() -> dict[str, str]:
  """Returns what the bits of a network's output depend on, as far as it has a name."""
  device = jax.devices()[0]
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  own = {'vdm': vdm.__version__, **versions}
  return own | {'platform': device.platform, 'device': device.device_kind}


def digest(tree: Any) -> str:
  """Returns sixteen hexadecimal digits of the names, types and bytes of arrays."""
  whole = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    leaf = np.ascontiguousarray(leaf)
    whole.update(f'{jax.tree_util.keystr(path)} {leaf.dtype.name} {leaf.shape}'.encode())
    whole.update(leaf.tobytes())
  return whole.hexdigest()[:16]


def _outputs(made: network.Network, settings: Settings) -> str:
  """Returns the digest of what the network says of noise at three levels, and the decoder."""
  shape, last = (settings.group_size, *made.shape), settings.num_timesteps
  words = keystream(settings.seed, PROBE, count=int(np.prod(shape)))
  z = (words / np.float64(2**30) - 2).astype(np.float32).reshape(shape)
  levels = sorted({1, (last + 1) // 2, last})
  x_hats = [made.predict(z, level, made.nothing) for level in levels]
  return digest([*x_hats, made.probabilities(z[0])])


def require_shared(written: Mapping[str, Any], own: Shared, name: str, any_environment: bool):
  """Refuses a file that was written with anything else than what this side has.

  Args:
    written: the file's header.
    own: of this side.
    name: the file's, for errors.
    any_environment: pass over versions and devices that differ.

  Raises:
    ValueError: the message names what differs.
  """
  for block, remedy in REMEDIES.items():
    if block == 'environment' and any_environment:
      continue
    for field, mine in own.facts[block].items():
      with files.reading(name):
        its = written[block][field]
      unknown = (block, field) == ('model', 'config') and '' in (its, mine)
      if its != mine and not unknown:
        raise ValueError(
          f'{name}: its {block}.{field} is {its!r}, and here it is {mine!r}; {remedy}.'
        )
