"""The bounds of one trained model on the same images, from the loosest to the tightest.

  python -m benchmarks.tightening pretrained/digits --num_images=200 --tolerance=1e-3

The variational bound, and the probability-flow ODE with K importance samples of the dequantisation,
all by `Experiment.log_prob`, in bits/dim. Differences are of the same images.
"""

import argparse
import time

import numpy as np

import vdm


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir')
  parser.add_argument('--num_images', type=int, default=200)
  parser.add_argument('--draws', type=int, default=64, help='of the variational bound')
  parser.add_argument('--samples', type=int, nargs='+', default=[1, 8, 64], help='K')
  parser.add_argument('--tolerance', type=float, help="of the ODE, if not the run's")
  args = parser.parse_args()
  vdm.use_cores()
  exp, state = vdm.load(args.workdir)
  images = exp.source('eval').fetch(np.arange(args.num_images))['image']
  per_dim = images[0].size * exp.model.decoder.nats_per_unit
  tolerance = dict(rtol=args.tolerance, atol=args.tolerance) if args.tolerance else {}
  kinds = {'ELBO': dict(draws=args.draws)}
  for count in args.samples:
    kinds[f'ODE, K = {count}'] = dict(draws=1, bound='ode', importance_samples=count) | tolerance
  before = None
  print(
    f'| bound, {len(images)} images | {exp.model.decoder.unit} | less the row above | seconds |'
  )
  print('|---|---|---|---|')
  for name, settings in kinds.items():
    began = time.monotonic()
    values = -exp.log_prob(state, images, **settings).value / per_dim
    cells = [f'{values.mean():.4f}', '', f'{time.monotonic() - began:.0f}']
    if before is not None:
      change = values - before
      cells[1] = f'{change.mean():+.4f} ± {change.std(ddof=1) / len(change) ** 0.5:.4f}'
    print(f'| {name} | {" | ".join(cells)} |', flush=True)
    before = values


if __name__ == '__main__':
  main()
