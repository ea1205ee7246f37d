"""Samples of fields beside the data: spectra, histograms and, given conditions, coverage."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vdm.evaluation import field_plots, fields
from vdm.evaluation.study import Study
from vdm.system import files

NUM_SHOWN = 4  # rows of fields in a picture
# (params, number of samples) -> batches of samples, of which number k has the conditions of example
# k modulo that of examples
Draw = Callable[..., Any]


def make_report(
  of: Study, draw: Draw, num_examples: int, samples_each: int
) -> Callable[[Any, int], tuple[dict[str, float], dict[str, np.ndarray], str]]:
  """Returns (params, step) -> scalars and pictures by name, and a sentence; it writes pictures.

  The samples are set beside the first examples of the evaluation split. Where they have conditions
  and several samples each, these are draws from a posterior: their central intervals should cover
  the truth as often as they say, and their mean should correlate with it. Dimensions that a mask
  leaves out are the channel's mean in truth and samples alike, and count neither in the histogram
  nor in the coverage of pixels.

  Args:
    of: the study; call what is returned on every process, of which the first writes.
    draw: see `Draw`.
    num_examples: of the evaluation split, at most as many as it has.
    samples_each: of every example.
  """
  count = min(num_examples, len(of.source))
  batch = of.source.fetch(np.arange(count))
  truth = np.asarray(batch['image'], np.float32)
  valid = np.asarray(batch.get('valid', np.ones((*truth.shape[:-1], 1), bool)))
  counted = np.broadcast_to(valid, truth.shape)
  mean = np.mean(truth, tuple(range(truth.ndim - 1)), where=counted)
  truth = np.where(counted, truth, mean)
  has_waves = truth[0, ..., 0].size > 1
  periodic = 'zero' not in of.config['model'].get('padding', 'zero')
  field = batch.get('condition')

  def report(params, step):
    drawn = np.concatenate(list(draw(params, count * samples_each)))
    samples = np.asarray(drawn, np.float32).reshape(samples_each, count, *truth.shape[1:])
    samples = np.where(counted, samples, mean)
    if jax.process_index():
      return {}, {}, ''
    plotted, every = of.folder / 'plots', samples.reshape(-1, *truth.shape[1:])
    pictures = {
      'histogram': field_plots.plot_histogram(
        samples[:, valid[..., 0]], truth[None, valid[..., 0]], plotted / 'histogram.png'
      ),
    }
    scalars, text = {}, ''
    told = {k: v for k, v in batch.items() if k in ('condition', 'vector')}
    if has_waves:
      power = fields.compare_power(every, truth, periodic, samples_each if told else 0)
      scalars, table, text = _spectrum(power)
      header = ('cycles_per_pixel', 'channel', 'power_samples', 'power_data', 'ratio', 'stderr')
      files.write_table(of.folder / 'tables' / f'power_{step:08d}.csv', header, table)
      path = of.folder / 'samples' / f'step_{step:08d}.png'
      pictures['samples'] = field_plots.plot_slices(every[:NUM_SHOWN], path)
      path = plotted / 'power.png'
      pictures['power'] = field_plots.plot_power(power, path)
    if told and samples_each > 1:
      held, more = _coverage(samples, truth, valid)
      scalars, text = scalars | held, f'{text}; {more}' if text else more
    if told and samples_each > 1 and has_waves:
      predictions = {'one sample': samples[0], f'mean of {samples_each}': samples.mean(axis=0)}
      path = plotted / 'cross_correlation.png'
      pictures['correlation'] = field_plots.plot_cross_correlation(
        predictions, truth, path, periodic
      )
    if field is not None:
      shown = slice(NUM_SHOWN)
      pictures['conditional'] = field_plots.plot_rows(
        np.asarray(field[shown], np.float32),
        samples[:, shown],
        truth[shown],
        plotted / 'conditional.png',
      )
    return scalars, pictures, text

  return report


def _spectrum(table: dict[str, np.ndarray]) -> tuple[dict, list, str]:
  """Returns the farthest ratio of powers from one, the rows of a table, and a sentence.

  Args:
    table: of `fields.compare_power`.
  """
  ratio = table['power_ratio']
  bin_, channel = np.unravel_index(np.abs(ratio - 1).argmax(), ratio.shape)
  worst = ratio[bin_, channel]
  text = f'samples have {ratio.min():.2f} to {ratio.max():.2f} times the power of the data'
  columns = [table[name] for name in ('power_samples', 'power_data', 'power_ratio')]
  columns.append(table['power_ratio_stderr'])
  rows = [
    (k, c, *(column[i, c] for column in columns))
    for i, k in enumerate(table['frequency'])
    for c in range(ratio.shape[1])
  ]
  return {'power_ratio_worst': float(worst)}, rows, text


def _coverage(
  samples: np.ndarray, truth: np.ndarray, valid: np.ndarray
) -> tuple[dict[str, float], str]:
  """Returns how often intervals of the samples hold the truth, and a sentence."""
  found = fields.coverage(samples, truth, valid=valid)
  scalars, parts = {}, []
  for kind, share in (('pixels', found.pixels), ('modes', found.modes)):
    for level, value, error in zip(found.levels, share.value, share.stderr, strict=True):
      scalars[f'coverage_{kind}_{round(100 * level)}'] = float(value)
      parts.append(f'{kind} {level:.0%}: {value:.1%} ± {error:.1%}')
  return scalars, f'their central intervals hold the truth: {", ".join(parts)}'
