"""The codec of a model that is exact: length over the bound, and what each trap costs.

  python -m benchmarks.codec          # the table in docs/codec.md, in two minutes of a CPU

The images are Gaussian fields of 64 dimensions, rounded to 17 values; the denoiser is exact before
the rounding. The bound's expectations are in closed form, but for the decoder's. The length of one
coding is the bound and, at each step, noise of deviation sqrt(2 KL): all seeds are averaged.
"""

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vdm import build, codec
from vdm.codec import chain, container
from vdm.data.gaussian_field import GaussianField
from vdm.diffusion import decoders, schedules
from vdm.diffusion.decoders import Decoder
from vdm.diffusion.gaussian import Schedule

FIELD = GaussianField((8, 8), exponent=-2.0, std=0.5)
NUM_VALUES = 17
LINEAR = schedules.linear(-5.0, 8.0)


def exact_model(schedule: Schedule = LINEAR, decoder: Decoder | None = None) -> build.Model:
  """Returns the model of the field, which has no parameters."""
  return build.Model(
    init=lambda key: {},
    schedule=lambda *_: schedule,
    denoiser=lambda params, conditions=None: FIELD.denoiser(0.0, 1.0),
    weighting=lambda log_snr: jnp.ones_like(log_snr),
    image_shape=(*FIELD.shape, 1),
    decoder=decoder or decoders.discrete(NUM_VALUES),
  )


@functools.cache
def images(count: int) -> np.ndarray:
  """Returns fields, rounded, uint8 [count 8 8 1]."""
  drawn, _ = FIELD.draw(np.random.RandomState(0), count)
  return np.asarray(decoders.from_grid(drawn, NUM_VALUES), np.uint8)


@functools.cache
def bound(count: int, num_timesteps: int) -> float:
  """Returns the discrete-time bound of `images` in bits/dim, under `LINEAR`.

  Mode k of the image is m, z has alpha m + sigma eps, and x_hat = alpha v z, v = P / (alpha^2 P +
  sigma^2). So E |m - x_hat|^2 = (1 - alpha^2 v)^2 |m|^2 + alpha^2 v^2 sigma^2.
  """
  u = images(count)
  x = np.asarray(decoders.to_grid(u, NUM_VALUES), np.float64)[..., 0]
  square = np.abs(np.fft.fftn(x, axes=(1, 2), norm='ortho')) ** 2
  log_snr = np.asarray(LINEAR(jnp.arange(num_timesteps + 1) / num_timesteps), np.float64)
  snr, nats = np.exp(log_snr), 0.0
  for s in range(num_timesteps):
    a2, s2 = snr[s + 1] / (1 + snr[s + 1]), 1 / (1 + snr[s + 1])
    v = FIELD.power / (a2 * FIELD.power + s2)
    error = (1 - a2 * v) ** 2 * square + a2 * v**2 * s2
    nats += (snr[s] - snr[s + 1]) / 2 * error.sum()
  a2, s2 = snr[-1] / (1 + snr[-1]), 1 / (1 + snr[-1])
  nats += 0.5 * (a2 * square + s2 - np.log(s2) - 1).sum()
  noise = np.random.RandomState(1).standard_normal((20, *u.shape)).astype(np.float32)
  loss = jax.jit(decoders.discrete(NUM_VALUES).loss)
  nats += np.mean([loss(u, eps, jnp.float32(8.0)).sum() for eps in noise])
  return float(nats) / (u.size * math.log(2))


def excess(count: int, **settings) -> tuple[float, float, float]:
  """Returns the net length over the bound, less 1, its deviation, and initial bits/dim of a group.

  Args:
    count: of images.
    **settings: of the code, `codec.Settings`, in groups of 64 by default.
  """
  chosen = codec.Settings(**{'group_size': 64} | settings)
  blob = codec.compress(exact_model(), {}, images(count), chosen)
  header, exact = container.read(blob, 'the file').header, bound(count, chosen.num_timesteps)
  deviation = math.sqrt(2 / (exact * math.log(2) * images(count).size))
  initial = 32 * header['initial_words'][0] / (chosen.group_size * math.prod(FIELD.shape))
  return header['net_bits'] / images(count).size / exact - 1, deviation, initial


TRAPS = {
  'one wide grid': {'WINDOW_Q': 1000.0, 'WINDOW_P': 1000.0},
  'no permutation': {'permutation': lambda *names: np.arange(names[-1])},
  'no whitening': {'whitening': lambda *names: np.zeros(names[-1], np.uint32)},
}


@contextlib.contextmanager
def trapped(*names: str) -> Iterator[None]:
  """Takes cures out of the codec, by names of TRAPS."""
  with contextlib.ExitStack() as stack:
    for name in names:
      for attribute, value in TRAPS[name].items():
        stack.enter_context(mock.patch.object(chain, attribute, value))
    yield


ROWS = (
  (dict(num_timesteps=50), ()),
  (dict(num_timesteps=200), ()),
  (dict(num_timesteps=1000), ()),
  (dict(num_timesteps=50, cells=4.0), ()),
  (dict(num_timesteps=50, cells=16.0), ()),
  (dict(num_timesteps=50), ('one wide grid',)),
  (dict(num_timesteps=50), ('no permutation',)),
  (dict(num_timesteps=50), ('no whitening',)),
  (dict(num_timesteps=50), ('no whitening', 'no permutation')),
  (dict(num_timesteps=50, group_size=1), ()),
  (dict(num_timesteps=50, group_size=1), ('no whitening',)),
  (dict(num_timesteps=50, group_size=1), ('no whitening', 'no permutation')),
)


def main(argv: list[str] | None = None) -> int:
  """Prints the table; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--images', type=int, default=640)
  parser.add_argument('--seeds', type=int, default=4)
  typed = parser.parse_args(argv)
  print('| T | group | cells | without a cure | net / bound | its error | initial bits/dim |')
  print('|---|---|---|---|---|---|---|')
  for settings, names in ROWS:
    chosen = codec.Settings(**{'group_size': 64} | settings)
    count = typed.images if chosen.group_size > 1 else typed.images // 4
    with trapped(*names):
      found = [excess(count, seed=seed, **settings) for seed in range(typed.seeds)]
    over, deviations, initial = np.transpose(found)
    error = deviations.mean() / math.sqrt(typed.seeds)
    row = chosen.num_timesteps, chosen.group_size, f'{chosen.cells:g}', ', '.join(names)
    row += f'{1 + over.mean():.4f}', f'{error:.4f}', f'{initial.mean():.1f}'
    print('|', ' | '.join(map(str, row)), '|', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
