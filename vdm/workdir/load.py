"""Reads a run by its own config, and writes nothing."""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build
from vdm.build.state import TrainState
from vdm.errors import require
from vdm.nn import blocks
from vdm.system import files, hosts, parallel
from vdm.workdir import released
from vdm.workdir.checkpoint import best_step, manager, restore
from vdm.workdir.config_file import (
  CONFIG,
  changed,
  differences,
  flat,
  own_config,
  plain,
  saved_config,
  settled,
)


class Run(NamedTuple):
  """Holds a run as it was read."""

  config: ConfigDict  # its own, but for what reading may choose
  model: build.Model
  mesh: Mesh
  state: TrainState
  workdir: os.PathLike | str


def read_run(
  config: ConfigDict | None,
  workdir: os.PathLike | str,
  step: str = 'newest',
  overrides: Mapping[str, Any] | None = None,
) -> Run:
  """Reads a run, to evaluate it or to sample from it, by its own config (`own_config`).

  Nothing is written, so that the workdir may be read-only, or be trained in meanwhile.

  Args:
    config: as the user gave it; None: all is the run's own.
    workdir: of the run.
    step: 'newest', 'best' (the lowest bits/dim among the checkpoints), or a number.
    overrides: leaves of the run's config to be changed, by their names.

  Raises:
    ValueError: there is no such checkpoint, it cannot be restored, or config.json cannot.
  """
  if not holds_run(workdir):
    raise ValueError(f'--workdir={workdir} holds no checkpoint; train first, or name another.')
  config = None if config is None else settled(config, workdir)
  own = changed(own_config(workdir, config), overrides or {})
  found = differences(flat(saved_config(workdir)), flat(plain(config or own)))
  if found:
    logging.info('%s is read by its own config: it has %s', workdir, ', and '.join(found))
  hosts.keep_compiled()
  model = build.model(own)
  build.check_devices(own, jax.device_count())
  mesh = parallel.make_mesh(own.parallel.fsdp)
  state = _state(workdir, build.init_state(own, model), mesh, step)
  return Run(own, model, mesh, state, workdir)


def read_guide(workdir: str, model: build.Model, mesh: Mesh) -> tuple[build.Model, TrainState]:
  """Returns the model and newest state of the run that guides `model`, by its own config.

  Raises:
    ValueError: there is no such run, it cannot be restored, or its network is of another kind or
      makes other images than `model`.
  """
  field, remedy = 'config.sample.guidance.checkpoint', 'name another run'
  folder = _folder_of_run(field, workdir)
  config = own_config(folder)
  guide = build.model(config)
  # A guide is to make the model's own mistakes, only more of them (arXiv 2406.02507, section 3).
  kind = f'a run of model.name={model.network!r}, not {guide.network!r}'
  require(guide.network == model.network, field, workdir, kind, remedy)
  own, other = (f'{m.decoder.units} and images {m.image_shape}' for m in (model, guide))
  require(own == other, field, workdir, f'a model of {own}, not {other}', remedy)
  dtype = model.decoder.dtype
  ends = jnp.stack([jnp.zeros(model.image_shape, dtype), jnp.ones(model.image_shape, dtype)])
  mine, its = model.decoder.to_model(ends), guide.decoder.to_model(ends)
  same = np.allclose(mine, its, rtol=1e-4, atol=1e-6)
  rule = 'a run with the same config.data.shift and scale'
  require(bool(same), field, workdir, rule, 'train it on the same data')
  own, other = _paths_of(model), _paths_of(guide)
  kind = f'a run whose schedule has {own}, not {other}'
  require(own == other, field, workdir, kind, remedy)
  for name, one, two in model.takes.differences(guide.takes):
    require(False, field, workdir, f'a run with {name} {one}, not {two}', remedy)
  more = ' and '.join(name for name in guide.takes.names if name not in model.takes.names)
  rule = f'a run that learned to do without its {more}, which the model is not told'
  require(guide.takes.lack_learned or not more, field, workdir, rule, remedy)
  return guide, _state(folder, build.init_state(config, guide), mesh, 'newest')


def _paths_of(model: build.Model) -> str:
  """Returns which dimensions have levels of their own: a network reads those of each place."""
  if not model.multivariate:
    return 'one path for all dimensions'
  start = lambda key: model.schedule(model.init(key))(jnp.zeros(1))
  shape = jax.eval_shape(start, jax.random.key(0)).shape
  return f'a path for each {"dimension" if math.prod(shape[1:-1]) > 1 else "channel"}'


# What a run that starts from another may change of its network: not what its parameters mean.
_FREE = 'model.dropout', 'model.dtype', 'model.remat', 'model.scan_blocks'
_KEPT = (
  'data.image_shape',
  'data.num_classes',
  'data.condition_shape',
  'data.embedding_size',
  'data.masked',
  'decoder.learned_std',
)


def check_start(start_from: str, leaves: Mapping[str, Any]):
  """Refuses a run to start from that is not there, or has another model.

  Args:
    start_from: config.train.start_from.
    leaves: of the whole config, by their names without `config.` (`config_file.flat`).

  Raises:
    ValueError: there is no such run, or a leaf that its parameters depend on is not the same.
  """
  field = 'config.train.start_from'
  its = flat(plain(own_config(_folder_of_run(field, start_from))))
  kept = {leaf for leaf in leaves.keys() | its.keys() if leaf.startswith(('model.', 'schedule.'))}
  if not any(tree['schedule.name'].startswith('learned') for tree in (leaves, its)):
    kept -= {leaf for leaf in kept if leaf.startswith('schedule.')}
    kept |= {leaf for leaf in ('schedule.log_snr_min', 'schedule.log_snr_max') if leaf in leaves}
  for leaf in sorted(kept | set(_KEPT)):
    own, other = leaves.get(leaf), its.get(leaf)
    same = leaf in _FREE or own == other or not (own or other)  # an older run has it not at all
    rule = f'a run with config.{leaf}={own!r}, not {other!r}'
    require(same, field, start_from, rule, 'give both the same')


def first_state(start_from: str, init: build.InitState, mesh: Mesh) -> TrainState:
  """Returns the state before the first step, with the averages of another run if it is given.

  The optimizer and the adaptive schedule start anew.

  Args:
    start_from: config.train.start_from, after `check_start`; '': parameters are those of the seed.
    init: of the run that begins.
    mesh: of its devices.
  """
  if not start_from:
    return parallel.initial_state(mesh, init)
  folder = files.path_of(start_from)
  own = own_config(folder)
  given = _state(folder, build.init_state(own, build.model(own)), mesh, 'newest').averages['ema']
  abstract = parallel.abstract_state(mesh, init)
  stacked = blocks.stacked_names(abstract.params['network'])

  def start(params):
    return init(blocks.stack(blocks.unstack(params), stacked))

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(start, out_shardings=shardings)(given)


def holds_run(workdir: os.PathLike | str) -> bool:
  """Returns whether there are checkpoints to read, or a released model."""
  return (epath.Path(workdir) / 'checkpoints').exists() or released.exists(workdir)


def _folder_of_run(field: str, workdir: str) -> epath.Path:
  """Returns the folder that a leaf of the config names, which must hold a run and its config."""
  folder = files.path_of(workdir)
  there = (folder / CONFIG).exists() and holds_run(folder)
  rule = f'the workdir of a run, with {CONFIG} and checkpoints, or a released model'
  require(there, field, workdir, rule, 'train it first, or name another')
  return folder


def _state(workdir: os.PathLike | str, init: build.InitState, mesh: Mesh, step: str) -> TrainState:
  """Returns the state at `step`, 'newest', 'best' or a number; a released model has but one."""
  if released.exists(workdir):
    state = released.read(workdir, init, mesh)
    if step not in ('newest', 'best', str(int(state.step))):
      raise ValueError(f'--step={step} is not there: {workdir} was released at {int(state.step)}.')
    return state
  with manager(workdir) as reader:
    steps, lowest = sorted(reader.all_steps()), best_step(reader)
    if not steps:
      raise ValueError(f'--workdir={workdir} holds no finished checkpoint yet; wait for the first.')
    named = {'newest': steps[-1], 'best': lowest} | {str(number): number for number in steps}
    there = f'--workdir={workdir} holds the steps {", ".join(map(str, steps))}'
    if step not in named:
      raise ValueError(f'--step={step} is not there: {there}; choose one, or newest, or best.')
    if named[step] is None:
      raise ValueError(f'--step=best is not known: {there}, none of them evaluated; choose one.')
    best = 'none was evaluated' if lowest is None else f'the best by likelihood is {lowest}'
    saved = ', '.join(map(str, steps))
    logging.info('%s: step %d is read, of the saved %s; %s', workdir, named[step], saved, best)
    abstract = parallel.abstract_state(mesh, init)
    one = None if step == 'newest' else named[step]
    restored = restore(reader, abstract, one, set_aside=False)
    assert restored is not None  # there are steps
    return restored[0]
