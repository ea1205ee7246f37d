"""Images/s of a trained model's likelihoods, and of its codec's network: a Markdown table.

  python -m benchmarks.rates --workdir=pretrained/digits
  python -m benchmarks.rates --workdir=pretrained/fashion_mnist_full --data=FILE

The bound and the ODE are whole calls of `Experiment.log_prob` on the first test images, whose mean
is printed beside the rate. The codec asks its network for x_hat at one level at a time, T times for
each group of images, and for the probabilities of an image's values once; a call is timed from
NumPy to NumPy. All is in float32, so let JAX_DEFAULT_MATMUL_PRECISION=highest make it so where
products are not: an ODE solver spends its steps on rounding otherwise. After one call that
compiles, a rate is the median of --repeats, with the least and the greatest.
"""

import argparse
import functools
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import vdm
from benchmarks.accelerator import parts
from benchmarks.throughput import rate
from vdm.build.state import named_params
from vdm.codec import network
from vdm.data import conditions_of


def log_prob(
  workdir: str, overrides: Mapping[str, Any], count: int, repeats: int, **how: Any
) -> tuple[str, str]:
  """Returns images/s of `Experiment.log_prob`, and the mean over `count` images with its error."""
  size = {'eval.batch_size': count, 'sample.batch_size': count}
  exp, state = vdm.load(workdir, overrides={**overrides, **size})
  batch = exp.source('eval').fetch(np.arange(count))
  label = batch['label'] if exp.config.model.class_conditional else None
  found = []

  def call():
    found.append(exp.log_prob(state, batch['image'], label=label, **how))

  speed = rate(call, count, repeats)
  bits = -1 / (math.prod(exp.model.image_shape) * math.log(2))
  values = bits * found[-1].value
  return speed, f'{values.mean():.4f} ± {values.std(ddof=1) / math.sqrt(count):.4f}'


def codec(workdir: str, overrides: Mapping[str, Any], group: int, repeats: int) -> tuple[str, str]:
  """Returns how many x_hat and how many tables of probabilities the codec's network makes per s."""
  exp, state = vdm.load(workdir, overrides=overrides)
  made = network.of_model(exp.model, named_params(state, 'ema'), 200, group)
  batch = exp.source('eval').fetch(np.arange(group))
  by_class = exp.config.model.class_conditional
  given = conditions_of({'label': batch['label']}) if by_class else {}
  z = np.random.default_rng(0).standard_normal((group, *made.shape), np.float32)
  x_hats = rate(lambda: made.predict(z, 100, given), group, repeats)
  return x_hats, rate(lambda: made.probabilities(z[0]), 1, repeats)


def main(argv: list[str] | None = None) -> int:
  """Prints the table, each row when it is known; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.rates', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--workdir', default='pretrained/digits', help='a run, or a released model')
  parser.add_argument('--data', default='', help='NPZ of Fashion-MNIST by accelerator --pack')
  parser.add_argument('--images', type=int, default=1000, help='that the bound is of, in one batch')
  parser.add_argument('--draws', type=int, default=4, help='of the bound')
  parser.add_argument('--ode_images', type=int, default=128, help='that the ODE is of, one batch')
  parser.add_argument('--tolerance', type=float, default=1e-2, help='of the ODE, both kinds')
  parser.add_argument('--groups', type=int, nargs='*', default=[16, 256], help="of the codec's")
  parser.add_argument('--repeats', type=int, default=3, help='timed calls')
  args = parser.parse_args(argv)
  leaves = parts.arrays(args.data) if args.data else {}
  overrides = {'model.dtype': 'float32'} | {f'data.{name}': leaves[name] for name in leaves}
  workdir, repeats = args.workdir, args.repeats
  print(
    f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {workdir}\n'
  )
  print('| what | images/s | bits/dim, error over images |\n|---|---|---|')
  of = functools.partial(log_prob, workdir, overrides)
  bound = of(args.images, repeats, draws=args.draws)
  print(f'| bound, {args.draws} draws, {args.images} images | {" | ".join(bound)} |', flush=True)
  for size in args.groups:
    x_hats, tables = codec(workdir, overrides, size, repeats)
    print(f'| codec, x_hat at one level, groups of {size} | {x_hats} | |', flush=True)
  print(f'| codec, probabilities of the values of an image | {tables} | |', flush=True)
  tolerance = dict(rtol=args.tolerance, atol=args.tolerance)
  solved = of(args.ode_images, repeats, draws=1, bound='ode', **tolerance)
  name = f'ODE, tolerance {args.tolerance:g}, {args.ode_images} images'
  print(f'| {name} | {" | ".join(solved)} |', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
