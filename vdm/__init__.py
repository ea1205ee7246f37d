"""Variational diffusion models in JAX: VDM (arXiv 2107.00630) and VDM++ (arXiv 2303.00848).

Importing this imports nothing else: what is asked of it is loaded then.
"""

import importlib

__version__ = '0.1.0'

_DOOR = 'Experiment', 'load', 'use_cores'  # in vdm.experiment
_PLACES = {
  name: f'vdm.diffusion.{name}'
  for name in (
    'adaptive averages continuous decoders elbo gaussian guidance heads noisy_elbo ode samplers '
    'schedules times weightings'
  ).split()
} | {
  'codec': 'vdm.codec',
  'data': 'vdm.data',
  'fields': 'vdm.evaluation.fields',
  'inference': 'vdm.evaluation.inference',
  'likelihood': 'vdm.evaluation.likelihood',
  'report': 'vdm.report',
}


def __getattr__(name: str):
  if name in _DOOR:
    return getattr(importlib.import_module('vdm.experiment'), name)
  if name in _PLACES:
    return importlib.import_module(_PLACES[name])
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *_PLACES, *_DOOR])
