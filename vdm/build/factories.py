"""Blocks of a config as objects: schedule, weighting, sampler, threshold, grid."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vdm.build.conditioning import Takes
from vdm.diffusion.adaptive import Adaptive, adaptive
from vdm.diffusion.continuous import censored, normal
from vdm.diffusion.decoders import Decoder, discrete
from vdm.diffusion.gaussian import Denoiser, Schedule, end_levels
from vdm.diffusion.guidance import THRESHOLDS
from vdm.diffusion.multivariate import learned_conditional, learned_multivariate
from vdm.diffusion.samplers import SAMPLERS, Sampler
from vdm.diffusion.schedules import SCHEDULES, Learned, linear
from vdm.diffusion.weightings import WEIGHTINGS, Weighting, shifted
from vdm.errors import require, within

# of training alone, or of more than end points: no grid of a sampler or of an evaluation
MORE_SCHEDULES = {
  'adaptive': adaptive,
  'learned_multivariate': learned_multivariate,
  'learned_conditional': learned_conditional,
}
NO_CONDITIONS = Takes()
DECODERS = {'discrete': discrete, 'normal': normal, 'censored': censored}


def factory(table: dict, field: str, block: dict, **extra):
  """Returns `table[block['name']](**rest, **extra)`, with errors in the user's words."""
  kwargs = {**block, **extra}
  name = kwargs.pop('name')
  require(
    name in table, f'config.{field}.name', name, f'one of {", ".join(table)}', 'choose one of these'
  )
  parameters = inspect.signature(table[name]).parameters
  unknown = [k for k in kwargs if k not in parameters]
  missing = [
    k
    for k, p in parameters.items()
    if p.default is p.empty
    and k not in kwargs
    and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
  ]
  if unknown or missing:
    problem = f'does not take {unknown[0]}' if unknown else f'needs {missing[0]}'
    raise ValueError(
      f'config.{field}.name={name!r} {problem}; it takes {", ".join(parameters) or "nothing"}: '
      f'set config.{field} = dict(name={name!r}, ...) in a config file.'
    )
  with within(f'config.{field}'):
    return table[name](**kwargs)


TIMES = np.linspace(0.0, 1.0, 257, dtype=np.float32)


def check_falls(field: str, name: str, levels: Schedule):
  """Refuses a schedule that has levels which are not finite, rises, or stays where it is.

  Where it falls slowly neighbours may be equal in float32.

  Args:
    field: whose name it is, such as 'schedule'.
    name: of the factory.
    levels: the schedule, concrete.
  """
  log_snr = np.asarray(levels(jnp.asarray(TIMES)), np.float64)
  wrong = ~np.isfinite(log_snr)
  with np.errstate(invalid='ignore'):
    wrong[1:] |= np.diff(log_snr, axis=0) > 0
    wrong[8:] |= log_snr[8:] >= log_snr[:-8]
  times = TIMES[wrong.reshape(len(TIMES), -1).any(axis=1)]
  rule = 'of a schedule that is finite and falls strictly from t = 0 to 1'
  remedy = f"it does not at t = {times[0]:.3g}, and VDM's gamma is -log_snr" if len(times) else ''
  require(not len(times), f'config.{field}.name', name, rule, remedy)


def check_weights(name: str, weighting: Weighting, log_snr_min: float, log_snr_max: float):
  """Refuses a weighting with values that are not finite, or negative, between the end points."""
  log_snr = np.linspace(log_snr_min, log_snr_max, 257, dtype=np.float32)
  w = np.asarray(weighting(jnp.asarray(log_snr)))
  bad = np.flatnonzero(~(np.isfinite(w) & (w >= 0)))
  rule = f'finite, and not negative, for log-SNR from {log_snr_min:g} to {log_snr_max:g}'
  remedy = f'it is {w[bad[0]]:g} at {log_snr[bad[0]]:.3g}' if len(bad) else ''
  require(not len(bad), 'config.weighting.name', name, rule, remedy)


def check_curves(
  block: ConfigDict, first: Callable[[], Schedule] | None, named: ConfigDict, weighting: Weighting
):
  """Refuses a schedule that does not fall, and a weighting that is negative or not finite.

  They are looked at as numbers, also where a model is built inside a function that is traced.

  Args:
    block: config.schedule.
    first: makes its schedule, with the parameters that it starts from if it is trained; None where
      levels differ between dimensions or examples, which is too much to look at.
    named: config.weighting.
    weighting: what it is.
  """
  with jax.ensure_compile_time_eval():
    if first:
      check_falls('schedule', block.name, first())
    check_weights(named.name, weighting, block.log_snr_min, block.log_snr_max)


def schedule(
  block: ConfigDict, image_shape: tuple[int, ...] = (), takes: Takes = NO_CONDITIONS
) -> tuple[Learned, Adaptive | None]:
  """Returns config.schedule as a Learned pair, and as an adaptive schedule if it is one.

  A fixed schedule has no parameters. An adaptive one is for training; all else sees the linear
  schedule between its end points.

  Args:
    block: config.schedule.
    image_shape: of an example, which only a multivariate schedule asks for.
    takes: the conditions of the network, on which only a conditional schedule depends.
  """
  of_data: dict[str, dict[str, Any]] = {
    'learned_multivariate': dict(shape=image_shape),
    'learned_conditional': dict(shape=image_shape, **takes.sizes()),
  }
  extra = of_data.get(block.name, {})
  stated = next((name for name in extra if name in block), None)
  remedy = 'it is that of config.data: leave it out'
  require(stated is None, f'config.schedule.{stated}', stated and block[stated], 'left out', remedy)
  require(
    block.name != 'learned_conditional' or takes.conditional,
    'config.schedule.name',
    block.name,
    'of a model that is given a class, a vector or a field',
    'set config.model.class_conditional=True, or try learned_multivariate',
  )
  built = factory(SCHEDULES | MORE_SCHEDULES, 'schedule', block.to_dict(), **extra)
  if isinstance(built, Learned):
    return built, None
  if isinstance(built, Adaptive):
    fixed = linear(block.log_snr_min, block.log_snr_max)
    return Learned(dict, lambda params: fixed), built
  return Learned(dict, lambda params: built), None


def weighting(block: ConfigDict) -> Weighting:
  """Returns config.weighting; beside any name, the leaf image_size applies `shifted`."""
  kwargs = block.to_dict()
  image_size = kwargs.pop('image_size', None)
  built = factory(WEIGHTINGS, 'weighting', kwargs)
  if image_size is None:
    return built
  with within('config.weighting'):
    return shifted(built, image_size)


def _of_chosen(table: dict, block: ConfigDict) -> dict:
  """Returns a block without the arguments that it leaves at another factory's default.

  So `--config.sample.sampler.name=ddim` is enough, and what has no effect is still refused.
  """
  if block.name not in table:
    return block.to_dict()
  taken = inspect.signature(table[block.name]).parameters
  defaults = [
    (k, p.default)
    for factory in table.values()
    for k, p in inspect.signature(factory).parameters.items()
  ]
  kept = lambda k, v: k == 'name' or k in taken or (k, v) not in defaults
  return {k: v for k, v in block.to_dict().items() if kept(k, v)}


def decoder(block: ConfigDict, data: ConfigDict, log_snr_max: float) -> Decoder:
  """Returns config.decoder; a continuous one has the data's statistics, 0 and 1 if not measured.

  Args:
    block: config.decoder.
    data: config.data.
    log_snr_max: of the untrained schedule.
  """
  chosen = _of_chosen(DECODERS, block)
  if block.name == 'discrete':
    return factory(DECODERS, 'decoder', chosen, num_values=data.num_values)
  channels = data.image_shape[-1]
  shift, scale = tuple(data.shift) or (0.0,) * channels, tuple(data.scale) or (1.0,) * channels
  given = dict(shift=shift, scale=scale, log_snr_max=log_snr_max)
  return factory(DECODERS, 'decoder', chosen, **given)


def sampler(block: ConfigDict) -> Sampler:
  """Returns config.sample.sampler."""
  return factory(SAMPLERS, 'sample.sampler', _of_chosen(SAMPLERS, block))


def threshold(block: ConfigDict) -> Callable[[Denoiser], Denoiser]:
  """Returns config.sample.threshold."""
  return factory(THRESHOLDS, 'sample.threshold', _of_chosen(THRESHOLDS, block))


def other_schedule(block: ConfigDict, field: str, own: Schedule) -> Schedule:
  """Returns the schedule of a block: the model's own, or a fixed one between its end points.

  A fixed one has scalar levels. Where the model's own is multivariate they are means over
  dimensions, for `multivariate.on_path`.

  Args:
    block: config.sample.grid or config.eval.schedule.
    field: 'sample.grid' or 'eval.schedule', for errors.
    own: the model's, concrete: the factories of schedules take floats.
  """
  kwargs = block.to_dict()
  if block.name == 'schedule':
    return factory({'schedule': lambda: own}, field, kwargs)
  most, least = map(float, end_levels(own))
  if 'sigma_min' not in kwargs:
    kwargs = {'log_snr_max': most} | kwargs
  if 'sigma_max' not in kwargs:
    kwargs = {'log_snr_min': least} | kwargs
  built = factory(SCHEDULES, field, kwargs)
  require(
    not isinstance(built, Learned),
    f'config.{field}.name',
    block.name,
    'a schedule without parameters',
    "'schedule' is the model's own",
  )
  check_falls(field, block.name, built)
  high, low = map(float, end_levels(built))
  require(
    least - 0.01 <= low < high <= most + 0.01,
    f'config.{field}',
    block.to_dict(),
    f"within the model's log_snr, {least:.2f} to {most:.2f}, not {low:.2f} to {high:.2f}",
    'leave its limits out, or train with a wider config.schedule',
  )
  return built
