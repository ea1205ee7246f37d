"""What one looks at after an evaluation: samples, plots, the progressive picture."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vdm import build, cards, data
from vdm.build.state import named_params
from vdm.diffusion.gaussian import end_points
from vdm.diffusion.noisy_elbo import augmented
from vdm.diffusion.weightings import is_monotone
from vdm.evaluation import plots
from vdm.evaluation.bound import (
  NUM_BINS,
  BitsPerDim,
  card_path,
  evaluate_and_write,
  log_bounds,
  make_evaluator,
)
from vdm.evaluation.distances import log_distances, make_scorer
from vdm.evaluation.ode import evaluate_ode_and_write
from vdm.evaluation.pictures import NUM_LEVELS, make_denoise, picture_of, radial_power
from vdm.sampling.draw import make_sampler
from vdm.sampling.picture import image_grid, save_png
from vdm.system import files
from vdm.workdir import config_file
from vdm.workdir.load import read_run

NUM_PROGRESSIVE = 4  # images of the progressive picture
SPECTRUM_VALUES = 2**25  # of the images of the power spectrum: a thousand at 100 x 100


def make_look(
  config: ConfigDict, model: build.Model, mesh: Mesh, workdir: pathlib.Path
) -> Callable[..., dict[str, float]]:
  """look(state, writer, train_bins) scores the state, draws samples and plots, and writes them all.

  It returns the metrics by which checkpoints are ranked.
  """
  source = data.load(config.data, 'eval')
  evaluator = make_evaluator(config, model, mesh)
  sampler = make_sampler(config, model, mesh)
  pictures = make_pictures(config, model, mesh, source, workdir)
  score_images = config.fid.train_images if config.fid.train_every_steps else 0
  if score_images:
    scorer = make_scorer(config, model, mesh, workdir, score_images)

  def look(train_state, writer, train_bins):
    step = int(train_state.step)
    results = evaluate_and_write(config, model, evaluator, source, train_state, workdir)
    scalars = {
      f'eval/{name}_{k}': v
      for name, result in results.items()
      for k, v in (
        ('bits_per_dim', result.value),
        *([] if result.stderr is None else [('stderr', result.stderr)]),
        ('loss', result.loss[0]),
        ('diffusion_cv', result.cv[0]),
        ('diffusion_cv_linear', result.cv[1]),
        *((f'{term}_bpd', t['value']) for term, t in result.terms.items()),
      )
    }
    writer.write_scalars(step, scalars)
    log_bounds(results, step)
    params = named_params(train_state, config.sample.params)
    scores = score_images and step % config.fid.train_every_steps == 0
    num_images = max(config.sample.preview_images, score_images if scores else 0)
    images = np.concatenate(list(sampler(params, num_images)))
    if scores:
      found = scorer(step, [images])
      log_distances(found, config.sample.params, step)
      writer.write_scalars(step, {f'eval/{name}': part['value'] for name, part in found.items()})
    curves = {'train': train_bins} | {name: result.bins for name, result in results.items()}
    shown = pictures(train_state, curves)
    if jax.process_index() == 0:
      images = images[: config.sample.preview_images]
      shown['samples'] = image_grid(model.decoder.to_pixels(images))
      save_png(workdir / 'samples' / f'step_{step:08d}.png', shown['samples'])
      writer.write_images(step, {name: picture[None] for name, picture in shown.items()})
    return {'bits_per_dim': results[config.eval.params.split(',')[-1]].value}

  return look


def make_pictures(
  config: ConfigDict,
  model: build.Model,
  mesh: Mesh,
  source: data.Source,
  workdir: pathlib.Path,
  *with_cards_of: pathlib.Path,
) -> Callable[[Any, dict[str, np.ndarray]], dict[str, np.ndarray]]:
  """pictures(state, curves) -> name -> uint8 [H W C], all but the samples, written to the workdir.

  `curves` are bits/dim per unit of log-SNR by bin, for each set of parameters. The history is that
  of the cards of the workdir and of other ones, `with_cards_of`. To be called on every host; the
  first one writes.
  """
  denoise = make_denoise(model, mesh)
  most = SPECTRUM_VALUES // math.prod(model.image_shape)
  count = min(max(NUM_PROGRESSIVE, most), source.identity['num_images'])
  batch = source.fetch(np.arange(count))
  x = model.decoder.to_model(batch['image'])
  spectrum = radial_power(np.asarray(x))
  few = [batch[k][:NUM_PROGRESSIVE] for k in ('image', 'label')]

  def pictures(train_state, curves):
    params = named_params(train_state, config.sample.params)
    levels, z, x_hat = jax.device_get(denoise(params, *few))
    schedule = model.training_schedule(train_state.params, train_state.adaptive)
    log_snr = jax.device_get(schedule(jnp.linspace(0.0, 1.0, 101)))
    if jax.process_index():
      return {}
    columns = NUM_LEVELS
    picture = picture_of(z, x_hat, model.decoder)
    picture = image_grid(model.decoder.to_pixels(picture), columns)
    step, found = int(train_state.step), cards.series(*with_cards_of, workdir)
    path = workdir / 'samples' / f'progressive_{step:08d}.png'
    ends = log_snr[0], log_snr[-1]
    return {
      'progressive': plots.plot_progressive(picture, levels, len(few[0]), path),
      'diffusion_loss': plots.plot_bins(curves, ends, workdir / 'plots' / 'diffusion_loss.png'),
      'schedule': plots.plot_schedule(found, log_snr, workdir / 'plots' / 'schedule.png'),
      'spectrum': plots.plot_spectrum(*spectrum, levels, workdir / 'plots' / 'spectrum.png'),
      'history': plots.plot_history(found, workdir / 'plots' / 'bits_per_dim.png'),
    }

  return pictures


def run(
  config: ConfigDict,
  workdir: pathlib.Path,
  step: str = 'newest',
  out: pathlib.Path | None = None,
) -> int:
  """--mode=eval: scores a checkpoint as config.eval.likelihood says, and plots it.

  `step` chooses it as in `read_run`. All that is made goes to `out`, the workdir unless given;
  the workdir's own cards are in the plots in any case.
  """
  config, model, mesh, train_state = read_run(config, workdir, step)
  folder = config_file.out_folder(workdir, out)
  source = data.load(config.data, 'eval')
  step = int(train_state.step)
  if 'elbo' in config.eval.likelihood:
    evaluator = make_evaluator(config, model, mesh)
    results = evaluate_and_write(config, model, evaluator, source, train_state, folder)
    log_bounds(results, step)
    curves = {name: result.bins for name, result in results.items()}
    make_pictures(config, model, mesh, source, folder, workdir)(train_state, curves)
    if config.eval.augmented_elbo and jax.process_index() == 0:
      for name, result in results.items():
        ends = jax.device_get(end_points(model.schedule(named_params(train_state, name)))[::-1])
        card = card_path(config, source, name, step, folder)
        write_augmented(config, model, name, ends, result, card)
  if config.eval.fid:
    sampler = make_sampler(config, model, mesh)
    scorer = make_scorer(config, model, mesh, folder, config.fid.num_images)
    batches = sampler(named_params(train_state, config.sample.params), config.fid.num_images)
    log_distances(scorer(step, batches), config.sample.params, step)
  if 'ode' in config.eval.likelihood:
    result = evaluate_ode_and_write(config, model, mesh, source, train_state, folder)
    logging.info(
      '%s parameters, step %d, %d images: %s bits/dim by the ODE (over images; '
      '%.0f evaluations an image, at most %d)',
      config.eval.ode.params,
      step,
      result.num_images,
      cards.plus_minus(result.value, result.stderr),
      result.evaluations,
      result.max_evaluations,
    )
  return 0


def write_augmented(
  config: ConfigDict,
  model: build.Model,
  name: str,
  ends: np.ndarray,
  result: BitsPerDim,
  card: pathlib.Path,
):
  """config.eval.augmented_elbo: the weighted loss as a mixture of bounds, as a table and a plot.

  plots/augmented_elbo_<params>.png, and tables/augmented_elbo_*.csv, called like the evaluation's
  card. Its rows are bins of log-SNR: its ends, bits/dim spent there per unit, the weight of data
  with that much noise added, its bound at the upper end; all in bits/dim (VDM++ theorem 1).
  """
  workdir = card.parent.parent
  edges = np.linspace(*ends, NUM_BINS + 1)
  h = 2 * plots.filled(result.bins)
  prior = result.terms['prior']['value']
  table = augmented(model.weighting, *(jnp.asarray(a, jnp.float32) for a in (edges, h)), prior)
  table = jax.tree.map(np.asarray, table)
  monotone = is_monotone(model.weighting, *map(float, ends))
  title = f'{config.weighting.name}, {"" if monotone else "not "}monotone'
  plots.plot_augmented(edges, table, title, workdir / 'plots' / f'augmented_elbo_{name}.png')
  table_name = card.stem.replace('bits_per_dim', 'augmented_elbo', 1)
  path = workdir / 'tables' / f'{table_name}.csv'
  share = table.mass / table.total
  rows = zip(edges[:-1], edges[1:], h / 2, share, table.losses[1:], strict=True)
  header = ('log_snr_from', 'log_snr_to', 'bits_per_log_snr', 'weight', 'bound_with_noise')
  files.write_table(path, header, rows)
  logging.info(
    '%s parameters: weighted loss %.4f = %.3g x bound of the data (%.4f) + %.3g x bounds of data '
    'with noise (mean %.4f) - prior term %.4f, relative to the weight at the lowest log-SNR; %s',
    name,
    table.weighted / table.total,
    table.atom / table.total,
    table.losses[-1],
    share.sum(),
    table.parts.sum() / table.total / max(share.sum(), 1e-30),
    table.losses[0],
    title,
  )
