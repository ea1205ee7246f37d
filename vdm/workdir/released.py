"""The files of a model that is given away: parameters alone, rounded to float16, and its config.

A folder with PARAMS and config.json is read like a workdir by --mode=eval and --mode=sample; it has
no optimizer, and all its averages are the one that was released.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from vdm import build
from vdm.build.state import TrainState
from vdm.nn import blocks
from vdm.system import files, parallel

PARAMS = 'params.npz'
STEP = 'step'
GREATEST = float(np.finfo(np.float16).max)


def write(folder: os.PathLike | str, params: Any, step: int):
  """Writes parameters as arrays called by their paths, as of the network without loops.

  Those of the network are rounded to float16, those of the schedule and the decoder stay float32:
  end points decide bits.

  Raises:
    ValueError: a parameter is not finite in float16.
  """
  arrays: dict[str, Any] = {STEP: np.int64(step)}
  for name, leaf in _flat(blocks.unstack(jax.device_get(params))).items():
    if not np.abs(leaf).max(initial=0) <= GREATEST:
      raise ValueError(f'{name} has values beyond float16 or not finite; release another step.')
    arrays[name] = leaf.astype(np.float16 if name.startswith('network/') else np.float32)
  content = files.content(lambda file: np.savez_compressed(file, **arrays))
  files.write(epath.Path(folder) / PARAMS, content)


def _flat(params):
  return traverse_util.flatten_dict(params, sep='/')


def exists(folder: os.PathLike | str) -> bool:
  """Returns whether the folder is of a released model."""
  return (epath.Path(folder) / PARAMS).exists()


def read(folder: os.PathLike | str, init: build.InitState, mesh: Mesh) -> TrainState:
  """Returns a state with the released parameters, also as each of its averages.

  Raises:
    ValueError: the file is damaged, or is of another model than `init` makes the state of.
  """
  path = epath.Path(folder) / PARAMS
  abstract = parallel.abstract_state(mesh, init)
  arrays = files.read_arrays(path)
  with files.reading(path):
    step = int(arrays.pop(STEP))
  stacked = blocks.stacked_names(abstract.params['network'])
  take = lambda leaf, i: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
  wanted = _flat(blocks.unstack(abstract.params, take))
  for name in sorted(wanted.keys() | arrays.keys()):
    found, want = (tuple(a[name].shape) if name in a else 'nothing' for a in (arrays, wanted))
    if found != want:
      raise ValueError(f'{path} has {found} for {name}, and the model of its config {want}.')
    if not np.isfinite(arrays[name]).all():
      raise ValueError(f'{path} has values of {name} that are not finite; copy it again.')
  leaves = {name: jnp.asarray(a, wanted[name].dtype) for name, a in arrays.items()}
  params = {'schedule': {}} | traverse_util.unflatten_dict(leaves, sep='/')

  def state():
    return init(blocks.stack(params, stacked)).replace(step=jnp.int32(step))

  return parallel.initial_state(mesh, state)
