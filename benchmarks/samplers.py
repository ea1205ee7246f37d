"""Errors of every sampler on every config's grid, where the exact denoiser is known.

  python -m benchmarks.samplers

Prints two Markdown tables and writes them to docs/samplers.md, which says what their columns are.
"""

import functools
import importlib
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from scipy.stats import norm

from vdm import build, configs
from vdm.diffusion.gaussian import (
  Denoiser,
  Prediction,
  alpha,
  expand_to,
  fold_in,
  sigma,
  standard_normal,
)
from vdm.diffusion.heads import SIGMA_DATA
from vdm.diffusion.samplers import SAMPLERS, Sampler, num_evaluations, sample, time_grid

MEAN, STD = 0.3, 0.2
MIXTURE = (np.array([0.3, 0.7]), np.array([-0.5, 0.4]), np.array([0.1, 0.2]))  # weight, mean, std
MIXTURE_SAMPLES = (16, 1024)
NUM_VARIANCES = 48  # of Fourier modes; those between are interpolated
NUM_PROBES = 8
OTHER_GRIDS = ('linear', 'cosine', 'edm_sample')
DOC = pathlib.Path(__file__).parents[1] / 'docs' / 'samplers.md'

INTRODUCTION = """\
# Samplers on data whose denoiser is known

`python -m benchmarks.samplers`: every sampler on the grid and with the number of steps of every
config, with the exact denoiser, so that what differs from the data is the sampler's and its grid's
own. Learned schedules are as they start; an adaptive one is linear. All samplers have their default
arguments, but for a config's own sampler (in bold).

* mean, std: of N(.3, .2^2), mean - .3 and the error of the standard deviation. Both are exact: a
  sampler is affine in its state and its noise, and its maps are read off the code that samples.
* mixture: Wasserstein-1 distance of 16,384 samples from .3 N(-.5, .1^2) + .7 N(.4, .2^2), over its
  standard deviation. As many exact samples are FLOOR from it, on average.
* low, middle, top: error of the energy of a field of the config's size, whose power falls as
  1 / f^2, of standard deviation .5: in the top octave, from a quarter of the sampling rate up, in
  the lowest one, which has one cycle per image, and in the worst of those between (8 x 8 has none).
  Exact, as for the Gaussian.
* exact flow: the probability flow solved exactly from N(0, I) at the first level, with the same
  last step: what is left is not the sampler's. It has two causes.
  A grid that starts at log-SNR -5 starts from N(0, I) where data of variance v have the variance
  1 - .0067 (1 - v): .3 % too much for a standard deviation of .2, too little for what is larger
  than one (low). Stochastic samplers forget where they started, deterministic ones do not.
  And the last step returns z_0 / alpha_0, whose noise has the variance exp(-log_snr_max): with an
  end at 8 it adds .4 % to a standard deviation of .2, and the decoder's rounding to pixels, made
  for just this noise, takes most of it away again. With `denoise_last` x_hat of the last level is
  returned instead: the mean of x and not a draw, which lacks as much as the noise would add.

The second-order samplers `heun`, `dpmpp_2m` and `dpmpp_2m_sde`, and `deis`, of third order, are
within 1 % of .2 and within 5 % of the top octave's energy wherever a config takes 32 steps or more
(`tests/test_samplers.py`). `ancestral` and `ddim` are of first order, for hundreds of steps.
"""

OTHERS = """
## Other grids with as many steps

Error of the standard deviation of N(.3, .2^2) in % on the named grids between the ends of each
schedule. A second-order error falls with the square of the step: 32 steps over 22 units of log-SNR
are too few for 1 % on a grid by `linear` or `edm_sample`; 64 leave a quarter of it.
"""

REASON = """
## Why the grid of the `_pp` configs is `edm_train`

Times uniform under a cosine schedule, their grid until now, lie densely where the data are, but the
last of 32 steps goes from log-SNR 6 to the very end, 13.3, after one of 1.4. DPM-Solver++(2M)
extrapolates over a step in proportion to its length over that of the last one, and drew a standard
deviation of .2435 for .2 on the grid of `fashion_mnist_pp`. With the ratio at most one
(`vdm/diffusion/samplers.py` says whose remedy that is) the same grid gives .1998. The usual remedy,
a last step of first order, leaves 1 to 4 %: from a noise of .05 the way is too far for one step of
DDIM.

The grid itself was too coarse for the others: Heun's method was 1.2 % off on that of `digits_pp`,
DPM-Solver++(2M), bounded, 4 % with 16 steps. `edm_train` with std=5, the log-normal density that
EDM trains with at twice its width, is as dense in the middle and goes on evenly to both ends.
"""


class Case(NamedTuple):
  """What a config samples with."""

  name: str
  config: ConfigDict
  log_snrs: jax.Array
  denoise_last: bool
  samplers: dict[str, Sampler]


def load(name: str) -> Case:
  """The case of configs/<name>.py."""
  config = config_of(name)
  own = config.sample.sampler.name
  return Case(
    name,
    config,
    grid_of(config),
    config.sample.denoise_last,
    default_samplers() | {own: own_sampler(config)},
  )


def config_of(name: str) -> ConfigDict:
  """configs/<name>.py."""
  return importlib.import_module(f'vdm.configs.{name}').get_config()


def names() -> list[str]:
  """All configs."""
  return sorted(path.stem for path in pathlib.Path(configs.__file__).parent.glob('[a-z]*.py'))


@functools.cache
def default_samplers() -> dict[str, Sampler]:
  """Made once: a Sampler's functions are what compiled programs are kept by."""
  return {name: make() for name, make in SAMPLERS.items()}


def own_sampler(config: ConfigDict) -> Sampler:
  """The config's; the very object of `default_samplers` where its arguments are the defaults."""
  block, default = config.sample.sampler, config_of('default').sample.sampler
  same = {**block, 'name': ''} == {**default, 'name': ''}
  return default_samplers()[block.name] if same else build.sampler(config.sample.sampler)


def grid_of(config: ConfigDict, name: str = '') -> jax.Array:
  """log_snr of the steps: of config.sample.grid, or of the schedule `name` between its ends."""
  learned, _ = build.schedule(config.schedule)
  own = learned.as_schedule(learned.init())
  if name:
    config = config.copy_and_resolve_references().unlock()
    config.sample.grid = ConfigDict(dict(name=name))
  settings = config.sample
  grid = build.other_schedule(config.sample.grid, 'sample.grid', own)
  return time_grid(grid, settings.num_steps - settings.denoise_last)


def gaussian(mean: jax.Array, variance: jax.Array) -> Denoiser:
  """E[x | z] for independent x ~ N(mean, variance) [K]."""

  def denoise(z, log_snr):
    a, s = (expand_to(f(log_snr), z) for f in (alpha, sigma))
    shrunk = (z - a * mean[None]) / (a**2 * variance[None] + s**2)
    return Prediction(mean[None] + a * variance[None] * shrunk, s * shrunk)

  return denoise


@functools.partial(jax.jit, static_argnames=('sampler', 'denoise_last'))
def moments(
  sampler: Sampler, log_snrs: jax.Array, mean: jax.Array, variance: jax.Array, denoise_last: bool
) -> tuple[jax.Array, jax.Array]:
  """Mean and variance [K] of what `sample` draws with the denoiser of N(mean, variance) [K].

  z and what a step remembers of z's shape are a Gaussian vector for each of the K. A step is affine
  in it and in its one noise; it is applied to zeros under several keys, and to unit vectors.
  """
  denoiser, key = gaussian(mean, variance), jax.random.key(0)
  zeros = jnp.zeros((1, len(mean)))
  leaves, tree = jax.tree.flatten((zeros, sampler.init(zeros, log_snrs[:1], len(log_snrs))))
  linear = [i for i, leaf in enumerate(leaves) if leaf.shape == zeros.shape]
  size = len(linear)
  rows = NUM_PROBES + size
  states = jnp.concatenate([jnp.zeros((NUM_PROBES, size)), jnp.eye(size)])
  which_key = jnp.concatenate([jnp.arange(NUM_PROBES), jnp.zeros(size, int)])

  def body(carry, inputs):
    m, covariance, others = carry
    number, log_snr_t, log_snr_s = inputs
    filled = [jnp.repeat(leaf, rows, axis=0) if leaf.ndim else leaf for leaf in others]
    for column, i in enumerate(linear):
      filled[i] = jnp.broadcast_to(states[:, column, None], (rows, len(mean)))
    z, memory = jax.tree.unflatten(tree, filled)
    keys = fold_in(fold_in(jnp.broadcast_to(key, (rows,)), which_key), jnp.full(rows, number))
    at = lambda log_snr: jnp.full(rows, log_snr)
    z, _, memory = sampler.step(keys, z, memory, denoiser, at(log_snr_t), at(log_snr_s))
    others = jax.tree.leaves((z, memory))
    out = jnp.stack([others[i] for i in linear], axis=1)  # [rows, size, K]
    noise = standard_normal(keys, (len(mean),))[:NUM_PROBES]
    centred = noise - noise.mean(axis=0, keepdims=True)
    gain = (centred[:, None] * out[:NUM_PROBES]).sum(axis=0) / (centred**2).sum(axis=0)[None]
    offset = out[:NUM_PROBES].mean(axis=0) - gain * noise.mean(axis=0)[None]
    maps = jnp.moveaxis(out[NUM_PROBES:] - out[:1], 0, 1)  # [size after, size before, K]
    m = jnp.einsum('ijk,jk->ik', maps, m) + offset
    covariance = jnp.einsum('ijk,jlk,mlk->imk', maps, covariance, maps) + gain[:, None] * gain[None]
    return (m, covariance, [leaf[:1] if leaf.ndim else leaf for leaf in others]), None

  covariance = jnp.zeros((size, size, len(mean))).at[0, 0].set(1.0)
  start = (jnp.zeros((size, len(mean))), covariance, leaves)
  grid = (jnp.arange(len(log_snrs) - 1), log_snrs[:-1], log_snrs[1:])
  (m, covariance, _), _ = jax.lax.scan(body, start, grid)
  return last_step(m[0], covariance[0, 0], log_snrs, mean, variance, denoise_last)


def last_step(m, covariance, log_snrs, mean, variance, denoise_last: bool):
  """Moments of x from those of z at the last level."""
  a, s = alpha(log_snrs[-1]), sigma(log_snrs[-1])
  if not denoise_last:
    return m / a, covariance / a**2
  gain = a * variance / (a**2 * variance + s**2)
  return mean + gain * (m - a * mean), gain**2 * covariance


def exact_flow(log_snrs, mean, variance, denoise_last: bool) -> tuple[jax.Array, jax.Array]:
  """`moments` of the probability flow without an error of its own."""
  first, last = log_snrs[0], log_snrs[-1]
  total = lambda log_snr: alpha(log_snr) ** 2 * variance + sigma(log_snr) ** 2
  scale = jnp.sqrt(total(last) / total(first))
  m = alpha(last) * mean - scale * alpha(first) * mean
  return last_step(m, scale**2, log_snrs, mean, variance, denoise_last)


def mixture_denoiser() -> Denoiser:
  """E[x | z] for independent x ~ MIXTURE."""
  weight, means, stds = (jnp.asarray(a, jnp.float32) for a in MIXTURE)

  def denoise(z, log_snr):
    a, s = (expand_to(f(log_snr), z)[..., None] for f in (alpha, sigma))
    means_, variance = means[None, None], stds[None, None] ** 2
    residual, total = z[..., None] - a * means_, a**2 * variance + s**2
    joint = jnp.log(weight)[None, None] - 0.5 * (residual**2 / total + jnp.log(total))
    share = jax.nn.softmax(joint, axis=-1)
    x = means_ + a * variance * residual / total
    return Prediction((share * x).sum(axis=-1), (share * s * residual / total).sum(axis=-1))

  return denoise


@functools.partial(jax.jit, static_argnames=('sampler', 'denoise_last'))
def draw_mixture(sampler: Sampler, log_snrs: jax.Array, denoise_last: bool) -> jax.Array:
  """Samples of the mixture, of shape MIXTURE_SAMPLES."""
  count, size = MIXTURE_SAMPLES
  keys = fold_in(jax.random.key(0), jnp.arange(count))
  return sample(keys, sampler, mixture_denoiser(), log_snrs, (size,), denoise_last)


def wasserstein(x: np.ndarray) -> float:
  """Wasserstein-1 distance of samples from MIXTURE, over its standard deviation."""
  weight, means, stds = MIXTURE
  at = np.linspace(-3.0, 3.0, 6001)
  exact = (weight * norm.cdf((at[:, None] - means) / stds)).sum(axis=1)
  ours = np.searchsorted(np.sort(np.ravel(x)), at, side='right') / np.size(x)
  std = np.sqrt(weight @ (stds**2 + means**2) - (weight @ means) ** 2)
  return np.abs(ours - exact).sum() * (at[1] - at[0]) / std


def mixture_floor() -> float:
  """`wasserstein` of exact samples, as many: the mean of 20 such distances."""
  weight, means, stds = MIXTURE
  random = np.random.default_rng(0)
  parts = random.choice(len(weight), size=(20, math.prod(MIXTURE_SAMPLES)), p=weight)
  return np.mean([wasserstein(random.normal(means[part], stds[part])) for part in parts])


def spectrum(image_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Variance of each mode of a field but the constant, and its octave, 0 for the lowest.

  The top octave begins at a quarter of the sampling rate, and has the corners too.
  """
  height, width = image_shape[:2]
  cycles = [np.fft.fftfreq(n) * n for n in (height, width)]
  f = np.sqrt(cycles[0][:, None] ** 2 + cycles[1] ** 2).ravel()[1:]
  variance = SIGMA_DATA**2 * (len(f) + 1) / f**2 / (1 / f**2).sum()
  octave = np.minimum(np.floor(np.log2(4 * f / min(height, width))), 0).astype(int)
  return variance, octave - octave.min()


def errors(moments_of, image_shape: tuple[int, ...]) -> tuple[float, ...]:
  """(mean, std, low, middle, top) errors; `moments_of`: mean, variance [K] -> theirs of x."""
  v, octave = spectrum(image_shape)
  nodes = np.geomspace(v.min(), v.max(), NUM_VARIANCES)
  mean = np.concatenate([[MEAN], np.zeros(NUM_VARIANCES)]).astype(np.float32)
  variance = np.concatenate([[STD**2], nodes]).astype(np.float32)
  drawn_mean, drawn = (np.float64(a) for a in moments_of(mean, variance))
  ratio = np.interp(np.log(v), np.log(nodes), drawn[1:] / nodes)
  energy = lambda weight: np.bincount(octave, weight * v) / np.bincount(octave, v)
  octaves = energy(ratio) - 1
  middle = max(octaves[1:-1], key=abs, default=math.nan)
  return drawn_mean[0] - MEAN, math.sqrt(drawn[0]) / STD - 1, octaves[0], middle, octaves[-1]


def sampler_errors(case: Case, sampler: Sampler) -> tuple[float, ...]:
  """`errors` of a sampler on a case."""
  of = lambda mean, variance: moments(sampler, case.log_snrs, mean, variance, case.denoise_last)
  return errors(of, case.config.data.image_shape)


def percent(a: float) -> str:
  """With a sign, or nothing for NaN."""
  return '' if math.isnan(a) else f'{100 * a:+.2f}'


def rows(case: Case, mixtures: dict) -> Iterator[str]:
  """The lines of a config, as they are computed."""
  config, settings = case.config, case.config.sample
  ends = f'{float(case.log_snrs[0]):.4g} to {float(case.log_snrs[-1]):.4g}'
  last = ', x_hat' if case.denoise_last else ''
  grid = f'{settings.grid.name}, {ends}, {settings.num_steps} steps{last}'
  flow = lambda mean, variance: exact_flow(case.log_snrs, mean, variance, case.denoise_last)
  line = lambda name, evaluations, mixture, e: '| {} |'.format(
    ' | '.join(
      [case.name, grid, name, f'{evaluations}', f'{e[0]:+.4f}', percent(e[1]), mixture]
      + [percent(a) for a in e[2:]]
    )
  )
  yield line('exact flow', '', '', errors(flow, config.data.image_shape))
  for name, sampler in case.samplers.items():
    key = (sampler, case.log_snrs.tobytes(), case.denoise_last)
    if key not in mixtures:
      mixtures[key] = wasserstein(draw_mixture(sampler, case.log_snrs, case.denoise_last))
    mixture = f'{100 * mixtures[key]:.2f}'
    evaluations = num_evaluations(sampler, settings.num_steps, case.denoise_last)
    title = f'**{name}**' if name == settings.sampler.name else name
    yield line(title, evaluations, mixture, sampler_errors(case, sampler))


def table(cases: list[Case]) -> Iterator[str]:
  """The lines of the first table."""
  columns = 'config, grid, sampler, evaluations, mean, std %, mixture %, low %, middle %, top %'
  yield f'| {columns.replace(", ", " | ")} |'
  yield '|---' * (columns.count(',') + 1) + '|'
  mixtures: dict = {}
  for case in cases:
    yield from rows(case, mixtures)


def other_grids(cases: list[Case]) -> Iterator[str]:
  """The lines of the second table: a line for each schedule's ends, number of steps and grid."""
  yield f'| ends | steps | grid | {" | ".join(SAMPLERS)} |'
  yield '|---' * (3 + len(SAMPLERS)) + '|'
  seen = set()
  mean, variance = np.full(2, MEAN, np.float32), np.full(2, STD**2, np.float32)
  for case in cases:
    for name in OTHER_GRIDS:
      log_snrs = grid_of(case.config, name)
      if (name, log_snrs.tobytes()) in seen:
        continue
      seen.add((name, log_snrs.tobytes()))
      stds = [
        np.sqrt(np.float64(moments(s, log_snrs, mean, variance, case.denoise_last)[1][0]))
        for s in default_samplers().values()
      ]
      ends = f'{float(log_snrs[0]):.4g} to {float(log_snrs[-1]):.4g}'
      numbers = ' | '.join(percent(std / STD - 1) for std in stds)
      yield f'| {ends} | {case.config.sample.num_steps} | {name} | {numbers} |'


def main():
  """Writes docs/samplers.md."""
  cases = [load(name) for name in names()]
  text = [INTRODUCTION.replace('FLOOR', f'{100 * mixture_floor():.2f} %')]
  for part in (table(cases), (OTHERS,), other_grids(cases), (REASON,)):
    for line in part:
      print(line, flush=True)
      text.append(line)
  DOC.write_text('\n'.join(text).rstrip() + '\n')


if __name__ == '__main__':
  main()
