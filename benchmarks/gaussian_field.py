"""How far a model of configs/gaussian_fields.py is from the exact posterior, without noise.

  python -m benchmarks.gaussian_field runs/gaussian_fields

The bound less the exact E[-log p(u | y)] is, in nats per dimension,

  1/2 int E |x_hat - E[x | z, y]|^2 dSNR + 1/2 mean_k log(1 + 1 / (v_k SNR_max))

where the first term is of the network, and the second of the reconstruction at the greatest SNR,
for v_k the posterior variance of mode k; the prior's term is left out. Both are positive. It is
printed as a share of what y tells, E[-log p(u)] - E[-log p(u | y)]. Then the power of samples, one
for each fresh observation, is set beside the exact one, by shells of wave numbers.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import vdm
from vdm.data import gaussian_field
from vdm.evaluation import fields
from vdm.experiment import Experiment


def gap(exp: Experiment, state, num_fields: int, num_levels: int, seed: int) -> tuple[float, float]:
  """Returns the two terms of the gap, in nats per dimension.

  Args:
    exp: of the run.
    state: its state.
    num_fields: fields that the mean is over, drawn anew.
    num_levels: log-SNRs of the integral, equally spaced.
    seed: of the fields and of their noise.
  """
  field, data = gaussian_field.of(exp.config.data), exp.config.data
  rng = np.random.RandomState(seed)
  u, y = field.draw(rng, num_fields)
  shift, scale = float(data.shift[0]), float(data.scale[0])
  x, eps = (u - shift) / scale, rng.standard_normal(u.shape).astype(np.float32)
  model, exact = exp.denoiser(state, condition=y), field.denoiser(shift, scale, y)

  @jax.jit
  def square(log_snr):
    log_snr = jnp.full(num_fields, log_snr)
    z = vdm.gaussian.q_sample(jnp.asarray(x), jnp.asarray(eps), log_snr)
    return ((model(z, log_snr).x - exact(z, log_snr).x) ** 2).mean()

  high, low = (float(end) for end in exp.schedule(state)(jnp.array([0.0, 1.0])))
  levels = np.linspace(low, high, num_levels)
  integrand = [0.5 * float(square(level)) * np.exp(level) for level in levels]
  variance = (field.posterior(y[:1]).mode_std / scale) ** 2
  return np.trapezoid(integrand, levels), 0.5 * np.log1p(np.exp(-high) / variance).mean()


def power_ratios(exp: Experiment, state, num_fields: int, seed: int) -> dict[str, np.ndarray]:
  """Returns by shell: frequency [K], power of samples / exact power, and its standard error."""
  field = gaussian_field.of(exp.config.data)
  _, y = field.draw(np.random.RandomState(seed), num_fields)
  samples = exp.sample(state, num_fields, condition=y)
  frequency, power = fields.power_spectrum(samples)
  modes = np.sqrt(field.power)[None, ..., None]  # a field with just these amplitudes
  exact = fields.power_spectrum(np.fft.ifftn(modes, axes=(1, 2), norm='ortho').real)[1][0, :, 0]
  mean = power.mean(axis=0)[:, 0] / exact
  stderr = power.std(axis=0, ddof=1)[:, 0] / exact / np.sqrt(num_fields)
  return {'frequency': frequency, 'ratio': mean, 'stderr': stderr}


def main():
  """Prints both."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', help='of a run of configs/gaussian_fields.py')
  parser.add_argument('--num_fields', type=int, default=512)
  parser.add_argument('--num_samples', type=int, default=2048)
  parser.add_argument('--num_levels', type=int, default=37)
  args = parser.parse_args()
  vdm.use_cores()
  exp, state = vdm.load(args.workdir)
  field = gaussian_field.of(exp.config.data)
  told = field.entropy() - field.conditional_entropy()
  network, end = gap(exp, state, args.num_fields, args.num_levels, seed=1)
  print(f'gap: {network:.5f} + {end:.5f} nats/dim, {(network + end) / told:.2%} of what y tells')
  if args.num_samples:
    table = power_ratios(exp, state, args.num_samples, seed=2)
    for k, ratio, stderr in zip(*table.values(), strict=True):
      print(f'{k:.3f} cycles per pixel: power {ratio:.3f} +- {stderr:.3f} of the exact one')


if __name__ == '__main__':
  main()
