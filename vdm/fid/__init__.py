"""Fréchet distances and their relatives between samples and real images.

mesh = parallel.make_mesh()
extractor = fid.make(config, mesh)            # refuses at once what is missing
reference = fid.of_config(config, extractor)
batches = fid.batches_of(arrays_of_images, extractor, config.fid.batch_size)
samples = fid.collect(extractor, batches, keep=config.fid.num_images)
fid.measure(samples, reference, extractor.label, config.fid.halves)  # {'fid': {'value', ...}}
"""

from vdm.fid.extractor import Extractor, make
from vdm.fid.metrics import card_fields, measure
from vdm.fid.network import Network
from vdm.fid.references import Reference, of_config, of_source, read, write
from vdm.fid.statistics import Gaussian, Statistics, fit, frechet_distance
from vdm.fid.streaming import Collected, batches_of, check_count, collect

__all__ = [
  'Collected',
  'Extractor',
  'Gaussian',
  'Network',
  'Reference',
  'Statistics',
  'batches_of',
  'card_fields',
  'check_count',
  'collect',
  'fit',
  'frechet_distance',
  'make',
  'measure',
  'of_config',
  'of_source',
  'read',
  'write',
]
