"""--mode=likelihood: what every example costs, as a table, and where in it; two sets compared."""

import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vdm import build, cards, data
from vdm.build.state import named_params
from vdm.configs import default
from vdm.data.settle import as_found
from vdm.errors import require, within
from vdm.evaluation import likelihood, ode, separation
from vdm.evaluation.bound import TERMS
from vdm.evaluation.likelihood import LogProb
from vdm.evaluation.plots import plot_maps
from vdm.evaluation.study import Study, batches, ends_of, write_card
from vdm.sampling.folder import open_samples
from vdm.system import files, parallel
from vdm.system.progress import Progress
from vdm.workdir import config_file, integrity
from vdm.workdir.load import Run

IN_FILES = ('folder', 'arrays', 'huggingface')  # kinds of data without splits of their own


class Table(NamedTuple):
  """Holds what each of the N examples of a data set costs."""

  found: LogProb
  num_dims: np.ndarray  # [N] that count
  label: np.ndarray  # [N]; 0 where there are no classes

  def rows(self, metric: str, nats_per_unit: float) -> dict[str, np.ndarray]:
    """Returns the columns of the table: nats, then `metric` with its error and its terms."""
    value, stderr = self.found.value, self.found.stderr
    per_dim = self.num_dims * nats_per_unit
    columns = {
      'index': np.arange(len(value)),
      'label': self.label,
      'log_prob': value,
      'log_prob_stderr': stderr,
      metric: -value / per_dim,
      'stderr': stderr / per_dim,
    }
    if self.found.terms is not None:
      terms = self.found.terms / per_dim[:, None]
      columns |= {name: terms[:, number] for number, name in enumerate(TERMS)}
    return columns


def run(of: Run, out: pathlib.Path | None = None) -> int:
  """Runs --mode=likelihood as config.likelihood says, by the bound or the ODE (config.eval).

  All is in likelihood/<name> of `out`, the workdir unless it is given: a table and a card of each
  data set, maps, and histograms of two sets. What was scored is not scored again.
  """
  config, model = of.config, of.model
  settings, how, takes = config.eval, config.likelihood, model.takes
  rule = "'schedule', the model's own, in --mode=likelihood"
  own = settings.schedule.name
  require(own == 'schedule', 'config.eval.schedule.name', own, rule, '--mode=eval has others')
  step, unit = int(of.state.step), model.decoder.unit
  folder = config_file.out_folder(of.workdir, out) / 'likelihood'
  conditional = bool(takes.num_classes or takes.vector_size or takes.condition_shape)
  told = conditional and how.conditions == 'given'
  sets = [config.data, *other_set(config.data, how.against, told)]
  sources = [build.within_bounds(config.decoder, data.load(part, 'eval')) for part in sets]
  for kind in settings.likelihood.split(','):
    tables = []
    name = settings.ode.params if kind == 'ode' else settings.params.split(',')[-1]
    params = named_params(of.state, name)
    fingerprint = integrity.fingerprint(params)
    for source in sources:
      study = Study(model, of.mesh, source, folder, config.to_dict())
      dtype = ode.DTYPE if kind == 'ode' else model.dtype
      made_of = dict(kind=kind, params=name, step=step, fingerprint=fingerprint, dtype=dtype)
      place, table = make_scorer(study, settings, how, kind)(params, made_of)
      if kind == 'elbo' and how.maps:
        _write_maps(study, place, params, settings, how)
      if table is None:  # of all but the first process
        continue
      tables.append(table)
      _write(study, place, table, params, made_of, settings, how)
      mean = cards.plus_minus(*_mean(table, model.decoder.nats_per_unit))
      logging.info('%s: %s %s, %d images', place, mean, unit, len(table.label))
      if len(tables) == 2:
        _compare(study, place, tables, sources)
  return 0


def other_set(settings: ConfigDict, against: ConfigDict, told: bool) -> list[ConfigDict]:
  """Returns config.data of the data set that config.likelihood.against names; [] if there is none.

  Args:
    settings: config.data of the model.
    against: config.likelihood.against.
    told: whether the model is told of each example's conditions.

  Raises:
    ValueError: there is no such set, its images have another shape, or no conditions for the model.
  """
  if not against.name:
    return []
  rule, remedy = "'none' beside data with other conditions", 'a model with label_dropout knows it'
  require(not told, 'config.likelihood.conditions', 'given', rule, remedy)
  other = settings.copy_and_resolve_references().unlock()
  other.update(name=against.name, path=against.path, dir=against.dir or settings.dir)
  # what the model's data have in labels and vectors is nothing to this set
  usual = default.get_config().data
  other.update(num_classes=usual.num_classes, embedding_size=usual.embedding_size)
  # all of a file may be scored: none of it need be for training
  other.update(
    train_split='' if against.name in IN_FILES else 'train', eval_split=against.split, as_found=True
  )
  with within('config.likelihood.against'):
    other = as_found(other).unlock()
    shapes = [tuple(part.image_shape) for part in (settings, other)]
    rule, remedy = f'a set of images {shapes[0]}, not {shapes[1]}', 'name another'
    require(shapes[0] == shapes[1], 'name', against.name, rule, remedy)
  other.num_values = settings.num_values
  return [other.lock()]


def make_scorer(
  of: Study, settings: ConfigDict, how: ConfigDict, kind: str
) -> Callable[[Any, dict[str, Any]], tuple[pathlib.Path, Table]]:
  """Returns (params, what the scores are of) -> the folder, and the table of all examples.

  Batches are kept as they are done, and are not scored again.

  Args:
    of: the study; its folder is where tables go.
    settings: config.eval.
    how: config.likelihood.
    kind: 'elbo' or 'ode'.
  """
  model, source = of.model, of.source
  draws, steps, seed = how.draws, settings.num_timesteps, settings.seed
  solver = ode.OdeSettings(**settings.ode)
  if kind == 'elbo':
    compiled = likelihood.jit_step(model, of.mesh, draws, steps)
    estimate = lambda params, batch: likelihood.nats_of(
      [parallel.on_host(compiled(params, batch, seed))]
    )
  else:
    solve = ode.jit_step(model, of.mesh, solver)
    estimate = lambda params, batch: ode.nats_of(solve, params, [batch], solver, draws, seed)

  def score(params, made_of):
    total = data.num_eval_images(source, settings.max_images)
    manifest = made_of | {
      'data': source.identity,
      'num_images': total,
      'batch_size': settings.batch_size,
      'format': 'npz',
      'draws': draws,
      'seed': seed,
      'num_timesteps': steps,
      'conditions': how.conditions,
      **({'ode': solver._asdict()} if kind == 'ode' else {}),
    }
    folder = of.folder / _name(manifest)
    missing = set(open_samples(folder / 'parts', manifest))
    starts = range(0, total, settings.batch_size)
    hosts = zip(starts, _without_conditions(of, settings, how), strict=True)
    todo = ((start, batch) for start, batch in hosts if start in missing)
    if len(missing) < len(starts):
      logging.info('%d of %d batches are scored already', len(starts) - len(missing), len(starts))
    tell = Progress('', 'images')
    for start, batch in todo:
      found = estimate(params, parallel.to_devices(of.mesh, batch))
      bad = found.value[~np.isfinite(found.value)]
      if bad.size:
        raise FloatingPointError(f'the {kind} of an example from {start} on is {bad[0]} nats.')
      if jax.process_index() == 0:
        _write_part(folder, start, found, source, model)
      tell(min(total, start + settings.batch_size), total)
    return folder, (_read_parts(folder, draws, kind) if jax.process_index() == 0 else None)

  return score


def _name(manifest: dict[str, Any]) -> str:
  """Returns a short name of a table, another for another table."""
  identity, settings = manifest['data'], {k: v for k, v in manifest.items() if k != 'fingerprint'}
  split = re.sub(r'\W+', '-', identity['split']).strip('-') or 'all'
  parts = (identity['name'], split, manifest['params'], manifest['kind'])
  counts = f'{manifest["num_images"]}x{manifest["draws"]}'
  return '_'.join([*parts, counts, files.short_hash(settings), f'step{manifest["step"]:08d}'])


def _without_conditions(of: Study, settings: ConfigDict, how: ConfigDict) -> Iterator[data.Batch]:
  """Returns this host's batches, with what stands for no conditions if that is asked for."""
  for batch in batches(of.source, settings):
    if how.conditions == 'none':
      nothing = of.model.takes.nothing(len(batch['image']), of.model.image_shape)
      batch |= {name: np.asarray(v) for name, v in nothing.items() if name != 'valid'}
    yield batch


def _write_part(
  folder: pathlib.Path, start: int, found: LogProb, source: data.Source, model: build.Model
):
  """Writes what the examples of one batch have."""
  rows = source.fetch(start + np.arange(found.estimates.shape[1]))
  whole = math.prod(model.image_shape)
  num_dims = np.full(len(rows['label']), whole)
  if 'valid' in rows:
    num_dims = rows['valid'].reshape(len(num_dims), -1).sum(axis=1) * model.image_shape[-1]
  arrays = dict(estimates=found.estimates, num_dims=num_dims, label=rows['label'])
  arrays |= {} if found.terms is None else {'terms': found.terms}
  content = files.content(lambda file: np.savez_compressed(file, **arrays))
  files.write(folder / 'parts' / f'{start:08d}.npz', content)


def _read_parts(folder: pathlib.Path, draws: int, kind: str) -> Table:
  """Returns the table of all batches."""
  remedy = 'remove it to have it scored again'
  parts = [files.read_arrays(path, remedy) for path in sorted((folder / 'parts').glob('[0-9]*'))]
  joined = {
    name: np.concatenate([part[name] for part in parts], axis=int(name == 'estimates'))
    for name in parts[0]
  }
  alike = likelihood.STRATA if kind == 'elbo' else draws
  found = LogProb(joined['estimates'], alike, joined.get('terms'))
  return Table(found, joined['num_dims'], joined['label'])


def _mean(table: Table, nats_per_unit: float) -> tuple[float, float | None]:
  """Returns the mean over examples per dimension, and its error for these examples."""
  per_dim = table.num_dims * nats_per_unit
  error = float(np.linalg.norm(table.found.stderr / per_dim) / len(per_dim))
  return float((-table.found.value / per_dim).mean()), None if math.isnan(error) else error


def _write(
  of: Study,
  folder: pathlib.Path,
  table: Table,
  params: Any,
  made_of: dict[str, Any],
  settings: ConfigDict,
  how: ConfigDict,
):
  """Writes the table as CSV and NPZ, and its mean as a card."""
  decoder = of.model.decoder
  columns = table.rows(decoder.metric, decoder.nats_per_unit)
  text = {k: [f'{v:.6g}' if v.dtype.kind == 'f' else v for v in c] for k, c in columns.items()}
  files.write_table(folder / 'table.csv', tuple(text), zip(*text.values(), strict=True))
  arrays = columns | {'estimates': table.found.estimates, 'num_dims': table.num_dims}
  files.write(folder / 'table.npz', files.content(lambda file: np.savez(file, **arrays)))
  value, stderr = _mean(table, decoder.nats_per_unit)
  steps, count = settings.num_timesteps, len(table.label)
  time_of = f'discrete-time ELBO, T = {steps}' if steps else 'continuous-time ELBO'
  fields = {
    'value': value,
    **cards.error_fields(value, stderr, count * table.found.dof),
    'bound': time_of if made_of['kind'] == 'elbo' else ode.title(ode.OdeSettings(**settings.ode)),
    'stderr_over': 'draws',
    'dtype': made_of['dtype'],
    'num_images': count,
    'draws_per_image': how.draws,
    'conditions': how.conditions,
  }
  write_card(of, folder / 'card.json', params, made_of['params'], made_of['step'], fields)


def _write_maps(
  of: Study, folder: pathlib.Path, params: Any, settings: ConfigDict, how: ConfigDict
):
  """Writes the diffusion term by dimension of the first examples: NPZ, and a picture beside them.

  It is in the likelihood's unit, bits or nats, and adds up to the term.
  """
  few = settings.copy_and_resolve_references().unlock()
  count = few.max_images = min(how.maps, data.num_eval_images(of.source, settings.max_images))
  steps, intervals = settings.num_timesteps, how.intervals
  compiled = likelihood.jit_step(of.model, of.mesh, how.draws, steps, intervals)
  parts = []
  for batch in _without_conditions(of, few, how):
    part = parallel.on_host(compiled(params, parallel.to_devices(of.mesh, batch), settings.seed))
    parts.append(part['maps'][part['mask'] > 0])
  if jax.process_index():
    return
  maps = np.concatenate(parts) / of.model.decoder.nats_per_unit  # [N intervals *spatial C]
  images = of.source.fetch(np.arange(count))['image']
  high, low = ends_of(of.model, params)
  edges = np.linspace(high, low, intervals + 1)
  arrays = dict(images=images, maps=maps, edges=edges)
  path = folder / f'maps_{count}x{intervals}.npz'
  files.write(path, files.content(lambda file: np.savez_compressed(file, **arrays)))
  if len(of.model.image_shape) != 3:
    logging.info('%s has the maps; there is no picture of fields on other than two axes', path)
  else:
    unit, pixels = of.model.decoder.unit.partition('/')[0], of.model.decoder.to_pixels(images)
    if not is_picture(of.model.image_shape):  # grey, as maps are of all channels together
      pixels = pixels.mean(axis=-1, keepdims=True).astype(np.uint8)
    plot_maps(pixels, maps.sum(axis=-1), edges, unit, path.with_suffix('.png'))


def is_picture(shape: tuple[int, ...]) -> bool:
  """Returns whether a PNG file and a plot have room for an example: two axes, 1 or 3 channels."""
  return len(shape) == 3 and shape[-1] in (1, 3)


def _compare(
  of: Study, folder: pathlib.Path, tables: list[Table], sources: list[data.Source]
) -> None:
  """Writes how well a threshold on the likelihood tells the examples of two sets apart.

  Where they are pictures, so with the length of their PNG taken off: what is left is not low for a
  picture that is merely simple (Serra et al. 2020, arXiv 1909.11480).
  """
  decoder, identities = of.model.decoder, [source.identity for source in sources]
  # of what lies in files the name of the file or folder, which comes second
  in_files = [identity['name'] in IN_FILES for identity in identities]
  names = [
    identity['full_name'].split('/')[i] for identity, i in zip(identities, in_files, strict=True)
  ]
  per_dim = [table.num_dims * decoder.nats_per_unit for table in tables]
  costs = [-table.found.value / dims for table, dims in zip(tables, per_dim, strict=True)]
  scores = {'-log p': costs}
  if not decoder.is_density and is_picture(of.model.image_shape):
    scores['-log p less the length of a PNG'] = [
      cost - separation.png_bits(source, len(cost), decoder.to_pixels) / table.num_dims
      for cost, source, table in zip(costs, sources, tables, strict=True)
    ]
  found = separation.write(folder, scores, names, decoder.unit)
  for name, (value, error) in found.items():
    logging.info('%s: AUROC %s', name, cards.plus_minus(value, error))
