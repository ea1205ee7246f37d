"""Infers the parameters of a simulator from its output, by a likelihood that a model has learned.

  python examples/infer.py FOLDER                 ten minutes of CPU time
  python examples/infer.py FOLDER --nuts          and by a sampler with gradients, NUTS (numpyro)

The simulator draws signals of 32 samples, mean + scale u, where u is periodic Gaussian noise with a
power-law spectrum. So log p(x | theta), theta = (mean, log scale), is known exactly. A network that
is told theta learns p(x | theta) from simulations with theta from its prior. Then the posterior of
300 further signals is set beside the exact one on a grid: in how many of them intervals of 95 %
hold the truth. A picture goes to FOLDER/posterior.png.
"""

import argparse
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vdm
from vdm import style
from vdm.data.gaussian_field import GaussianField
from vdm.system import logs

FIELD = GaussianField(shape=(32,), exponent=-2.0, std=1.0)
LOW, HIGH = np.array([-1.0, -0.7]), np.array([1.0, 0.7])  # of theta's prior, which is uniform
POINTS, DRAWS = 21, 32


def simulate(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns theta [N 2] from the prior, and a signal of each [N 32 1]."""
  theta = rng.uniform(LOW, HIGH, (count, 2)).astype(np.float32)
  u, _ = FIELD.draw(rng, count)
  return theta, theta[:, :1, None] + np.exp(theta[:, 1:, None]) * u


def exact(signals: np.ndarray, theta: np.ndarray) -> np.ndarray:
  """Returns log p(x | theta) [N G] in nats, for signals [N 32 1] and theta [G 2]."""
  scale = np.exp(theta[:, 1])
  alike = [FIELD.log_prob((signals - m) / s) for m, s in zip(theta[:, 0], scale, strict=True)]
  return np.stack(alike, axis=1) - FIELD.shape[0] * theta[:, 1]


def train(folder: pathlib.Path, steps: int) -> tuple[vdm.Experiment, object]:
  """Returns a model of p(x | theta), and its state, kept in FOLDER/run."""
  theta, signals = simulate(np.random.default_rng(0), 100_000)
  np.savez(folder / 'simulations.npz', x=signals, vector=theta)
  settings = {
    'data.path': str(folder / 'simulations.npz'),
    'model.num_blocks': 1,
    'model.padding': 'periodic',
    'train.batch_size': 128,
    'train.num_steps': steps,
    'eval.max_images': 1000,
  }
  exp = vdm.Experiment('my_arrays', settings)
  return exp, exp.train(folder / 'run')


def likelihoods(exp: vdm.Experiment, state, signals: np.ndarray, theta: np.ndarray) -> np.ndarray:
  """Returns estimates of log p(x | theta), [draws N G] nats, with the same noise at each theta."""
  log_prob = jax.jit(exp.log_prob_given(state, signals, DRAWS))
  return np.stack([log_prob(vector=jnp.asarray(point)) for point in theta], axis=-1)


def marginals(posterior: vdm.inference.Posterior) -> list[np.ndarray]:
  """Returns the probabilities [N POINTS] of both parameters."""
  both = posterior.probability.reshape(-1, POINTS, POINTS)
  return [both.sum(axis=2), both.sum(axis=1)]


def covered(posterior: vdm.inference.Posterior, axes: list[np.ndarray], truth: np.ndarray) -> list:
  """Returns whether the interval of 95 % of each parameter holds the truth, bool [2 N]."""
  ends = [
    vdm.inference.interval(p, axis) for p, axis in zip(marginals(posterior), axes, strict=True)
  ]
  return [(low <= t) & (t <= high) for (low, high), t in zip(ends, truth.T, strict=True)]


def nuts(exp: vdm.Experiment, state, signal: np.ndarray, count: int) -> np.ndarray:
  """Returns draws [count 2] from the posterior of one signal, by the no-U-turn sampler."""
  import numpyro
  from numpyro import distributions
  from numpyro.infer import MCMC, NUTS

  log_prob = exp.log_prob_given(state, signal[None], DRAWS)

  def model():
    theta = numpyro.sample('theta', distributions.Uniform(LOW, HIGH).to_event(1))
    numpyro.factor('x', log_prob(vector=theta).mean())

  sampler = MCMC(NUTS(model), num_warmup=200, num_samples=count, progress_bar=False)
  sampler.run(jax.random.key(0))
  return np.asarray(sampler.get_samples()['theta'])


@style.paper
def draw(posteriors: dict[str, np.ndarray], axes: list[np.ndarray], truth: np.ndarray, path):
  """Draws the posteriors [POINTS POINTS] of one signal as contours that hold 68 and 95 %."""
  figure, panel = style.figure(1, (4.2, 3.4))
  for (name, probability), colour in zip(posteriors.items(), style.COLOURS, strict=False):
    ordered = np.sort(probability.ravel())
    levels = [ordered[np.searchsorted(np.cumsum(ordered), share)] for share in (0.05, 0.32)]
    panel.contour(*axes, probability.T, levels, colors=colour, linewidths=1.4)
    panel.plot([], [], '-', color=colour, label=name)
  panel.plot(*truth, 'x', color=style.DATA, label='truth')
  panel.set(xlabel='mean', ylabel='log scale', title='68 and 95 % of the posterior of one signal')
  panel.legend()
  style.save(figure, path)


def main():
  """Trains, infers and compares."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=6000, help='of training')
  parser.add_argument('--signals', type=int, default=300, help='whose posteriors are computed')
  parser.add_argument('--nuts', action='store_true', help='sample one posterior with numpyro too')
  args = parser.parse_args()
  if args.nuts and importlib.util.find_spec('numpyro') is None:
    parser.error('--nuts needs numpyro: pip install numpyro')
  vdm.use_cores()
  logs.set_up_logging()
  args.folder.mkdir(parents=True, exist_ok=True)
  exp, state = train(args.folder, args.steps)
  truth, signals = simulate(np.random.default_rng(1), args.signals)
  axes = [np.linspace(low, high, POINTS) for low, high in zip(LOW, HIGH, strict=True)]
  theta = np.stack(np.meshgrid(*axes, indexing='ij'), axis=-1).reshape(-1, 2).astype(np.float32)
  estimates = likelihoods(exp, state, signals, theta)
  posteriors = {
    'model': vdm.inference.on_grid(estimates),
    'exact': vdm.inference.on_grid(exact(signals, theta)[None]),
  }
  for name, posterior in posteriors.items():
    shares = [100 * held.mean() for held in covered(posterior, axes, truth)]
    errors = [(share * (100 - share) / len(truth)) ** 0.5 for share in shares]
    said = ', '.join(f'{s:.1f} +- {e:.1f} %' for s, e in zip(shares, errors, strict=True))
    print(f'{name}: intervals of 95 % hold the truth in {said} (mean, log scale)')
  middle, side = POINTS**2 // 2, POINTS**2 // 2 + 2 * POINTS
  found = vdm.likelihood.LogProb(estimates[..., side], vdm.likelihood.STRATA)
  other = vdm.likelihood.LogProb(estimates[..., middle], vdm.likelihood.STRATA)
  free = np.hypot(found.stderr, other.stderr).mean()
  paired = found.minus(other).stderr.mean()
  print(f"error of log p(x | theta) - log p(x | theta'): {paired:.3f} nats, unpaired {free:.3f}")
  one = int(np.abs(truth).max(axis=1).argmin())  # far from the ends of the prior
  shown = {name: p.probability[one].reshape(POINTS, POINTS) for name, p in posteriors.items()}
  draw(shown, axes, truth[one], args.folder / 'posterior.png')
  print(f'{args.folder / "posterior.png"}: the posterior of signal {one}')
  if args.nuts:
    drawn = nuts(exp, state, signals[one], 1000)
    grid = marginals(posteriors['model'])
    for number, name in enumerate(('mean', 'log scale')):
      mean = float(grid[number][one] @ axes[number])
      print(f'{name}: {drawn[:, number].mean():.3f} by NUTS, {mean:.3f} on the grid')


if __name__ == '__main__':
  main()
