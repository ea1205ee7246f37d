"""Fréchet distance and its relatives for samples of a model, each in a number card."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vdm import build, cards, fid
from vdm.diffusion.samplers import num_evaluations
from vdm.errors import require
from vdm.evaluation.study import Study


def make_scorer(
  of: Study, settings: ConfigDict, how: ConfigDict, data: ConfigDict, num_images: int
) -> Callable[[int, Iterable[np.ndarray]], dict[str, dict[str, Any]]]:
  """Returns score(step, batches) of samples [B H W C] -> {metric: {'value', 'low', ...}}.

  It takes the first `num_images` of them, and writes a card for each metric
  (`cards.path_of`): cards/<metric>_<params>_<sampler><steps>_<number>_<hash>_step<step>.json. What
  it lacks, weights or a reference, it says at once.

  Args:
    of: the study.
    settings: config.fid.
    how: config.sample, of the images.
    data: config.data, of the reference.
    num_images: to be scored.
  """
  drawn = {
    'params': how.params,
    'sampler': how.sampler.name,
    'network_evaluations': num_evaluations(
      build.sampler(how.sampler), how.num_steps, how.denoise_last
    ),
    'dtype': of.model.dtype,
    'config': of.config,
  }
  rule = '256 at most for distances of samples'
  remedy = 'set config.fid.train_every_steps=0 and config.eval.fid=False'
  require(data.num_values <= 256, 'config.data.num_values', data.num_values, rule, remedy)
  rule = 'False for distances of samples, whose features would be those of what does not count'
  require(not data.masked, 'config.data.masked', data.masked, rule, remedy)
  extractor = fid.make(settings, data, of.mesh)
  fid.check_count(settings, num_images, extractor)
  reference = fid.of_config(settings, data, extractor)
  of_no_image = ('num_images', 'preview_images', 'batch_size', 'format')
  made_of = {k: v for k, v in how.to_dict().items() if k not in of_no_image} | {
    'num_samples': num_images,
    'extractor': [extractor.name, extractor.sha256],
    'reference': reference.facts,
    'dtype': of.model.dtype,
  }

  def score(step, batches):
    rows = fid.batches_of(_first(batches, num_images), extractor, settings.batch_size)
    samples = fid.collect(extractor, rows, keep=num_images)
    found = fid.measure(samples, reference, extractor.label, settings.halves)
    for name, estimate in found.items():
      parts = name, how.params, f'{how.sampler.name}{how.num_steps}', num_images
      facts = fid.card_fields(name, estimate, extractor, reference) | drawn | {'step': step}
      cards.write(cards.path_of(of.folder, parts, made_of, step), facts)
    return found

  return score


def sentence(found: dict[str, dict[str, Any]]) -> str:
  """Returns 'FD-classifier 28.9 +- 2.9' or 'FID 3.1 +- 0.2': the distance that is best known."""
  name = next(iter(found))  # of features; spatial ones and the rest come after
  label = 'FID' if name == 'fid' else name.replace('fd_', 'FD-', 1)
  return f'{label} {cards.plus_minus(found[name]["value"], cards.at(found[name], "stderr"))}'


def _first(batches: Iterable[np.ndarray], count: int):
  """Yields uint8 images, `count` in all."""
  for images in batches:
    if count <= 0:
      return
    yield images[:count].astype(np.uint8)
    count -= len(images)
