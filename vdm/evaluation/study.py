"""A study says what is evaluated, on what, and where its cards go."""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build, cards
from vdm.data import Batch, Source, eval_batches
from vdm.diffusion.gaussian import end_levels


class Study(NamedTuple):
  """Holds a model with the data that it is evaluated on."""

  model: build.Model
  mesh: Mesh
  source: Source  # the evaluation split
  folder: pathlib.Path  # of cards, plots, samples and tables
  config: dict[str, Any]  # the whole config as plain values, for cards


def batches(source: Source, settings: ConfigDict) -> Iterator[Batch]:
  """Returns this host's rows of the batches of an evaluation.

  Args:
    source: of the images.
    settings: config.eval.
  """
  return eval_batches(
    source,
    batch_size=settings.batch_size,
    max_images=settings.max_images,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def ends_of(model: build.Model, params: Any) -> tuple[float, float]:
  """Returns log_snr_max and log_snr_min as numbers."""
  high, low = jax.device_get(end_levels(model.schedule(params)))
  return float(high), float(low)


def write_card(of: Study, path: pathlib.Path, params: Any, name: str, step: int, fields: dict):
  """Writes the number card of a likelihood.

  Args:
    of: the study.
    path: of the card.
    params: the parameters that were evaluated.
    name: theirs, such as 'ema'.
    step: of training.
    fields: what is particular to this kind of evaluation, with 'value' and 'num_images', and with
      'log_snr_max', 'log_snr_min' and 'dtype' where they are not the parameters' and the model's.
  """
  log_snr_max, log_snr_min = ends_of(of.model, params)
  settings, decoder = of.config['eval'], of.model.decoder
  unit = {'unit': 'nats/dim, density per unit of the data'} if decoder.is_density else {}
  cards.write(
    path,
    {
      'metric': decoder.metric,
      **unit,
      'decoder': of.config['decoder']['name'],
      'log_snr_max': log_snr_max,
      'log_snr_min': log_snr_min,
      'dtype': of.model.dtype,
      **fields,
      'whole_split': fields['num_images'] == of.source.identity['num_images'],
      'eval_batch_size': settings['batch_size'],
      'eval_seed': settings['seed'],
      'data': of.source.identity,
      'params': name,
      'step': step,
      'images_seen': step * of.config['train']['batch_size'],
      'config': of.config,
    },
  )
