"""`gaussian_field`: periodic Gaussian random fields in 1, 2 or 3 dimensions, with all they imply.

The data set is made in memory, from numbers alone. A field u and its blurred, subsampled and noisy
observation y are jointly Gaussian, so that p(u), p(u | y), their entropies and the best denoiser
are known exactly: what a model learns is compared with the truth, not with another model.

On a grid of N pixels with the orthonormal Fourier transform, u_k = N^-1/2 sum_x u_x e^(-i k x), the
modes of u - mean are independent with variance P_k. The observation is y = H u + noise:

  blur multiplies mode k by T_k = exp(-2 pi^2 blur^2 |k|^2), |k| in cycles per pixel;
  subsampling keeps every n-th pixel of each axis. So modes that differ by multiples of 1/n cycles
  per pixel fold onto one: y_q = sum_(k = q) h_k u_k + noise, h_k = n^(-dims/2) T_k.

So y_q has the variance S_q = sum_(k = q) h_k^2 P_k + noise_std^2. Given y, modes that fold onto one
are coupled by a matrix of rank one: E[u_k | y] = g_k y_q and Cov(u_k, u_l | y) = P_k [k = l] -
g_k g_l S_q, with g_k = P_k h_k / S_q. All follows from that, mode by mode.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from vdm.diffusion.gaussian import Denoiser, Prediction, alpha, expand_to, sigma
from vdm.errors import confirm, require, within

SEED = 0  # of the data set: another seed is another data set
SPLITS = ('train', 'test')
CHUNK = 2**22  # values that are transformed at once


class Posterior(NamedTuple):
  """Holds p(u | y): its mean for each y, and spreads, which are the same for every y."""

  mean: np.ndarray  # [N *shape 1]
  mode_std: np.ndarray  # [*shape], sqrt(E |u_k - E[u_k | y]|^2)
  pixel_std: np.ndarray  # [*shape]


@dataclasses.dataclass(frozen=True)
class GaussianField:
  """Holds the distribution of a periodic Gaussian random field u and of its observation y.

  P_k is proportional to (cutoff^2 + |k|^2)^(exponent / 2), and its mean is std^2, the variance of a
  pixel. Densities are in nats, per data unit. All is float64 NumPy, but for what `draw` returns and
  `denoiser`.

  Attributes:
    shape: pixels per axis, of 1, 2 or 3 axes.
    exponent: slope of the spectrum; 0 is white noise, and the more negative the smoother.
    std: standard deviation of a pixel.
    mean: of all pixels.
    cutoff: cycles per pixel below which the spectrum is flat; 0: one cycle per longest axis.
    blur: width of the observation's Gaussian blur, its standard deviation in pixels; 0: none.
    noise_std: standard deviation of the observation's white noise.
    subsample: n where y has every n-th pixel of each axis.
  """

  shape: tuple[int, ...]
  exponent: float
  std: float
  mean: float = 0.0
  cutoff: float = 0.0
  blur: float = 0.0
  noise_std: float = 1.0
  subsample: int = 1

  def __post_init__(self):
    """Refuses what makes no density."""
    good = 1 <= len(self.shape) <= 3 and min(self.shape) > 0
    require(good, 'shape', self.shape, 'one to three positive numbers', 'give pixels per axis')
    for name in ('exponent', 'std', 'mean', 'cutoff', 'blur', 'noise_std'):
      value = getattr(self, name)
      require(math.isfinite(value), name, value, 'a number', 'correct it')
      if name in ('std', 'noise_std'):
        require(value > 0, name, value, 'positive', 'there is no density without it')
      if name in ('cutoff', 'blur'):
        require(value >= 0, name, value, 'at least 0', 'give 0 for none')
    good = self.subsample > 0 and not any(n % self.subsample for n in self.shape)
    rule = f'a positive number that divides all of {self.shape}'
    require(good, 'subsample', self.subsample, rule, 'give 1 to keep all pixels')

  @functools.cached_property
  def observed_shape(self) -> tuple[int, ...]:
    """Returns the spatial axes of y."""
    return tuple(n // self.subsample for n in self.shape)

  @functools.cached_property
  def frequency(self) -> np.ndarray:
    """Returns |k| in cycles per pixel, [*shape]."""
    axes = np.meshgrid(*map(np.fft.fftfreq, self.shape), indexing='ij')
    return np.sqrt(sum(axis**2 for axis in axes))

  @functools.cached_property
  def power(self) -> np.ndarray:
    """Returns P_k [*shape]."""
    cutoff = self.cutoff or 1 / max(self.shape)
    power = (cutoff**2 + self.frequency**2) ** (self.exponent / 2)
    return self.std**2 * power / power.mean()

  @functools.cached_property
  def transfer(self) -> np.ndarray:
    """Returns h_k [*shape]: what a mode of u contributes to the mode of y that it folds onto."""
    blur = np.exp(-2 * np.pi**2 * self.blur**2 * self.frequency**2)
    return self.subsample ** (-len(self.shape) / 2) * blur

  @functools.cached_property
  def observed_power(self) -> np.ndarray:
    """Returns S_q, the variance of the modes of y, [*observed_shape]."""
    return self._fold(self.transfer**2 * self.power) + self.noise_std**2

  @functools.cached_property
  def gain(self) -> np.ndarray:
    """Returns g_k [*shape]: E[u_k | y] = g_k y_q, for the mean 0."""
    return self.power * self.transfer / self._unfold(self.observed_power)

  def draw(self, rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns n fields u [n *shape 1] and their observations y [n *observed_shape 1], float32.

    Args:
      rng: np.random.Generator or RandomState.
      n: how many.
    """
    u, y = self.of_white(rng.standard_normal((n, self.num_white)))
    return u.astype(np.float32)[..., None], y.astype(np.float32)[..., None]

  @property
  def num_white(self) -> int:
    """Returns how many normal numbers a field and its observation are made of."""
    return math.prod(self.shape) + math.prod(self.observed_shape)

  def of_white(self, white: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns u [N *shape] and y [N *observed_shape] that white noise [N num_white] becomes."""
    pixels, noise = np.split(white, [math.prod(self.shape)], axis=1)
    modes = np.sqrt(self.power) * self._fft(pixels.reshape(-1, *self.shape))
    observed = self.mean + self._ifft(self._fold(self.transfer * modes))
    noise = noise.reshape(-1, *self.observed_shape)
    return self.mean + self._ifft(modes), observed + self.noise_std * noise

  def log_prob(self, u: np.ndarray) -> np.ndarray:
    """Returns log p(u) [N] in nats, for u [N *shape 1]."""
    return _log_normal(self._modes(u), self.power)

  def log_prob_given(self, u: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns log p(u | y) = log p(u) + log p(y | u) - log p(y), [N] in nats."""
    modes, observed = self._modes(u), self._modes(y)
    noise = observed - self._fold(self.transfer * modes)
    given = _log_normal(noise, np.full(self.observed_shape, self.noise_std**2))
    return _log_normal(modes, self.power) + given - _log_normal(observed, self.observed_power)

  def entropy(self) -> float:
    """Returns E[-log p(u)] in nats per dimension."""
    return 0.5 * (math.log(2 * math.pi) + 1 + float(np.log(self.power).mean()))

  def conditional_entropy(self) -> float:
    """Returns E[-log p(u | y)] in nats per dimension.

    A mode of y divides the determinant of the modes that fold onto it by S_q / noise_std^2.
    """
    told = np.log(self.observed_power / self.noise_std**2).sum() / (2 * math.prod(self.shape))
    return self.entropy() - float(told)

  def posterior(self, y: np.ndarray) -> Posterior:
    """Returns p(u | y) for y [N *observed_shape 1]."""
    mode_std = np.sqrt(self.power - self.gain**2 * self._unfold(self.observed_power))
    # The variance of u_x depends on where between the pixels of y it lies, and on nothing else.
    axes = np.meshgrid(*map(np.fft.fftfreq, self.shape), indexing='ij')
    explained = np.empty((self.subsample,) * len(self.shape))
    for offset in itertools.product(range(self.subsample), repeat=len(self.shape)):
      phase = sum(n * axis for n, axis in zip(offset, axes, strict=True))
      response = self._fold(self.gain * np.exp(2j * np.pi * phase))
      explained[offset] = (np.abs(response) ** 2 * self.observed_power).sum()
    variance = self.std**2 - np.tile(explained / math.prod(self.shape), self.observed_shape)
    return Posterior(self._posterior_mean(y)[..., None], mode_std, np.sqrt(variance))

  def posterior_samples(self, rng, y: np.ndarray, n: int) -> np.ndarray:
    """Draws n fields from p(u | y) for each y [N *observed_shape 1]: float32 [n N *shape 1].

    With u', y' from p(u, y), the sum u' + E[u | y] - E[u | y'] has the distribution p(u | y).
    """
    u, y_drawn = self.of_white(rng.standard_normal((n * len(y), self.num_white)))
    residual = u - self._posterior_mean(y_drawn[..., None])
    samples = self._posterior_mean(y) + residual.reshape(n, len(y), *self.shape)
    return samples.astype(np.float32)[..., None]

  def denoiser(self, shift: float, scale: float, y: Array | np.ndarray | None = None) -> Denoiser:
    """Returns (z, log_snr) -> Prediction with x_hat = E[x | z], or E[x | z, y], in float32.

    It is for the model's units x = (u - shift) / scale and z = alpha x + sigma eps, [B *shape 1],
    with one log_snr per example, [B]. With Q_k = P_k / scale^2 and v = Q / (alpha^2 Q + sigma^2),
    the modes less their mean are x_hat = alpha v z and eps_hat = sigma z / (alpha^2 Q + sigma^2).
    What y adds is r_q = y_q - sum_(k = q) h_k x_hat_k: x_hat changes by sigma^2 c r and eps_hat by
    -alpha sigma c r, with c_k = h_k v_k / (sum_(k = q) h_k^2 sigma^2 v_k + noise_std^2 / scale^2).

    Args:
      shift: of the model's units, the same for all pixels.
      scale: of the model's units.
      y: observations [B *observed_shape 1] in the data's units, if any.
    """
    axes = tuple(range(1, len(self.shape) + 1))
    power = jnp.asarray(self.power / scale**2, jnp.float32)[None]
    h = jnp.asarray(self.transfer, jnp.float32)[None]
    mean, noise = (self.mean - shift) / scale, self.noise_std / scale
    to_modes = lambda pixels: jnp.fft.fftn(pixels[..., 0], axes=axes, norm='ortho')
    to_pixels = lambda modes: jnp.fft.ifftn(modes, axes=axes, norm='ortho').real[..., None]
    y_modes = None if y is None else to_modes((jnp.asarray(y) - self.mean) / scale)

    def denoise(z, log_snr):
      z = to_modes(z - expand_to(alpha(log_snr), z) * mean)
      a, s = expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z)
      total = a**2 * power + s**2
      v = power / total
      x_hat, eps_hat = a * v * z, s / total * z
      if y_modes is not None:
        c = h * v / self._unfold(self._fold(h**2 * s**2 * v) + noise**2)
        told = c * self._unfold(y_modes - self._fold(h * x_hat))
        x_hat, eps_hat = x_hat + s**2 * told, eps_hat - a * s * told
      return Prediction(mean + to_pixels(x_hat), to_pixels(eps_hat))

    return denoise

  def _modes(self, u: np.ndarray) -> np.ndarray:
    """Returns the modes of u or of y, less the mean, [N *spatial]."""
    return self._fft(np.asarray(u, np.float64)[..., 0] - self.mean)

  def _posterior_mean(self, y: np.ndarray) -> np.ndarray:
    return self.mean + self._ifft(self.gain * self._unfold(self._modes(y)))

  def _fft(self, pixels: np.ndarray) -> np.ndarray:
    return np.fft.fftn(pixels, axes=range(-len(self.shape), 0), norm='ortho')

  def _ifft(self, modes: np.ndarray) -> np.ndarray:
    return np.fft.ifftn(modes, axes=range(-len(self.shape), 0), norm='ortho').real

  def _fold(self, modes):
    """Sums the modes of u [.. *shape] that fold onto one of y: [.. *observed_shape]."""
    before = modes.shape[: modes.ndim - len(self.shape)]
    split = [n for size in self.observed_shape for n in (self.subsample, size)]
    axes = range(len(before), len(before) + len(split), 2)
    return modes.reshape(*before, *split).sum(axis=tuple(axes))

  def _unfold(self, modes):
    """Gives each mode of u that of y [.. *observed_shape] which it folds onto: [.. *shape]."""
    sizes = zip(self.shape, self.observed_shape, strict=True)
    return modes[(..., *np.ix_(*(np.arange(n) % size for n, size in sizes)))]


def _log_normal(modes: np.ndarray, power: np.ndarray) -> np.ndarray:
  """Returns the log density [N] of pixels whose independent modes [N *spatial] have a variance."""
  terms = np.abs(modes) ** 2 / power + np.log(2 * np.pi * power)
  return -0.5 * terms.reshape(len(modes), -1).sum(axis=1)


def of(data) -> GaussianField:
  """Returns the field of config.data, whose block gaussian_field has its leaves but the shape."""
  block = dict(data.gaussian_field)
  names = [field.name for field in dataclasses.fields(GaussianField)][1:]
  for name, value in block.items():
    rule = f'one of {", ".join(names)}'
    require(name in names, f'config.data.gaussian_field.{name}', value, rule, 'correct its name')
  field, shape = 'config.data.image_shape', tuple(data.image_shape)
  good = 2 <= len(shape) <= 4 and min(shape) > 0 and shape[-1] == 1
  rule = 'pixels of one to three axes, and one channel'
  require(good, field, shape, rule, f'set --{field}=32,32,1, say')
  with within('config.data.gaussian_field'):
    return GaussianField(shape[:-1], **block)


def found(data) -> dict:
  """Returns the leaves of config.data as they are: the user chooses the shape, and whether y is.

  A condition_shape that is not empty asks for y, whatever it is.
  """
  condition = (*of(data).observed_shape, 1) if data.condition_shape else ()
  return dict(num_values=0, num_classes=0, embedding_size=0, condition_shape=condition)


def load(data, split: str):
  """Returns what `vdm.data.load` needs of a split: fetch, labels, full name, images, threads.

  Example i is a function of the parameters, the split's name and i: more examples begin with the
  same ones, and those of 'train' and 'test' are independent. Labels are 0.
  """
  name, num_images = data[f'{split}_split'], data[f'{split}_images']
  field = f'config.data.{split}_split'
  confirm(name in SPLITS, field, name, 'is no split of gaussian_field', "choose 'train' or 'test'")
  gaussian_field = of(data)
  u, y = _examples(gaussian_field, SPLITS.index(name), num_images)

  def fetch(indices):
    batch = {'image': u[indices], 'label': np.zeros(len(indices), np.int32)}
    return batch | ({'condition': y[indices]} if data.condition_shape else {})

  full_name = f'gaussian_field/{gaussian_field}'
  return fetch, lambda indices: np.zeros(len(indices), np.int32), full_name, num_images, 0


def exact(data, split: str) -> float:
  """Returns the mean exact -log p(u), or -log p(u | y), of a split, in nats per dimension."""
  field = of(data)
  u, y = _examples(field, SPLITS.index(data[f'{split}_split']), data[f'{split}_images'])
  log_prob = field.log_prob_given(u, y) if data.condition_shape else field.log_prob(u)
  return float(-log_prob.mean() / math.prod(field.shape))


def _examples(field: GaussianField, split: int, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns u [count *shape 1] and y [count *observed_shape 1] of a split, float32."""
  u = np.empty((count, *field.shape, 1), np.float32)
  y = np.empty((count, *field.observed_shape, 1), np.float32)
  rows = max(1, CHUNK // field.num_white)
  for start in range(0, count, rows):
    chunk = slice(start, min(start + rows, count))
    # RandomState, since its stream is frozen by numpy: the data must outlive this environment.
    seeds = ([SEED, split, i] for i in range(chunk.start, chunk.stop))
    white = [np.random.RandomState(seed).standard_normal(field.num_white) for seed in seeds]
    u[chunk, ..., 0], y[chunk, ..., 0] = field.of_white(np.stack(white))
  return u, y
