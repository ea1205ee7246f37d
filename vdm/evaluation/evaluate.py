"""One evaluation: of a state, what it costs in bits and what it looks like.

The bound, the ODE, distances of samples, and pictures are four evaluations of the same kind. Each
adds to what those before it found. Training runs those that its config asks for, --mode=eval its
own. What a person reads of it is one line; the rest is in TensorBoard, cards and plots.
"""

import dataclasses
import itertools
import pathlib
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build, cards, data
from vdm.build.state import TrainState, named_params
from vdm.evaluation import bound, distances, field_report, ode
from vdm.evaluation.bound import BitsPerDim
from vdm.evaluation.pictures import make_pictures, write_augmented
from vdm.evaluation.study import Study
from vdm.sampling.draw import make_sampler
from vdm.sampling.labels import Conditions, conditions_of
from vdm.sampling.picture import class_grid, flat_pictures, image_grid, save_png
from vdm.workdir import config_file
from vdm.workdir.load import Run


@dataclasses.dataclass(frozen=True)
class Result:
  """Holds what evaluations found of a state."""

  scalars: dict[str, float] = dataclasses.field(default_factory=dict)  # by TensorBoard's tag
  # uint8 [H W C], by TensorBoard's tag; on the first process alone
  pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  bounds: dict[str, BitsPerDim] = dataclasses.field(default_factory=dict)  # by name of parameters
  # bits or nats per dimension per unit of log-SNR by bin, and the ends of the bins, None: those of
  # training's schedule; by name
  curves: dict[str, tuple[np.ndarray, tuple[float, float] | None]] = dataclasses.field(
    default_factory=dict
  )
  said: dict[str, str] = dataclasses.field(default_factory=dict)  # by evaluation, for the log

  def plus(self, **found: dict) -> 'Result':
    """Returns a result that has all of this one, and `found`."""
    more = {name: getattr(self, name) | part for name, part in found.items()}
    return dataclasses.replace(self, **more)


Evaluation = Callable[[TrainState, Result], Result]  # the state, what was found before -> and now


def evaluate(
  state: TrainState, evaluations: Iterable[Evaluation], found: Result | None = None
) -> Result:
  """Returns what the evaluations find, one after the other, and logs it in a line.

  Cards and files are written.
  """
  result, begin = found or Result(), time.monotonic()
  for evaluation in evaluations:
    result = evaluation(state, result)
  if result.said:
    took = f'({time.monotonic() - begin:.0f} s)'
    logging.info('step %d: %s %s', int(state.step), '; '.join(result.said.values()), took)
  return result


def of_bound(of: Study, settings: ConfigDict) -> Evaluation:
  """Returns the evaluation of the variational bound of config.eval.params."""
  score, suffix = bound.make_scorer(of, settings), of.model.decoder.suffix

  def evaluation(state, found):
    for name in settings.params.split(','):
      result = score(named_params(state, name), name, int(state.step))
      values = {
        result.metric: result.value,
        **({} if result.stderr is None else {'stderr': result.stderr}),
        'loss': result.loss[0],
        'diffusion_cv': result.cv[0],
        'diffusion_cv_linear': result.cv[1],
        **{f'{term}_{suffix}': part['value'] for term, part in result.terms.items()},
      }
      found = found.plus(
        scalars={f'eval/{name}_{k}': v for k, v in values.items()},
        bounds={name: result},
        curves={name: (result.bins, result.ends)},
      )
    return found.plus(said={'bound': bound.sentence(found.bounds, of.source.identity)})

  return evaluation


def of_ode(of: Study, settings: ConfigDict) -> Evaluation:
  """Returns the evaluation of the likelihood by the ODE, of config.eval.ode.params."""
  score, name = ode.make_scorer(of, settings), settings.ode.params

  def evaluation(state, found):
    result = score(named_params(state, name), int(state.step))
    value = cards.plus_minus(result.value, result.stderr)
    text = f'{value} {of.model.decoder.unit} by the ODE on {result.num_images:,} images ({name})'
    scalars = {f'eval/{name}_ode_{of.model.decoder.metric}': result.value}
    return found.plus(scalars=scalars, said={'ode': text})

  return evaluation


def of_samples(
  of: Study,
  how: ConfigDict,
  draw: Callable,
  shown: int = 0,
  conditions: Conditions | None = None,
  scorer: Callable | None = None,
  scored: int = 0,
  every: int = 1,
) -> Evaluation:
  """Returns the evaluation of samples: a grid of them, and their distances from the data.

  Args:
    of: the study.
    how: config.sample.
    draw: a sampler (`sampling.draw.make_sampler`).
    shown: images in the grid; 0: none is made.
    conditions: of the images, for the names of the grid's columns, if their classes are any.
    scorer: of distances (`distances.make_scorer`), if any.
    scored: images that it takes.
    every: steps of training between two scores.
  """

  def evaluation(state, found):
    step, params = int(state.step), named_params(state, how.params)
    scores = scorer is not None and step % every == 0
    batches = draw(params, max(shown, scored if scores else 0))
    kept = list(itertools.islice(batches, -(-shown // how.batch_size)))
    if scores:
      parts = scorer(step, itertools.chain(kept, batches))
      scalars = {f'eval/{name}': part['value'] for name, part in parts.items()}
      found = found.plus(scalars=scalars, said={'distances': distances.sentence(parts)})
    if shown and jax.process_index() == 0:
      pixels = of.model.decoder.to_pixels(np.concatenate(kept)[:shown])
      pictures = flat_pictures(pixels)
      picture = image_grid(pictures)
      if conditions is not None:
        picture = class_grid(pictures, conditions(np.arange(shown))['label'])
      save_png(of.folder / 'samples' / f'step_{step:08d}.png', picture)
      found = found.plus(pictures={'samples': picture})
    return found

  return evaluation


def of_fields(of: Study, how: ConfigDict, draw: Callable, count: int, each: int) -> Evaluation:
  """Returns the evaluation of samples of fields: spectrum, histogram, coverage, and pictures.

  Args:
    of: the study.
    how: config.sample.
    draw: a sampler whose conditions are those of the first `count` examples, in turn.
    count: examples that the samples are set beside.
    each: samples of each example.
  """
  report = field_report.make_report(of, draw, count, each)

  def evaluation(state, found):
    scalars, pictures, text = report(named_params(state, how.params), int(state.step))
    scalars = {f'eval/{name}': value for name, value in scalars.items()}
    return found.plus(scalars=scalars, pictures=pictures, said={'fields': text} if text else {})

  return evaluation


def of_pictures(of: Study, params: str, *with_cards_of: pathlib.Path) -> Evaluation:
  """Returns the evaluation that plots: progressive denoising, loss, schedule, spectrum, history."""
  pictures = make_pictures(of, params, *with_cards_of)
  return lambda state, found: found.plus(pictures=pictures(state, found.curves))


def going_on(evaluation: Evaluation) -> Evaluation:
  """Returns an evaluation that says, with the traceback, what failed in it, and has found nothing.

  A picture that cannot be drawn is no reason to end a run.
  """

  def tried(state, found):
    try:
      return evaluation(state, found)
    except FloatingPointError:  # of the state, not of a plot
      raise
    except Exception:
      what, why = 'the plots could not be drawn; the run goes on', traceback.format_exc()
      logging.error('step %d: %s\n%s', state.step, what, why)
      return found

  return tried


def of_noisy_data(of: Study, settings: ConfigDict, weighting: str) -> Evaluation:
  """Returns the evaluation that reads the weighted loss as a mixture of bounds of noisy data."""

  def evaluation(state, found):
    if jax.process_index() == 0:
      for name, result in found.bounds.items():
        card = bound.card_path(of, settings, name, int(state.step))
        write_augmented(of.model.weighting, weighting, name, result, card)
    return found

  return evaluation


def in_training(
  config: ConfigDict, model: build.Model, mesh: Mesh, workdir: pathlib.Path
) -> Sequence[Evaluation]:
  """Returns the evaluations that training runs: the bound, samples and, if due, distances."""
  source = build.within_bounds(config.decoder, data.load(config.data, 'eval'))
  of = Study(model, mesh, source, workdir, config.to_dict())
  how, every = config.sample, config.fid.train_every_steps
  if model.decoder.is_density:
    shown = min(how.preview_images, len(of.source))
    draw = make_sampler(config, model, mesh, shown)
    samples = going_on(of_fields(of, how, draw, shown, 1))
    return of_bound(of, config.eval), samples, going_on(of_pictures(of, how.params))
  scorer, scored = None, config.fid.train_images if every else 0
  if every:
    scorer = distances.make_scorer(of, config.fid, how, config.data, scored)
  draw = make_sampler(config, model, mesh)
  has_classes = config.model.class_conditional
  conditions = conditions_of(how, config.data, True) if has_classes else None
  return (
    of_bound(of, config.eval),
    of_samples(of, how, draw, how.preview_images, conditions, scorer, scored, every or 1),
    going_on(of_pictures(of, how.params)),
  )


def run(run: Run, out: pathlib.Path | None = None) -> int:
  """Runs --mode=eval: scores a checkpoint as config.eval.likelihood says, and plots it.

  All that is made goes to `out`, the workdir unless given; the workdir's own cards are in the plots
  in any case.
  """
  config, model, mesh, state, workdir = run
  folder, settings = config_file.out_folder(workdir, out), config.eval
  source = build.within_bounds(config.decoder, data.load(config.data, 'eval'))
  of = Study(model, mesh, source, folder, config.to_dict())
  evaluations = []
  if 'elbo' in settings.likelihood.split(','):
    evaluations += [of_bound(of, settings), of_pictures(of, config.sample.params, workdir)]
    if settings.augmented_elbo:
      evaluations.append(of_noisy_data(of, settings, config.weighting.name))
  has_fields = model.decoder.is_density or bool(model.takes.condition_shape)
  if has_fields and settings.fields.num_examples:
    conditional = bool(model.takes.condition_shape or model.takes.vector_size)
    each = settings.fields.samples_per_example if conditional else 1
    shown = min(settings.fields.num_examples, len(of.source))
    draw = make_sampler(config, model, mesh, shown)
    evaluations.append(of_fields(of, config.sample, draw, shown, each))
  if settings.fid:
    scored, how = config.fid.num_images, config.sample
    scorer = distances.make_scorer(of, config.fid, how, config.data, scored)
    draw = make_sampler(config, model, mesh)
    evaluations.append(of_samples(of, how, draw, scorer=scorer, scored=scored))
  if 'ode' in settings.likelihood.split(','):
    evaluations.append(of_ode(of, settings))
  result = Result()
  for evaluation in evaluations:  # each is said when it is done: some take hours
    result = evaluate(state, [evaluation], dataclasses.replace(result, said={}))
  logging.info('cards and plots are in %s', folder)
  return 0
