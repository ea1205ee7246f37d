"""Fréchet distances and their relatives between samples and real images.

mesh = parallel.make_mesh()
extractor = fid.make(config.fid, config.data, mesh)  # refuses at once what is missing
reference = fid.of_config(config.fid, config.data, extractor)
batches = fid.batches_of(arrays_of_images, extractor, config.fid.batch_size)
samples = fid.collect(extractor, batches, keep=config.fid.num_images)
fid.measure(samples, reference, extractor.label, config.fid.halves)  # {'fid': {'value', ...}}
"""

import importlib

ORDER = (
  'statistics',
  'inception',
  'weights',
  'network',
  'classifier',
  'extractor',
  'streaming',
  'images',
  'references',
  'metrics',
  '__init__',
  '__main__',
)

# These are loaded when asked for: the distances alone need neither a network nor a data set.
_PLACES = {
  'Extractor': 'vdm.fid.extractor',
  'make': 'vdm.fid.extractor',
  'card_fields': 'vdm.fid.metrics',
  'measure': 'vdm.fid.metrics',
  'Network': 'vdm.fid.network',
  'Reference': 'vdm.fid.references',
  'of_config': 'vdm.fid.references',
  'of_source': 'vdm.fid.references',
  'read': 'vdm.fid.references',
  'write': 'vdm.fid.references',
  'Gaussian': 'vdm.fid.statistics',
  'Statistics': 'vdm.fid.statistics',
  'fit': 'vdm.fid.statistics',
  'frechet_distance': 'vdm.fid.statistics',
  'Collected': 'vdm.fid.streaming',
  'batches_of': 'vdm.fid.streaming',
  'check_count': 'vdm.fid.streaming',
  'collect': 'vdm.fid.streaming',
}


def __getattr__(name: str):
  if name in _PLACES:
    return getattr(importlib.import_module(_PLACES[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *_PLACES])
