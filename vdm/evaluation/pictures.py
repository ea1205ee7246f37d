"""The progressive picture: what a model sees at each log-SNR, and what of the data is visible."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdm import build
from vdm.diffusion.decoders import Decoder
from vdm.diffusion.gaussian import end_points, fold_in, q_sample, standard_normal
from vdm.system import parallel

NUM_LEVELS = 9


def make_denoise(model: build.Model, mesh: Mesh) -> Callable[..., tuple[jax.Array, ...]]:
  """(params, images [N ...], labels [N]) -> log_snr [L], z [L N ...], x_hat [L N ...].

  L = NUM_LEVELS noise levels from log_snr_max to log_snr_min, the same noise at each.
  """

  def denoise(params, images, labels):
    x = model.decoder.to_model(images)
    eps = standard_normal(fold_in(jax.random.key(0), jnp.arange(len(x))), model.image_shape)
    ends = end_points(model.schedule(params))
    denoiser = model.denoiser(params, labels)

    def at(log_snr):
      log_snr = jnp.full(len(x), log_snr)
      z = q_sample(x, eps, log_snr)
      return z, denoiser(z, log_snr).x

    levels = jnp.linspace(ends[0], ends[1], NUM_LEVELS)
    return levels, *jax.lax.map(at, levels)

  return parallel.jit(denoise, mesh, out_shardings=parallel.replicated(mesh))


def picture_of(z: np.ndarray, x_hat: np.ndarray, decoder: Decoder) -> np.ndarray:
  """Two rows an image, z above x_hat, from data (left) to noise: data units [2N * L H W C]."""
  rows = np.stack([z, x_hat], axis=0)  # [2 L N H W C]
  rows = rows.transpose(2, 0, 1, *range(3, rows.ndim))
  return np.asarray(decoder.from_model(rows)).reshape(-1, *z.shape[2:])


def radial_power(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Frequencies in cycles per pixel, and the mean power of the images [N H W C] at each.

  White noise of variance s^2 has power s^2 at every frequency, and the powers of all frequencies
  have the mean square of the images as their mean. So the part of the data whose power is above
  e^-log_snr stands out from the noise of z / alpha. Rings are as wide as the lowest frequency of
  the longer side; the constant part is left out.
  """
  height, width = x.shape[1:3]
  power = (np.abs(np.fft.fft2(x, axes=(1, 2), norm='ortho')) ** 2).mean(axis=(0, 3))
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
  ring = np.round(frequency * max(height, width)).astype(int).ravel()
  count = np.bincount(ring)
  kept = np.flatnonzero(count)[1:]
  mean_power = np.bincount(ring, power.ravel())[kept] / count[kept]
  return np.bincount(ring, frequency.ravel())[kept] / count[kept], mean_power
