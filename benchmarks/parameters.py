"""Parameters and FLOPs of configs, beside the published parameters: a Markdown table.

  python -m benchmarks.parameters                  # of all
  python -m benchmarks.parameters imagenet64       # of these

FLOPs are XLA's count of one image through the network, before it optimises the program. Ours
differ in parameters by what a config leaves out: the public networks all read an augmentation flag,
here only those of `augmentation_flag` do (4 x width parameters). JiT's are those of its paper, in
millions. Nothing is run.
"""

import importlib
import pathlib
import sys

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
ROUNDED = {'imagenet256_jit': 131}  # millions, as JiT's paper has them


def count(config: ConfigDict) -> dict[str, int]:
  """Parameters of the parts of a config's model: {'network': n, 'schedule': n}."""
  params = jax.eval_shape(build.model(config).init, jax.random.key(0))
  return {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}


def forward_flops(config: ConfigDict) -> float:
  """Of one image through the network; blocks in a loop, which XLA counts once, are unrolled."""
  config = config.copy_and_resolve_references()
  if 'scan_blocks' in config.model:
    config.model.scan_blocks = 'off'
  model = build.model(config)
  params = jax.eval_shape(model.init, jax.random.key(0))
  z = jax.ShapeDtypeStruct((1, *model.image_shape), 'float32')
  given = {'label': jax.ShapeDtypeStruct((1,), 'int32')}
  run = jax.jit(lambda params, z, given: model.denoiser(params, given)(z, z[:, 0, 0, 0]).eps)
  return run.lower(params, z, given).cost_analysis()['flops']


def table(names: list[str]) -> str:
  """The table, a line for each config."""
  columns = ['config', 'network', 'schedule', 'in all', 'published', 'GFLOP an image forward']
  lines = [f'| {" | ".join(columns)} |', '|' + '---|' * len(columns)]
  for name in names:
    config = importlib.import_module(f'vdm.configs.{name}').get_config()
    counts = count(config)
    public = f'{PUBLIC[name]:,}' if name in PUBLIC else ''
    public = f'{ROUNDED[name]} M' if name in ROUNDED else public
    numbers = [f'{n:,}' for n in (*counts.values(), sum(counts.values()))]
    flops = f'{forward_flops(config) / 1e9:.4g}'
    lines.append(f'| {" | ".join([name, *numbers, public, flops])} |')
  return '\n'.join(lines)


def main(argv: list[str]):
  """Prints the table of the configs named, or of all."""
  known = sorted(path.stem for path in pathlib.Path(configs.__file__).parent.glob('[a-z]*.py'))
  unknown = set(argv) - set(known)
  if unknown:
    sys.exit(f'{unknown.pop()} is no config; choose from {", ".join(known)}.')
  print(table(argv or known))


if __name__ == '__main__':
  main(sys.argv[1:])
