"""Says which runs fit the memory of their devices, and what to change where one does not."""

import math
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from vdm.planning.chips import Chip
from vdm.planning.costs import Cost, Step, Target
from vdm.planning.table import gib


def fits(cost: Cost, chip: Chip) -> bool:
  """Returns whether a program of this memory runs; if that is not known it is taken to."""
  return cost.limit is None and (cost.memory or 0) <= chip.room


def advice(
  train: ConfigDict, model: ConfigDict, cost: Cost, where: Target, state_bytes: int
) -> str:
  """Returns by how much training exceeds the memory, and what to change, the cheapest first.

  Args:
    train: config.train.
    model: config.model.
    cost: of a step of training.
    where: the devices.
    state_bytes: of the state, per device.
  """
  limit, fewer = _excess(cost, where.chip)
  size, remedies, devices, parts = train.batch_size, [], where.mesh.size, train.microbatches
  if state_bytes > limit / 2 and where.mesh.shape['fsdp'] < devices:
    remedies.append(f'--config.parallel.fsdp={devices}')
  if size % (devices * parts * fewer) == 0:
    remedies.append(f'--config.train.microbatches={parts * fewer}')
  if 'remat' in model and not model.remat:
    remedies.append('--config.model.remat=True')
  if size >= fewer * devices * parts:
    smaller = size // (fewer * devices * parts) * devices * parts
    remedies.append(f'--config.train.batch_size={smaller}')
  return _too_much('training', cost, limit, remedies)


def advice_on_reading(step: Step, cost: Cost, where: Target) -> str:
  """Returns by how much evaluation or sampling exceeds the memory, and what to change."""
  (limit, fewer), devices, remedies = _excess(cost, where.chip), where.mesh.size, []
  if step.images >= fewer * devices:
    smaller = step.images // (fewer * devices) * devices
    remedies.append(f'--config.{step.name}.batch_size={smaller}')
  return _too_much({'eval': 'evaluation', 'sample': 'sampling'}[step.name], cost, limit, remedies)


def _excess(cost: Cost, chip: Chip) -> tuple[float, int]:
  """Returns the bytes there are, and the power of two that the images have to be divided by."""
  limit = cost.limit or chip.room
  return limit, 2 ** max(1, math.ceil(math.log2(cost.memory / limit)))


def _too_much(what: str, cost: Cost, limit: float, remedies: list[str]) -> str:
  found = ', '.join([*remedies, 'more devices, or larger ones'])
  return f'{what} takes {gib(cost.memory)} of {gib(limit)} per device; try {found}.'


class Fit(NamedTuple):
  """Holds a batch of training, and its memory."""

  size: int
  memory: float


def largest_batch(
  cost_of: Callable[[int], Cost], size: int, unit: int, fixed: float, chip: Chip, budget: int
) -> tuple[Fit | None, int]:
  """Returns the largest batch found to fit, `unit` times a power of two, and how many were tried.

  Args:
    cost_of: of training with a batch of this size.
    size: the first that is tried; the next follows from its memory, of which all but `fixed` is
      taken to grow with the batch.
    unit: what a batch has to be a multiple of.
    fixed: bytes that do not depend on the batch.
    chip: whose memory it is.
    budget: how many sizes may be tried.
  """
  best, tried = None, 0
  while tried < budget and size >= unit and (best is None or size > best.size):
    cost, tried = cost_of(size), tried + 1
    per_image = max(cost.memory - fixed, 1) / size
    room = (chip.room - fixed) / per_image / unit
    guess = unit * 2 ** math.floor(math.log2(room)) if room >= 1 else 0
    if fits(cost, chip):
      best, size = Fit(size, cost.memory), guess
    else:
      size = min(guess, size // (2 * unit) * unit)
  return best, tried


def search(
  cost_of: Callable[[int, bool], Cost],
  train: ConfigDict,
  remat: tuple[bool, ...],
  fixed: float,
  where: Target,
  budget: int,
) -> list[str]:
  """Returns lines that say the largest batch of training without and with remat.

  Args:
    cost_of: (batch size, remat) -> the cost of a step of training.
    train: config.train, whose batch is the first that is tried.
    remat: the choices, the config's own first; () for a network that has none.
    fixed: bytes per device that do not depend on the batch.
    where: the devices.
    budget: how many batches may be tried.
  """
  lines = []
  for choice in remat or (False,):
    left = budget if lines or not remat else -(-budget // 2)
    best, tried = largest_batch(
      lambda size, choice=choice: cost_of(size, choice),
      train.batch_size,
      where.mesh.size * train.microbatches,
      fixed,
      where.chip,
      left,
    )
    budget -= tried
    policy = f' with model.remat={choice}' if remat else ''
    found = f'{best.size}, {gib(best.memory)} per device' if best else 'none'
    lines.append(f'Largest batch found to fit{policy}: {found} ({tried} sizes tried).')
  return lines
