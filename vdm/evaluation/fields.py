"""Measures of continuous fields on 1, 2 or 3 axes: spectra, correlations, histograms, coverage.

All take arrays [N *spatial C], in the data's units, and are NumPy. Modes are those of the
orthonormal Fourier transform, so that white noise of variance s^2 has the power s^2 in each mode,
and the powers of all modes have the mean square of the pixels as their mean. Shells of |k| are as
wide as the lowest frequency of the longest axis; the constant mode is in none.
"""

from typing import NamedTuple

import numpy as np

from vdm.errors import require

CHUNK = 2**24  # values that are transformed at once
BAND = (16, 84)  # percentiles: one standard deviation to each side of a normal's mean


def power_spectrum(u: np.ndarray, periodic: bool = True) -> tuple[np.ndarray, np.ndarray]:
  """Returns k in cycles per pixel [K], and the mean power of each example in each shell, [N K C].

  Args:
    u: fields [N *spatial C].
    periodic: whether opposite borders meet. If not, the mean of each example is taken off and the
      rest is multiplied by a Hann window of mean square one, which keeps the power of white noise
      and blurs the others by about a shell.
  """
  require(u.ndim >= 3, 'u', u.shape, '[N, *spatial, C]', 'add the axes that it lacks')
  rows = max(1, CHUNK // max(1, u[:1].size))
  each = lambda part: _shell_means(np.abs(_modes(part if periodic else _windowed(part))) ** 2)
  parts = [each(u[start : start + rows]) for start in range(0, len(u), rows)]
  return parts[0][0], np.concatenate([power for _, power in parts])


def cross_correlation(
  a: np.ndarray, b: np.ndarray, periodic: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """Returns k [K] as `power_spectrum`, and r = Re <a b*> / sqrt(<|a|^2> <|b|^2>), [N K C].

  The means <> are over a shell. r is 1 where a and b agree up to a positive factor, has the mean 0
  where they are independent, and is 0 where one of them has no power.

  Args:
    a: fields [N *spatial C].
    b: fields of the same shape.
    periodic: as in `power_spectrum`.
  """
  require(a.shape == b.shape, 'b', b.shape, f'of the shape of a, {a.shape}', 'pair them')
  a, b = (_modes(u if periodic else _windowed(u)) for u in (a, b))
  frequency, cross = _shell_means((a * b.conj()).real)
  norm = np.sqrt(_shell_means(np.abs(a) ** 2)[1] * _shell_means(np.abs(b) ** 2)[1])
  return frequency, np.divide(cross, norm, out=np.zeros_like(cross), where=norm > 0)


def histogram(u: np.ndarray, edges: np.ndarray) -> np.ndarray:
  """Returns the density of each example's pixels per data unit in the bins of `edges`, [N K C].

  Density times width is the share of pixels in a bin, and its sum is below one if some are outside.
  A bin has its lower edge and not its upper one; the last has both.

  Args:
    u: fields [N *spatial C].
    edges: [K + 1], ascending.
  """
  edges = np.asarray(edges, np.float64)
  require((np.diff(edges) > 0).all(), 'edges', edges, 'ascending', 'sort them')
  values = u.reshape(len(u), -1, u.shape[-1])
  number = np.searchsorted(edges, values, side='right')  # 0 below all, K + 1 above
  number[values == edges[-1]] = len(edges) - 1
  rows = np.arange(len(u))[:, None, None] * u.shape[-1] + np.arange(u.shape[-1])
  size = len(edges) + 1
  count = np.bincount((rows * size + number).ravel(), minlength=len(u) * u.shape[-1] * size)
  count = count.reshape(len(u), u.shape[-1], size)[..., 1:-1].swapaxes(1, 2)
  return count / values.shape[1] / np.diff(edges)[:, None]


class Share(NamedTuple):
  """Holds shares of truths within central intervals, and their standard errors over examples."""

  value: np.ndarray  # [L]
  stderr: np.ndarray  # [L]; nan for one example


class Coverage(NamedTuple):
  """Holds `coverage` of pixels, and of modes."""

  levels: tuple[float, ...]
  pixels: Share
  modes: Share


def coverage(
  samples: np.ndarray,
  truth: np.ndarray,
  levels: tuple[float, ...] = (0.68, 0.95),
  valid: np.ndarray | None = None,
) -> Coverage:
  """Returns how often the central intervals of the samples hold the truth, by pixel and by mode.

  If truth and samples are from one posterior, the truth's rank r among S samples, 0 to S, is
  uniform, and so is (r + v) / (S + 1) for a uniform v in [0, 1]. The share counted is the
  probability over v that it lies within level / 2 of 1/2: its mean is `level` for any S, whereas
  intervals between percentiles of S samples are too narrow. (So a single sample tells nothing:
  its share is `level` whatever it is.) Among samples that equal it, the truth has each of their
  places in turn. Modes are the real and imaginary parts of independent Fourier modes
  (`real_modes`). Dimensions of an example are not independent: the standard error is that over
  examples.

  Args:
    samples: [S N *spatial C], S draws for each example.
    truth: [N *spatial C].
    levels: between 0 and 1.
    valid: bool [N *spatial 1], the pixels that count; None: all. Elsewhere truth and samples must
      have one value, so that modes tell of the rest.
  """
  good = samples.shape[1:] == truth.shape
  require(good, 'samples', samples.shape, f'[S, *{truth.shape}]', 'draw the same for each truth')
  for level in levels:
    require(0 < level < 1, 'levels', levels, 'between 0 and 1', 'give 0.68, say')
  pixels = _share(samples, truth, levels, valid)
  modes = _share(np.stack([real_modes(u) for u in samples]), real_modes(truth), levels)
  return Coverage(tuple(levels), pixels, modes)


def real_modes(u: np.ndarray) -> np.ndarray:
  """Returns the independent real numbers that the Fourier modes of u consist of, [N D C].

  It is an orthogonal transform: of each pair of modes k and -k, sqrt(2) times the real and the
  imaginary part of one of them; of a mode that is its own -k, the real part.
  """
  spatial = u.shape[1:-1]
  number = np.arange(np.prod(spatial)).reshape(spatial)
  axes = tuple(range(len(spatial)))
  opposite = np.roll(np.flip(number, axes), 1, axes).ravel()  # the number of -k
  number = number.ravel()
  modes = _modes(u).reshape(len(u), len(number), -1)
  own, one = modes[:, number == opposite].real, modes[:, number < opposite]
  return np.concatenate([own, np.sqrt(2) * one.real, np.sqrt(2) * one.imag], axis=1)


def compare_power(
  samples: np.ndarray, data: np.ndarray, periodic: bool = True, each: int = 0
) -> dict[str, np.ndarray]:
  """Returns the spectra of samples and of data as one table.

  frequency [K] is in cycles per pixel. power_*, [K C], is the mean over examples, and *_low and
  *_high are percentiles 16 and 84 of single examples. power_ratio = samples / data has
  power_ratio_stderr, its standard error to first order: from the scatter of both, or of samples
  of the data's own conditions from that of (mean power of an example's samples - ratio x its own)
  over examples, for they vary together. It is nan of a single one.

  Args:
    samples: [N *spatial C].
    data: [M *spatial C].
    periodic: as in `power_spectrum`.
    each: how many samples have the conditions of each example, N = each M, number n those of
      example n modulo M; 0: the samples do not depend on the examples.
  """
  good = samples.shape[1:] == data.shape[1:] and len(samples) == (each * len(data) or len(samples))
  rule = f'[{each * len(data) or "N"}, *{data.shape[1:]}]'
  require(good, 'samples', samples.shape, rule, 'compare fields of one shape')
  table, powers = {}, {}
  for name, u in (('samples', samples), ('data', data)):
    table['frequency'], power = power_spectrum(u, periodic)
    powers[name], table[f'power_{name}'] = power, power.mean(axis=0)
    table[f'power_{name}_low'], table[f'power_{name}_high'] = np.percentile(power, BAND, axis=0)
  ratio = table['power_samples'] / table['power_data']
  if each:
    own = powers['samples'].reshape(each, *powers['data'].shape).mean(axis=0)
    variance = _variance_of_mean(own - ratio * powers['data'])
  else:
    variance = _variance_of_mean(powers['samples'])
    variance = variance + ratio**2 * _variance_of_mean(powers['data'])
  error = np.sqrt(variance) / table['power_data']
  return table | {'power_ratio': ratio, 'power_ratio_stderr': error}


def _variance_of_mean(values: np.ndarray) -> np.ndarray:
  """Returns the variance of the mean of independent values [N ...]; nan of a single one."""
  if len(values) == 1:
    return np.full(values.shape[1:], np.nan)
  return values.var(axis=0, ddof=1) / len(values)


def compare_values(
  samples: np.ndarray, data: np.ndarray, num_bins: int = 50
) -> dict[str, np.ndarray]:
  """Returns the histograms of samples and of data as one table.

  edges [bins + 1, C] reach over the data and the samples; density_*, [bins C], is per data unit.
  mean_* and std_* [C] are those of all pixels.

  Args:
    samples: [N *spatial C].
    data: [M *spatial C].
    num_bins: how many bins.
  """
  axes = tuple(range(data.ndim - 1))
  low = np.minimum(samples.min(axes), data.min(axes)).astype(np.float64)
  high = np.maximum(samples.max(axes), data.max(axes)).astype(np.float64)
  table = {'edges': np.linspace(low, np.where(high > low, high, low + 1), num_bins + 1)}
  for name, u in (('samples', samples), ('data', data)):
    densities = [
      histogram(u[..., [channel]], edges).mean(axis=0)
      for channel, edges in enumerate(table['edges'].T)
    ]
    table[f'density_{name}'] = np.concatenate(densities, axis=1)
    pixels = u.reshape(-1, u.shape[-1]).astype(np.float64)
    table[f'mean_{name}'], table[f'std_{name}'] = pixels.mean(axis=0), pixels.std(axis=0)
  return table


def _modes(u: np.ndarray) -> np.ndarray:
  """Returns the orthonormal Fourier transform of the spatial axes, in double precision."""
  require(u.ndim >= 3, 'u', u.shape, '[N, *spatial, C]', 'add the axes that it lacks')
  axes = tuple(range(1, u.ndim - 1))
  return np.fft.fftn(np.asarray(u, np.float64), axes=axes, norm='ortho')


def _windowed(u: np.ndarray) -> np.ndarray:
  """Returns u less its mean, times a Hann window of mean square one along each spatial axis."""
  axes = tuple(range(1, u.ndim - 1))
  u = u - u.mean(axis=axes, keepdims=True, dtype=np.float64)
  for axis in axes:
    size = u.shape[axis]
    window = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    window /= np.sqrt((window**2).mean())
    u = u * window.reshape(-1, *[1] * (u.ndim - axis - 1))
  return u


def _shell_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean frequency of each shell [K], and those of values [N *spatial C]: [N K C]."""
  spatial = values.shape[1:-1]
  axes = np.meshgrid(*map(np.fft.fftfreq, spatial), indexing='ij')
  frequency = np.sqrt(sum(axis**2 for axis in axes)).ravel()
  shell = np.round(frequency * max(spatial)).astype(int)
  order = np.argsort(shell, kind='stable')
  _, start, count = np.unique(shell[order], return_index=True, return_counts=True)
  means = lambda a: np.add.reduceat(a, start, axis=1)[:, 1:] / count[1:, None]
  values = values.reshape(len(values), len(order), -1)[:, order]
  return means(frequency[order][None, :, None])[0, :, 0], means(values)


def _share(samples: np.ndarray, truth: np.ndarray, levels, valid=None) -> Share:
  """Returns the shares of `coverage`, for samples [S N ...] and truth [N ...]."""
  where = np.broadcast_to(True if valid is None else valid, truth.shape)
  # among samples of which k equal it, the truth is as likely in each of k + 1 places
  places = (samples == truth).sum(axis=0) + 1
  low, size = (samples < truth).sum(axis=0) / (len(samples) + 1), places / (len(samples) + 1)
  values, errors = [], []
  for level in levels:
    start, stop = 0.5 - level / 2, 0.5 + level / 2
    within = np.clip(np.minimum(low + size, stop) - np.maximum(low, start), 0, None) / size
    share = np.mean(within, axis=tuple(range(1, within.ndim)), where=where)
    values.append(share.mean())
    many = len(share) > 1
    errors.append(share.std(ddof=1) / np.sqrt(len(share)) if many else np.nan)
  return Share(np.array(values), np.array(errors))
