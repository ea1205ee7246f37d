"""Statistics of real images in an NPZ file: ours, which say what they are of; ADM's and EDM's."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vdm import data
from vdm.fid import images, statistics, weights
from vdm.fid.extractor import Extractor
from vdm.fid.network import Features
from vdm.fid.statistics import Gaussian
from vdm.fid.streaming import check_reference, collect
from vdm.system import files

REMEDY = 'fetch or make it again: python -m vdm.fid stats'

KEPT = 10_000  # random images whose features are kept, for KID, precision and recall
FOREIGN = {'features': ('mu', 'sigma'), 'spatial': ('mu_s', 'sigma_s')}  # as ADM and EDM call them


class Reference(NamedTuple):
  """Holds what samples are compared with.

  Attributes:
    gaussians: {'features': Gaussian, and 'spatial', if any}.
    rows: {'features': [n, D]} of some of the images; {} where the file has neither them nor images.
    facts: extractor, its sha256, number of images, identity of the data; in plain values.
  """

  gaussians: dict[str, Gaussian]
  rows: Features
  facts: dict


def of_source(source: data.Source, extractor: Extractor, batch_size: int) -> Reference:
  """Returns the reference of every image of a split or folder, once, as it is: no flips.

  They are read in a random order, always the same, so that the rows kept are drawn from all.
  """
  order = np.random.RandomState(0).permutation(len(source))  # by class, perhaps, as it is stored
  batches = data.eval_batches(
    dataclasses.replace(source, fetch=lambda numbers: source.fetch(order[numbers])),
    batch_size=extractor.batch_size(batch_size),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  found = collect(extractor, batches, KEPT)
  facts = {
    'extractor': extractor.name,
    'extractor_sha256': extractor.sha256,
    'num_images': found.statistics['features'].count,
    'data': source.identity,
  }
  gaussians = {kind: statistics.finish(part) for kind, part in found.statistics.items()}
  return Reference(gaussians, {'features': found.rows['features']}, facts)


def write(path: pathlib.Path, reference: Reference):
  """Writes it atomically, under the names that ADM's and EDM's have; the first process does."""
  if jax.process_index():
    return
  arrays = {f'rows_{name}': rows for name, rows in reference.rows.items()}
  for kind, gaussian in reference.gaussians.items():
    arrays |= dict(zip(FOREIGN[kind], gaussian, strict=True))
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  with part.open('wb') as file:
    np.savez(file, facts=np.array(json.dumps(reference.facts)), **arrays)
  os.replace(part, path)


def read(path: str, extractor: Extractor, batch_size: int) -> Reference:
  """Reads a reference file, or makes a reference of images.

  Ours is refused if it was made with another extractor. ADM's and EDM's do not say, and are taken
  for Inception's; if theirs has images (arr_0) beside its statistics, features of these serve KID,
  precision and recall.

  Raises:
    ValueError: it is not there, cannot be read, or is another extractor's.
  """
  path = str(files.path_of(path))
  file = pathlib.Path(path)
  if not file.is_file() or file.suffix != '.npz':
    return of_source(images.load(path), extractor, batch_size)
  arrays = _arrays(file)
  if 'mu' not in arrays:
    return of_source(images.load(path), extractor, batch_size)
  with files.reading(f'reference {file}', REMEDY):
    gaussians = {
      kind: Gaussian(*(np.asarray(arrays[key], np.float64) for key in keys))
      for kind, keys in FOREIGN.items()
      if all(key in arrays for key in keys)
    }
  if 'facts' in arrays:
    with files.reading(f'reference {file}', REMEDY):
      facts = dict(json.loads(str(arrays['facts'])))
      rows = {'features': arrays['rows_features']}
      facts['extractor'], facts['num_images'] = str(facts['extractor']), int(facts['num_images'])
  else:
    facts = {'extractor': weights.NAME, 'num_images': 0, 'data': {'name': str(file)}}
    rows = {}
  _require_same(path, facts, gaussians, extractor)
  if 'facts' not in arrays and 'arr_0' in arrays:
    rows = of_source(images.load(path), extractor, batch_size).rows
  return Reference(gaussians, rows, facts)


def _arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns all arrays of a file, but of images only their name."""
  with files.reading(f'reference {file}', REMEDY):
    return files.read_arrays(file, REMEDY, without=images.KEYS)


def _require_same(path: str, facts: dict, gaussians: dict[str, Gaussian], extractor: Extractor):
  """Refuses a reference that the extractor's features cannot be compared with."""
  theirs, remedy = facts['extractor'], 'make one with python -m vdm.fid stats, or name another file'
  ours = 'extractor_sha256' in facts
  if theirs != extractor.name and (ours or extractor.label != 'inception'):
    raise ValueError(
      f'reference {path} is of the extractor {theirs}, but config.fid.features '
      f'is {extractor.name}; {remedy}.'
    )
  if theirs != extractor.name:
    logging.warning(
      'reference %s is taken for one of the weights at hand, %s', path, extractor.name
    )
  for kind, gaussian in gaussians.items():
    size = extractor.num_features if kind == 'features' else len(gaussian.mean)
    if gaussian.mean.shape != (size,) or gaussian.covariance.shape != (size, size):
      raise ValueError(
        f'reference {path} has {FOREIGN[kind][0]} {gaussian.mean.shape} and {FOREIGN[kind][1]} '
        f'{gaussian.covariance.shape}, must be ({size},) and ({size}, {size}); {remedy}.'
      )


def of_config(settings, data_settings, extractor: Extractor) -> Reference:
  """Returns config.fid.reference; if that is '', the training split, kept for the next time.

  Args:
    settings: config.fid.
    data_settings: config.data.
    extractor: of the features.
  """
  if settings.reference:
    reference = read(settings.reference, extractor, settings.batch_size)
    check_reference(settings, settings.reference, reference.facts['num_images'], extractor)
    return reference
  source = data.load(data_settings, 'train')
  check_reference(
    settings, f'config.data.train_split={source.identity["split"]!r}', len(source), extractor
  )
  text = json.dumps([extractor.name, source.identity, 'rows of all'], sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:16]
  path = files.cache_folder() / f'reference_{digest}.npz'
  if _on_all_hosts(path.exists()):
    return read(str(path), extractor, settings.batch_size)
  reference = of_source(source, extractor, settings.batch_size)
  write(path, reference)
  return reference


def _on_all_hosts(there: bool) -> bool:
  if jax.process_count() == 1:
    return there
  return bool(multihost_utils.process_allgather(np.array(there)).all())
