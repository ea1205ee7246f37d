"""Lossless codes for images: what the bound says they take, as bytes of a file.

exp, state = vdm.load('pretrained/digits')
params = vdm.build.named_params(state, 'ema')
blob = vdm.codec.compress(exp.model, params, images, vdm.codec.Settings(num_timesteps=200))
vdm.codec.decompress(exp.model, params, blob)  # the same images
"""

import importlib

ORDER = (
  'grid',
  'message',
  'network',
  'chain',
  'container',
  'shared',
  'coder',
  'inputs',
  'rivals',
  'curve',
  'report',
  '__init__',
  '__main__',
)

# These are loaded when asked for.
_PLACES = {
  'Incomplete': 'vdm.codec.coder',
  'compress': 'vdm.codec.coder',
  'decompress': 'vdm.codec.coder',
  'Settings': 'vdm.codec.shared',
}


def __getattr__(name: str):
  if name in _PLACES:
    return getattr(importlib.import_module(_PLACES[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *_PLACES])
