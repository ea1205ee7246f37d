"""Blocks of a config as objects: schedule, weighting, sampler, threshold, grid."""

import inspect
from collections.abc import Callable

from ml_collections import ConfigDict

from vdm.diffusion.adaptive import Adaptive, adaptive
from vdm.diffusion.gaussian import Denoiser, Schedule, end_points
from vdm.diffusion.guidance import THRESHOLDS
from vdm.diffusion.samplers import SAMPLERS, Sampler
from vdm.diffusion.schedules import SCHEDULES, Learned
from vdm.diffusion.weightings import WEIGHTINGS, Weighting, shifted
from vdm.errors import require, within


def factory(table: dict, field: str, block: dict, **extra):
  """table[block['name']](**rest of block, **extra), with errors in the user's words."""
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


def schedule(config: ConfigDict) -> tuple[Learned, Adaptive | None]:
  """config.schedule as a Learned pair, and as an adaptive schedule where it is one.

  A fixed schedule has no parameters. An adaptive one is for training; all else sees the linear
  schedule between its end points.
  """
  table = SCHEDULES | {'adaptive': adaptive}
  built = factory(table, 'schedule', config.schedule.to_dict())
  if isinstance(built, Learned):
    return built, None
  if isinstance(built, Adaptive):
    fixed = SCHEDULES['linear'](config.schedule.log_snr_min, config.schedule.log_snr_max)
    return Learned(dict, lambda params: fixed), built
  return Learned(dict, lambda params: built), None


def chosen_weighting(config: ConfigDict) -> Weighting:
  """config.weighting as a function; beside any name, the leaf image_size applies `shifted`."""
  block = config.weighting.to_dict()
  if 'image_size' not in block:
    return factory(WEIGHTINGS, 'weighting', block)
  image_size = block.pop('image_size')
  weighting = factory(WEIGHTINGS, 'weighting', block)
  with within('config.weighting'):
    return shifted(weighting, image_size)


def _of_chosen(table: dict, block: ConfigDict) -> dict:
  """A block that lists the arguments of every factory, without those that are another's default.

  So `--config.sample.sampler.name=ddim` is enough, and what has no effect is still refused.
  """
  block = block.to_dict()
  if block['name'] not in table:
    return block
  taken = inspect.signature(table[block['name']]).parameters
  defaults = [
    (k, p.default)
    for factory in table.values()
    for k, p in inspect.signature(factory).parameters.items()
  ]
  return {k: v for k, v in block.items() if k == 'name' or k in taken or (k, v) not in defaults}


def sampler(config: ConfigDict) -> Sampler:
  """config.sample.sampler."""
  block = _of_chosen(SAMPLERS, config.sample.sampler)
  return factory(SAMPLERS, 'sample.sampler', block)


def threshold(config: ConfigDict) -> Callable[[Denoiser], Denoiser]:
  """config.sample.threshold."""
  block = _of_chosen(THRESHOLDS, config.sample.threshold)
  return factory(THRESHOLDS, 'sample.threshold', block)


def other_schedule(config: ConfigDict, field: str, own: Schedule) -> Schedule:
  """config.sample.grid or config.eval.schedule: the model's own, or a fixed one between its ends.

  `own` has to be concrete: the factories of schedules take floats.
  """
  part, leaf = field.split('.')
  block = config[part][leaf].to_dict()
  if block['name'] == 'schedule':
    return factory({'schedule': lambda: own}, field, block)
  most, least = map(float, end_points(own))
  if 'sigma_min' not in block:
    block = {'log_snr_max': most} | block
  if 'sigma_max' not in block:
    block = {'log_snr_min': least} | block
  built = factory(SCHEDULES, field, block)
  require(
    not isinstance(built, Learned),
    f'config.{field}.name',
    block['name'],
    'a schedule without parameters',
    "'schedule' is the model's own",
  )
  high, low = map(float, end_points(built))
  require(
    least - 0.01 <= low < high <= most + 0.01,
    f'config.{field}',
    config[part][leaf].to_dict(),
    f"within the model's log_snr, {least:.2f} to {most:.2f}, not {low:.2f} to {high:.2f}",
    'leave its limits out, or train with a wider config.schedule',
  )
  return built
