"""Parameters of every config beside those of VDM's public code: a Markdown table.

  python -m benchmarks.parameters

Ours differ by what a config leaves out: the public networks all read an augmentation flag, here
only those of `augmentation_flag` do (4 x width parameters). Nothing is computed but shapes.
"""

import importlib
import pathlib

import jax
from ml_collections import ConfigDict

from vdm import build, configs

# Counted in the public code, with its schedule: 2 end points, or 3074 of a network.
PUBLIC = {
  'cifar10': 30_578_181,
  'cifar10_aug': 139_279_877,
  'imagenet32': 122_137_605,
  'imagenet64_vdm': 237_603_845,
}


def count(config: ConfigDict) -> dict[str, int]:
  """Parameters of the parts of a config's model: {'network': n, 'schedule': n}."""
  params = jax.eval_shape(build.model(config).init, jax.random.key(0))
  return {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}


def table() -> str:
  """The table, a line for each file of configs/."""
  lines = ['| config | network | schedule | in all | public code |', '|---|---|---|---|---|']
  for path in sorted(pathlib.Path(configs.__file__).parent.glob('[a-z]*.py')):
    counts = count(importlib.import_module(f'vdm.configs.{path.stem}').get_config())
    public = f'{PUBLIC[path.stem]:,}' if path.stem in PUBLIC else ''
    numbers = [f'{n:,}' for n in (*counts.values(), sum(counts.values()))]
    lines.append(f'| {" | ".join([path.stem, *numbers, public])} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  print(table())
