"""Averages of any length after training, from stored ones (EDM2, section 3.2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from vdm import build
from vdm.build.state import TrainState
from vdm.diffusion import averages
from vdm.errors import require
from vdm.system import parallel
from vdm.workdir import checkpoint, config_file
from vdm.workdir.load import Run

FOLDER = 'snapshots'


def power_averages(state: TrainState) -> dict:
  """Returns those averages of a state that a snapshot holds."""
  return {name: average for name, average in state.averages.items() if name.startswith('std_')}


def run(of: Run) -> int:
  """Runs --mode=reconstruct: writes a workdir with an average of length config.ema.reconstruct_std.

  It is called <workdir>_std<length>, holds the newest state with that average in the place of
  'ema', and is evaluated and sampled like any other.

  Raises:
    ValueError: the run stored no power-function averages.
  """
  config, state, workdir = of.config, of.state, of.workdir
  std = config.ema.reconstruct_std
  averages.exponent(std)
  require(
    len(power_averages(state)) > 0 and (epath.Path(workdir) / FOLDER).exists(),
    'config.ema.power_stds',
    tuple(config.ema.power_stds),
    'two lengths, such as (0.05, 0.1), in a run that stored snapshots',
    'train with config.ema.snapshot_every_steps at about a fiftieth of the run',
  )
  abstract = power_averages(parallel.abstract_state(of.mesh, build.init_state(config, of.model)))
  names, stds = zip(*((f'std_{s:g}', s) for s in config.ema.power_stds), strict=True)
  with checkpoint.manager(workdir, folder=FOLDER) as reader:
    steps = [step for step in sorted(reader.all_steps()) if step <= int(state.step)]
    remedy = 'train further; the first is stored at config.ema.snapshot_every_steps'
    rule = f'one after a stored snapshot, of which there are {sorted(reader.all_steps())}'
    require(len(steps) > 0, '--step', int(state.step), rule, remedy)
    times, lengths = np.repeat(steps, len(stds)), np.tile(stds, len(steps))
    weights = averages.combination(times, lengths, int(state.step), std).reshape(
      len(steps), len(stds)
    )
    total = jax.tree.map(jnp.zeros_like, state.averages['ema'])
    add = jax.jit(lambda a, w, b: jax.tree.map(lambda x, y: x + w * y, a, b), donate_argnums=0)
    for step, row in zip(steps, weights, strict=True):
      restored = checkpoint.restore(reader, abstract, step)
      assert restored is not None  # it is one of the steps there
      stored, _ = restored
      for name, weight in zip(names, row, strict=True):
        total = add(total, np.float32(weight), stored[name])
  out = epath.Path(f'{workdir}_std{std:g}')
  config_file.open_workdir(out, config)
  with checkpoint.manager(out, config.checkpoint.keep) as writer:
    checkpoint.save(
      writer, int(state.step), dataclasses.replace(state, averages=state.averages | {'ema': total})
    )
  logging.info(
    '%s: step %d, the average of length %g from %d snapshots; evaluate it with --workdir=%s',
    out,
    int(state.step),
    std,
    len(steps),
    out,
  )
  return 0
