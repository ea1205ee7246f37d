"""A table of what images take: this codec beside its bound, and beside other codecs."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vdm import cards, data
from vdm.build.state import named_params
from vdm.codec import container, curve, rivals
from vdm.codec.coder import compress, decompress
from vdm.codec.inputs import Inputs
from vdm.codec.network import count_values
from vdm.codec.shared import Settings
from vdm.evaluation.bound import BitsPerDim, jit_step, summarize
from vdm.evaluation.study import batches
from vdm.system import files, parallel
from vdm.system.progress import Progress
from vdm.workdir.load import Run

HEADER = ('codec', 'bits_per_dim', 'stderr', 'what')


class Length(NamedTuple):
  """Holds what images took at one T, beside the bound.

  Attributes:
    settings: of the code.
    net: bits/dim, without initial bits and the container.
    deviation: of `net` from one seed to another, sqrt(2 nats) as the sum of the steps' is.
    initial: bits/dim, once a stream.
    size: of the file, in bytes.
    bound: discrete-time, of the same images, per dimension that counts of them all, as `net` is.
    seconds: of compression and, if it was asked for, of decompression.
  """

  settings: Settings
  net: float
  deviation: float
  initial: float
  size: int
  bound: BitsPerDim
  seconds: tuple[float, ...]


def measure(
  run: Run,
  name: str,
  inputs: Inputs,
  settings: Settings,
  folder: pathlib.Path,
  draws: int,
  verify: bool = False,
) -> tuple[Length, curve.Along]:
  """Compresses images into <folder>/T<T>.vdm; returns their length, and rate and distortion.

  Args:
    run: of the model.
    name: of its parameters.
    inputs: images and conditions.
    settings: of the code.
    folder: for the file.
    draws: of the bound, for each image.
    verify: decompress it too.

  Raises:
    ValueError: what was decompressed are other images.
  """
  steps, told = settings.num_timesteps, inputs.told
  model, params = run.model, named_params(run.state, name)
  images = np.where(inputs.valid, inputs.images, inputs.images.dtype.type(0))  # what is coded
  along = curve.Along(images, model.decoder, inputs.valid)
  progress = Progress(f'T = {steps}, compress', 'levels')
  blob = compress(model, params, images, settings, **told, tell=progress, watch=along)
  seconds = [progress.seconds]
  files.write(folder / f'T{steps}.vdm', blob)
  if verify:
    progress = Progress(f'T = {steps}, decompress', 'levels')
    decoded = decompress(model, params, blob, **told, tell=progress)
    seconds.append(progress.seconds)
    if not np.array_equal(decoded, images):
      raise ValueError(f'{folder}/T{steps}.vdm decodes to other images; please report this.')
  header = container.read(blob, 'the file').header
  dims = inputs.num_dims
  return Length(
    settings=settings,
    net=header['net_bits'] / dims,
    deviation=math.sqrt(2 * header['net_bits'] * math.log(2)) / math.log(2) / dims,
    initial=32 * sum(header['initial_words']) / dims,
    size=len(blob),
    bound=_bound(run, params, inputs, steps, draws),
    seconds=tuple(seconds),
  ), along


def _bound(run: Run, params: Any, inputs: Inputs, num_timesteps: int, draws: int) -> BitsPerDim:
  """Returns the discrete-time bound of the images, per dimension that counts of them all.

  An evaluation's is the mean of what each image has per dimension of its own: under masks of other
  sizes it is another number.
  """
  settings = run.config.eval.copy_and_resolve_references().unlock()
  settings.update(num_timesteps=num_timesteps, draws=draws, max_images=0)
  settings.schedule = ConfigDict(dict(name='schedule'))  # the levels that are coded
  given = run.model.takes.given(run.model.image_shape, len(inputs.images), **inputs.told)
  source = data.of_arrays(inputs.images, 'codec', **given)
  step = jit_step(run.model, run.mesh, settings)
  counted = inputs.valid.reshape(len(inputs.images), -1).sum(axis=1)
  shares, parts = counted / counted.mean(), []
  for batch in batches(source, settings):
    on_devices = parallel.to_devices(run.mesh, batch)
    part = parallel.on_host(step(params, on_devices, len(source), settings.seed))
    own = shares[part['index']]
    scaled = {'terms': part['terms'] * own[:, None], 'loss': part['loss'] * own}
    parts.append(part | scaled)
  return summarize(parts)._replace(unit=run.model.decoder.unit)


def rows_of(lengths: Sequence[Length], inputs: Inputs) -> list[tuple[str, float, Any, str]]:
  """Returns the rows of the table, with `HEADER`; other codecs know no masks, and are left out."""
  rows: list[tuple[str, float, Any, str]] = []
  for length in lengths:
    label, bound = f'T = {length.settings.num_timesteps}', length.bound
    per_dim = 8 * length.size / inputs.num_dims
    rows += [
      (f'vdm, {label}', length.net, length.deviation, 'net'),
      (f'vdm, {label}', length.initial, None, 'initial bits'),
      (f'vdm, {label}', per_dim, None, f'file of {length.size:,} bytes'),
      (
        f'bound, {label}',
        bound.value,
        bound.stderr,
        f'net is {length.net / bound.value:.4f} of it',
      ),
    ]
  others = {} if 'mask' in inputs.told else rivals.lossless(inputs.images)
  for name, (each, together) in others.items():
    rows += [(name, each, None, 'a file for each image'), (name, together, None, 'one for all')]
  return rows


def write(
  folder: pathlib.Path,
  run: Run,
  lengths: Sequence[Length],
  alongs: Sequence[curve.Along],
  inputs: Inputs,
  name: str,
) -> str:
  """Writes report.csv, report.json and, of `alongs`, rate_distortion.csv and .png.

  Returns:
    the table, to be printed.
  """
  images = inputs.images.astype(run.model.decoder.dtype)  # as they were coded
  inputs = inputs._replace(images=images)
  rows = rows_of(lengths, inputs)
  files.write_table(folder / 'report.csv', HEADER, rows)
  facts = [
    length._asdict() | {'settings': length.settings._asdict(), 'bound': _plain(length.bound)}
    for length in lengths
  ]
  what = {'lengths': facts, 'num_images': len(inputs.images), 'environment': cards.environment()}
  files.write(folder / 'report.json', files.json_text(what))
  if alongs:
    points: curve.Points = {}
    for length, along in zip(lengths, alongs, strict=True):
      times = jnp.arange(length.settings.num_timesteps + 1) / length.settings.num_timesteps
      log_snr = run.model.schedule(named_params(run.state, name))(times)
      points[f'vdm, T = {length.settings.num_timesteps}'] = along.points(
        np.asarray(log_snr, np.float64)
      )
    if 'mask' not in inputs.told:
      points |= rivals.lossy(inputs.images, count_values(run.model.decoder))
    curve.write(folder, 'rate_distortion', points)
  return table(rows)


def _plain(bound: BitsPerDim) -> dict[str, Any]:
  return {'value': bound.value, 'stderr': bound.stderr, 'terms': bound.terms}


def table(rows: Sequence[tuple[str, float, Any, str]]) -> str:
  """Returns rows as a table in Markdown."""
  cells = [('', 'bits/dim', '')]
  cells += [(codec, cards.plus_minus(value, error), what) for codec, value, error, what in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = [
    '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |'
    for row in cells
  ]
  rule = '|' + '|'.join('-' * (width + 2) for width in widths) + '|'
  return '\n'.join([lines[0], rule, *lines[1:]])
