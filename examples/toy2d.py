"""A variational diffusion model of a spiral in the plane, in one file and one minute.

  python examples/toy2d.py [--steps=3000] [--out=toy2d.png]

Only the maths of `vdm`, which are pure functions, and ten lines of Flax. The picture shows data,
samples, the model's density by its probability-flow ODE, and the learned schedule.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vdm import style
from vdm.diffusion import ode, samplers, weightings
from vdm.diffusion.elbo import diffusion_loss, interior_gradient
from vdm.diffusion.gaussian import alpha, log_snr_and_slope
from vdm.diffusion.heads import to_prediction
from vdm.diffusion.schedules import SCHEDULES
from vdm.diffusion.times import stratified

BATCH, LOG_SNR_MIN, LOG_SNR_MAX = 512, -6.0, 10.0
LEARNED = SCHEDULES['learned_net'](LOG_SNR_MIN, LOG_SNR_MAX, num_hidden=64)
ELBO = weightings.WEIGHTINGS['elbo']()
OPTIMIZER = optax.adam(2e-3)


class Network(nn.Module):
  """(z [B, 2], log_snr [B]) -> eps_hat [B, 2]."""

  @nn.compact
  def __call__(self, z, log_snr):
    h = jnp.concatenate([z, jnp.sin(z * 4), jnp.cos(z * 4), log_snr[:, None] / 8], axis=-1)
    for _ in range(3):
      h = nn.swish(nn.Dense(128)(h))
    return nn.Dense(2)(h)


def spiral(key, count):
  """Points [count, 2] of a noisy spiral, of about unit variance."""
  key_angle, key_noise = jax.random.split(key)
  angle = 4 * jnp.pi * jnp.sqrt(jax.random.uniform(key_angle, (count, 1)))
  points = angle / 7 * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
  return points + 0.05 * jax.random.normal(key_noise, (count, 2))


def denoiser(network):
  """Parameters -> Denoiser."""
  return lambda z, log_snr: to_prediction('eps', Network().apply(network, z, log_snr), z, log_snr)


@jax.jit
def step(params, opt_state, key):
  """One update: the network by the bound, the schedule's interior by the bound's variance."""
  key_x, key_t, key_eps = jax.random.split(key, 3)
  x, eps = spiral(key_x, BATCH), jax.random.normal(key_eps, (BATCH, 2))
  t = stratified(key_t, jnp.arange(BATCH), BATCH)
  schedule = LEARNED.as_schedule(jax.lax.stop_gradient(params['schedule']))

  def mean_loss(network, probe):
    loss = diffusion_loss(denoiser(network), schedule, ELBO, x, t, eps, probe=probe).loss
    return loss.mean(), loss

  probe = (jnp.zeros(BATCH), jnp.zeros(BATCH))
  (network, probe_grads), loss = jax.grad(mean_loss, (0, 1), has_aux=True)(params['network'], probe)
  interior = interior_gradient(LEARNED.as_schedule, params['schedule'], t, loss, probe_grads)
  ends = dict(log_snr_max=jnp.zeros(()), slope=jnp.zeros(()))  # stay where they are
  grads = {'network': network, 'schedule': ends | {'interior': interior}}
  updates, opt_state = OPTIMIZER.update(grads, opt_state)
  return optax.apply_updates(params, updates), opt_state, (loss.mean(), loss.std() / loss.mean())


@style.paper
def draw(data, samples, density, log_snr, times, out):
  """Plots points, the density on the plane, and that of the training times over log-SNR."""
  figure, (*planes, last) = style.figure(4, (12, 2.9))
  for panel, points, title in zip(planes, (data, samples), ('data', 'samples'), strict=False):
    panel.scatter(*points.T, s=1.5, color=style.BLUE, linewidths=0)
    panel.set_title(f'{title}, 2,000 points')
  image = planes[2].imshow(density, origin='lower', extent=(-2.4, 2.4, -2.4, 2.4))
  planes[2].set_title('density, by the ODE')
  figure.colorbar(image, ax=planes[2], label='per unit of area', shrink=0.8)
  for panel in planes:
    panel.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xlabel='$x_1$', ylabel='$x_2$', aspect='equal')
    panel.grid(visible=False)
  linear = last.axhline(1 / (LOG_SNR_MAX - LOG_SNR_MIN), color=style.REFERENCE, linestyle='--')
  (learned,) = last.plot(log_snr, times)
  last.set(xlabel='log-SNR (noise on the left)', ylim=(0, None), title='density of training times')
  last.legend([learned, linear], ['learned', 'linear'], loc='lower right')
  style.save(figure, out)


def main(steps, out):
  """Trains, draws samples, solves the ODE on a grid of the plane, and plots."""
  key_init, key_sample, key_data = jax.random.split(jax.random.key(0), 3)
  network = Network().init(key_init, jnp.zeros((1, 2)), jnp.zeros(1))
  params = {'network': network, 'schedule': LEARNED.init()}
  opt_state = OPTIMIZER.init(params)
  for i in range(1, steps + 1):
    params, opt_state, (loss, spread) = step(params, opt_state, jax.random.fold_in(key_init, i))
    if i % max(1, steps // 5) == 0:
      print(f'step {i}: diffusion loss {loss:.3f} nats, its std / mean {spread:.2f}', flush=True)

  schedule, denoise = LEARNED.as_schedule(params['schedule']), denoiser(params['network'])
  grid, keys = samplers.time_grid(schedule, 200), jax.random.split(key_sample, 2000)
  x = jax.jit(lambda: samplers.sample(keys, samplers.ancestral(), denoise, grid, (2,)))()

  axis = jnp.linspace(-2.4, 2.4, 60)
  plane = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
  ends = jnp.float32(6.0), jnp.float32(LOG_SNR_MIN)  # a little noise: else the plane is impossible
  probes = ode.exact_probes(len(plane), (2,))
  solve = jax.jit(lambda z: ode.log_prob(denoise, z, *ends, probes, 1e-3, 1e-3, 500))
  density = np.exp(solve(alpha(ends[0]) * plane).log_prob.reshape(60, 60))

  log_snr, slope = log_snr_and_slope(schedule, jnp.linspace(0.0, 1.0, 200))
  draw(spiral(key_data, 2000), x, density, log_snr, -1 / slope, out)
  print('wrote', out)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description='A variational diffusion model of a spiral.')
  parser.add_argument('--steps', type=int, default=3000)
  parser.add_argument('--out', type=pathlib.Path, default='toy2d.png')
  main(**vars(parser.parse_args()))
