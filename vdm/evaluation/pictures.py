"""Pictures of an evaluation: what a model sees at each log-SNR, its loss, schedule and history."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from vdm import build, cards, data
from vdm.build.state import TrainState, named_params
from vdm.diffusion.decoders import Decoder
from vdm.diffusion.gaussian import end_levels, fold_in, q_sample, standard_normal
from vdm.diffusion.multivariate import on_path
from vdm.diffusion.noisy_elbo import augmented
from vdm.diffusion.weightings import Weighting, is_monotone
from vdm.evaluation import plots
from vdm.evaluation.bound import NUM_BINS, BitsPerDim
from vdm.evaluation.fields import power_spectrum
from vdm.evaluation.study import Study
from vdm.sampling.picture import flat_pictures, image_grid
from vdm.system import files, parallel

NUM_LEVELS = 9
NUM_PROGRESSIVE = 4  # images of the progressive picture
SPECTRUM_VALUES = 2**25  # of the images of the power spectrum: a thousand at 100 x 100


def x_of(decoder: Decoder, batch: data.Batch) -> jax.Array:
  """Returns images as the network sees them, 0 where a mask leaves them out."""
  x = decoder.to_model(jnp.asarray(batch['image']))
  return jnp.where(batch['valid'], x, 0) if 'valid' in batch else x


def make_denoise(model: build.Model, mesh: Mesh) -> Callable[..., tuple[jax.Array, ...]]:
  """Returns (params, batch of N) -> log_snr [L], z [L N ...], x_hat [L N ...].

  L = NUM_LEVELS noise levels lie from log_snr_max to log_snr_min; the noise is the same at each.
  """

  def denoise(params, batch):
    x = x_of(model.decoder, batch)
    eps = standard_normal(fold_in(jax.random.key(0), jnp.arange(len(x))), model.image_shape)
    conditions = data.conditions_of(batch)
    schedule, denoiser = model.schedule(params, conditions), model.denoiser(params, conditions)
    ends = end_levels(schedule)

    def at(log_snr):
      log_snr = jnp.full(len(x), log_snr)
      log_snr = on_path(schedule, log_snr) if model.multivariate else log_snr
      z = q_sample(x, eps, log_snr)
      return z, denoiser(z, log_snr).x

    levels = jnp.linspace(ends[0], ends[1], NUM_LEVELS)
    return levels, *jax.lax.map(at, levels)

  return parallel.jit(denoise, mesh, out_shardings=parallel.replicated(mesh))


def make_path(model: build.Model, mesh: Mesh) -> Callable[..., jax.Array]:
  """Returns (params, adaptive, batch) -> log_snr at 101 equal times, of the training schedule.

  It is [101], or [101 ...] of a multivariate schedule: the mean over the batch, if each example has
  its own.
  """

  def path(params, adaptive, batch):
    schedule = model.training_schedule(params, adaptive, data.conditions_of(batch))
    times = jnp.linspace(0.0, 1.0, 101)
    if model.multivariate:
      return jax.vmap(lambda t: schedule(t[None]).mean(axis=0))(times)
    return schedule(times)

  return parallel.jit(path, mesh, out_shardings=parallel.replicated(mesh))


def picture_of(z: np.ndarray, x_hat: np.ndarray, decoder: Decoder) -> np.ndarray:
  """Returns two rows per image, z above x_hat, from data (left) to noise, in data units.

  Their shape is [2N * L H W C].
  """
  rows = np.stack([z, x_hat], axis=0)  # [2 L N H W C]
  rows = rows.transpose(2, 0, 1, *range(3, rows.ndim))
  return np.asarray(jax.jit(decoder.from_model)(rows)).reshape(-1, *z.shape[2:])


def make_pictures(
  of: Study, params: str, *with_cards_of: pathlib.Path
) -> Callable[[TrainState, dict[str, Any]], dict[str, np.ndarray]]:
  """Returns pictures(state, curves) -> name -> uint8 [H W C], written to the study's folder.

  `curves` are those of `evaluate.Result`. Call it on every host; the first one writes.

  Args:
    of: the study.
    params: name of the parameters that are shown.
    *with_cards_of: other folders whose cards are in the history.
  """
  model, unit = of.model, of.model.decoder.unit
  denoise, path_at = make_denoise(model, of.mesh), make_path(model, of.mesh)
  most = SPECTRUM_VALUES // math.prod(model.image_shape)
  count = min(max(NUM_PROGRESSIVE, most), of.source.identity['num_images'])
  batch = of.source.fetch(np.arange(count))
  has_waves = math.prod(model.image_shape[:-1]) > 1
  if has_waves:
    frequency, power = power_spectrum(np.asarray(x_of(model.decoder, batch)))
    spectrum = frequency, power.mean(axis=(0, 2))
  few = {name: array[:NUM_PROGRESSIVE] for name, array in batch.items()}

  def pictures(state, curves):
    levels, z, x_hat = jax.device_get(denoise(named_params(state, params), few))
    each = jax.device_get(path_at(state.params, state.adaptive, few))
    log_snr = each.reshape(len(each), -1).mean(axis=1)
    if jax.process_index():
      return {}
    images = flat_pictures(model.decoder.to_pixels(picture_of(z, x_hat, model.decoder)))
    pairs = np.split(images, len(few['image']))  # two rows each
    blocks = {f'image {n}': image_grid(pair, NUM_LEVELS) for n, pair in enumerate(pairs, 1)}
    found = cards.series(*with_cards_of, of.folder)
    path = of.folder / 'samples' / f'progressive_{int(state.step):08d}.png'
    plotted, own = of.folder / 'plots', (log_snr[0], log_snr[-1])
    bins = {name: (each, ends or own) for name, (each, ends) in curves.items()}
    path_of = {}
    if model.multivariate:
      path_of['path'] = plots.plot_path(each, plotted / 'path.png')
    if has_waves:
      path_of['spectrum'] = plots.plot_spectrum(
        *spectrum, levels, plotted / 'spectrum.png', model.decoder.is_density
      )
    return path_of | {
      'progressive': plots.plot_progressive(blocks, levels, path),
      'diffusion_loss': plots.plot_bins(bins, plotted / 'diffusion_loss.png', unit),
      'schedule': plots.plot_schedule(found, log_snr, plotted / 'schedule.png'),
      'history': plots.plot_history(found, plotted / f'{model.decoder.metric}.png'),
    }

  return pictures


def write_augmented(
  weighting: Weighting,
  weighting_name: str,
  name: str,
  result: BitsPerDim,
  card: pathlib.Path,
):
  """Writes config.eval.augmented_elbo, the weighted loss as a mixture of bounds, as table and plot.

  The plot is plots/augmented_elbo_<params>.png, the table tables/augmented_elbo_*.csv, called like
  the evaluation's card. Its rows are bins of log-SNR: a bin's ends, what is spent there per unit,
  the weight of data with that much noise added, and L at the upper end, in the likelihood's unit
  (VDM++ theorem 1). L is the bound on data with that much noise, up to its entropy: the prior term,
  and the diffusion term from there to the noisy end. What is left of the data's own bound is the
  reconstruction.

  Args:
    weighting: of the loss.
    weighting_name: for the title.
    name: of the parameters.
    result: the bound's.
    card: path of the bound's card.
  """
  workdir = card.parent.parent
  ends = result.ends[::-1]
  edges = np.linspace(*ends, NUM_BINS + 1)
  h = 2 * plots.filled(result.bins)
  prior = result.terms['prior']['value']
  table = augmented(weighting, *(jnp.asarray(a, jnp.float32) for a in (edges, h)), prior)
  table = jax.tree.map(np.asarray, table)
  monotone = is_monotone(weighting, *map(float, ends))
  title = f'{weighting_name}, {"" if monotone else "not "}monotone'
  path = workdir / 'plots' / f'augmented_elbo_{name}.png'
  plots.plot_augmented(edges, table, title, path, result.unit)
  table_name = card.stem.replace(result.metric, 'augmented_elbo', 1)
  path = workdir / 'tables' / f'{table_name}.csv'
  share = table.mass / table.total
  rows = zip(edges[:-1], edges[1:], h / 2, share, table.losses[1:], strict=True)
  spent = f'{result.unit.partition("/")[0]}_per_log_snr'
  header = ('log_snr_from', 'log_snr_to', spent, 'weight', 'prior_and_diffusion')
  files.write_table(path, header, rows)
  logging.info(
    '%s parameters: weighted loss %.4f = %.3g x L of the data (%.4f) + %.3g x L of data with noise '
    '(mean %.4f) - prior term %.4f, relative to the weight at the lowest log-SNR; L is prior and '
    'diffusion terms; %s',
    name,
    table.weighted / table.total,
    table.atom / table.total,
    table.losses[-1],
    share.sum(),
    table.parts.sum() / table.total / max(share.sum(), 1e-30),
    table.losses[0],
    title,
  )
