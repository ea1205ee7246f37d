"""The pictures in docs/: what draws each of them, and whether that has changed since.

  python -m benchmarks.pictures                                # which are older than their code
  python -m benchmarks.pictures --runs=DIR weightings_loss toy2d    # draws them anew
  python -m benchmarks.pictures --runs=DIR old                 # all that are older

What takes long is kept: a run that is in DIR goes on where it stopped, or is only evaluated, and
curves of ablations are tables in docs/. docs/pictures.json has a hash of the code that drew each
picture: of the functions named below, and of what they call in the files of `DRAWING`, without
comments and docstrings. `tests/test_docs_pictures.py` compares it with the code.
"""

import argparse
import ast
import hashlib
import json
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
DRAWING = {  # module: file
  'vdm.style': 'vdm/style.py',
  'vdm.sampling.picture': 'vdm/sampling/picture.py',
  'vdm.evaluation.plots': 'vdm/evaluation/plots.py',
  'vdm.evaluation.field_plots': 'vdm/evaluation/field_plots.py',
  'vdm.evaluation.curve_plots': 'vdm/evaluation/curve_plots.py',
  'vdm.evaluation.separation': 'vdm/evaluation/separation.py',
  'vdm.codec.curve': 'vdm/codec/curve.py',
}


class Picture(NamedTuple):
  """Says how a picture is made."""

  commands: tuple[str, ...]  # RUNS is the folder of --runs
  made: str  # what they make, below that folder; of several the last by name
  code: tuple[str, ...]  # file:function, of what draws
  data: str = ''  # a table that it is drawn from


def _run(config: str, name: str, made: str, code: str, *flags: str) -> Picture:
  """A picture of the evaluation of a run."""
  train = ' '.join((f'python -m vdm.main --config=configs/{config}.py', *flags))
  train += f' --workdir=RUNS/{name}'
  evaluate = f'{train} --mode=eval --out=RUNS/{name}_eval'
  return Picture((train, evaluate), f'{name}_eval/{made}', (code,))


def _curves(name: str, plot: str, code: str) -> Picture:
  """A picture of an ablation's curves."""
  table = f'docs/{name}_curves.csv'
  command = f'python -m vdm.evaluation.curve_plots {table} RUNS/{name}'
  return Picture(
    (command,), f'{name}/{plot}.png', (f'vdm/evaluation/curve_plots.py:{code}',), table
  )


def _garments(made: str, weights: tuple[int, ...], rows: int, *flags: str) -> Picture:
  """A picture of samples of the model in the checkout."""
  common = (
    'python -m vdm.main --config=configs/fashion_mnist_full.py --mode=sample '
    f'--workdir=pretrained/fashion_mnist_full --config.sample.num_images={10 * rows} '
    f'--config.sample.batch_size={10 * rows} '
  ) + ' '.join(flags)
  guided = ' --config.sample.guidance.kind=classifier_free --config.sample.guidance.weight='
  draws = [
    f'{common} --out=RUNS/{made}_{w}' + (f'{guided}{w}' if len(weights) > 1 else '')
    for w in weights
  ]
  folders = ' '.join(f'RUNS/{made}_{w}/samples/*/' for w in weights)
  classes = 'T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,boot'
  draw = f'python examples/guidance.py RUNS/{made}.png {folders} --classes={classes} --rows={rows}'
  return Picture((*draws, draw), f'{made}.png', ('examples/guidance.py:draw',))


def _scored(made: str, other: str, count: int, code: str, *flags: str) -> Picture:
  """A picture of the likelihoods of garments and of another set; RUNS/tfds has the data."""
  flags = (
    '--config.data.dir=RUNS/tfds --config.likelihood.conditions=none',
    f'--config.likelihood.against.name=arrays --config.likelihood.against.path=RUNS/{other}.npz',
    f'--config.likelihood.against.split=[:] --config.eval.max_images={count}',
    *flags,
  )
  score = (
    'python -m vdm.main --config=configs/fashion_mnist_full.py --mode=likelihood '
    f'--workdir=pretrained/fashion_mnist_full --out=RUNS/{other} '
  ) + ' '.join(flags)
  made = f'{other}/likelihood/arrays_*/{made}'
  return Picture(('python examples/other_sets.py RUNS/tfds RUNS', score), made, (code,))


_TFDS = '--config.data.dir=RUNS/tfds'
_STAGES = tuple(
  f'python -m vdm.main --config=configs/fashion_mnist_haar.py:{stage} {_TFDS} '
  f'--workdir=RUNS/{stage} --config.train.num_steps=1935 --config.train.eval_every_steps=645 '
  '--config.checkpoint.every_steps=645'
  for stage in ('coarse2', 'details2', 'details1')
)
_LARGE = ','.join(map(str, range(9, 36)))  # runs with patches of 2 x 2 and more
_PLOTS, _FIELDS = 'vdm/evaluation/plots.py', 'vdm/evaluation/field_plots.py'
_DIGITS = 'python -m vdm.main --config=configs/digits.py --workdir=RUNS/digits'
_NET = '--config.schedule.name=learned_net'
PICTURES = {
  'digits_samples': Picture(
    (_DIGITS, f'{_DIGITS} --mode=sample --out=RUNS/digits_eval --config.sample.num_images=64'),
    'digits_eval/samples/step*.png',
    ('vdm/sampling/picture.py:image_grid',),
  ),
  'digits_training': _run('digits', 'digits', 'plots/bits_per_dim.png', f'{_PLOTS}:plot_history'),
  'digits_bits_by_log_snr': _run(
    'digits', 'digits', 'plots/diffusion_loss.png', f'{_PLOTS}:plot_bins'
  ),
  'digits_spectrum': _run('digits', 'digits', 'plots/spectrum.png', f'{_PLOTS}:plot_spectrum'),
  'digits_schedule': _run(
    'digits', 'learned_net', 'plots/schedule.png', f'{_PLOTS}:plot_schedule', _NET
  ),
  'digits_progressive': _run(
    'digits', 'learned_net', 'samples/progressive*.png', f'{_PLOTS}:plot_progressive', _NET
  ),
  'digits_superres': _run(
    'digits_superres', 'superres', 'plots/conditional.png', f'{_FIELDS}:plot_rows'
  ),
  'gaussian_fields': _run(
    'gaussian_fields', 'gaussian', 'plots/conditional.png', f'{_FIELDS}:plot_rows'
  ),
  'gaussian_fields_power': _run(
    'gaussian_fields', 'gaussian', 'plots/power.png', f'{_FIELDS}:plot_power'
  ),
  'fashion_mnist_full_samples': _garments('garments', (1,), 6),
  'fashion_mnist_guidance': _garments(
    'guided', (1, 2, 4), 3, '--config.sample.sampler.name=dpmpp_2m', '--config.sample.num_steps=32'
  ),
  'fashion_mnist_square': _scored(
    'maps_*.png',
    'square',
    10,
    f'{_PLOTS}:plot_maps',
    '--config.eval.batch_size=10 --config.likelihood.maps=10 --config.likelihood.intervals=4',
  ),
  'fashion_mnist_against_digits': _scored(
    'histograms.png',
    'digits',
    300,
    'vdm/evaluation/separation.py:plot',
    '--config.eval.batch_size=50 --config.likelihood.draws=16 --config.likelihood.maps=0',
  ),
  'fashion_mnist_codec': Picture(
    ('python -m vdm.codec.curve docs/fashion_mnist_codec.csv RUNS/fashion_mnist_codec.png',),
    'fashion_mnist_codec.png',
    ('vdm/codec/curve.py:plot',),
    'docs/fashion_mnist_codec.csv',
  ),
  'posterior': Picture(
    ('python examples/infer.py RUNS/infer',), 'infer/posterior.png', ('examples/infer.py:draw',)
  ),
  'toy2d': Picture(
    ('python examples/toy2d.py --out=RUNS/toy2d.png',), 'toy2d.png', ('examples/toy2d.py:draw',)
  ),
  'soak': Picture(
    ('python -m benchmarks.campaign.soak --out=RUNS --table=docs/soak.csv',),
    'soak.png',
    ('benchmarks/campaign/soak.py:plot',),
    'docs/soak.csv',
  ),
  'weightings_bits_per_dim': _curves('weightings', 'bits_per_dim', 'plot_lines'),
  'weightings_fd_pixels': _curves('weightings', 'fd_pixels', 'plot_lines'),
  'weightings_loss': _curves('weightings', 'loss', 'plot_lines'),
  'weightings_weight': _curves('weightings', 'weight', 'plot_panels'),
  'weightings_density': _curves('weightings', 'density', 'plot_panels'),
  'loss_grid': Picture(
    ('python -m benchmarks.loss_grid --plot=RUNS/loss_grid.png',),
    'loss_grid.png',
    ('benchmarks/loss_grid.py:plot',),
    'docs/loss_grid.csv',
  ),
  'loss_grid_samples': Picture(
    (
      'python -m vdm.ablate --config=configs/ablations/loss_grid.py --workdir=RUNS/loss_grid',
      'python -m benchmarks.loss_grid --runs=RUNS/loss_grid',
    ),
    'loss_grid/loss_grid_samples.png',
    ('benchmarks/loss_grid.py:samples',),
  ),
  'loss_grid_fashion_mnist': Picture(
    (
      'python -m benchmarks.loss_grid --table=docs/loss_grid_fashion_mnist.csv '
      '--plot=RUNS/loss_grid_fashion_mnist.png',
    ),
    'loss_grid_fashion_mnist.png',
    ('benchmarks/loss_grid.py:plot',),
    'docs/loss_grid_fashion_mnist.csv',
  ),
  'loss_grid_fashion_mnist_samples': Picture(
    (
      'python -m vdm.ablate --config=configs/ablations/loss_grid.py:fashion_mnist '
      f'--workdir=RUNS/garments_grid --config.base.data.dir=RUNS/tfds --index={_LARGE}',
      'python -m benchmarks.loss_grid --runs=RUNS/garments_grid '
      '--table=docs/loss_grid_fashion_mnist.csv',
    ),
    'garments_grid/loss_grid_samples.png',
    ('benchmarks/loss_grid.py:samples',),
  ),
  'cascade_samples': Picture(
    (
      *_STAGES,
      'python -m benchmarks.cascade RUNS/coarse2 RUNS/details2 RUNS/details1 --draws=2 '
      '--max_images=200 --out=RUNS/cascade_samples.png',
    ),
    'cascade_samples.png',
    ('vdm/sampling/picture.py:image_grid', 'benchmarks/cascade.py:as_bytes'),
  ),
  'cascade_pixels': Picture(
    (f'python -m vdm.main --config=configs/fashion_mnist.py {_TFDS} --workdir=RUNS/pixels',),
    'pixels/samples/step_*.png',
    ('vdm/sampling/picture.py:image_grid',),
  ),
  'multivariate_bits_per_dim': _curves('multivariate', 'bits_per_dim', 'plot_lines'),
  'front_cifar10': _curves('front_cifar10', 'bits_per_dim', 'plot_lines'),
  'front_fashion_mnist': _curves('front_fashion_mnist', 'bits_per_dim', 'plot_lines'),
  'schedules_loss': _curves('schedules', 'loss', 'plot_lines'),
  'schedules_density': _curves('schedules', 'density', 'plot_panels'),
}


class _File:
  """The top-level names of a file: their code, and the names that they use."""

  def __init__(self, path: pathlib.Path):
    self.text = path.read_text().splitlines()
    self.imports, self.nodes = {}, {}
    for node in ast.parse('\n'.join(self.text)).body:
      if isinstance(node, ast.ImportFrom):
        for alias in node.names:
          self.imports[alias.asname or alias.name] = f'{node.module}.{alias.name}'
      elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        self.nodes[node.name] = node
      elif isinstance(node, ast.Assign | ast.AnnAssign):
        for name in ast.walk(node):
          if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
            self.nodes[name.id] = node

  def code(self, name: str) -> str:
    """Returns the lines of a name, without comments of their own, docstrings and blanks."""
    node = self.nodes[name]
    first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))])
    kept = set(range(first, node.end_lineno + 1))
    for inner in ast.walk(node):
      if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
        kept -= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    lines = [self.text[number - 1].strip() for number in sorted(kept)]
    return '\n'.join(line for line in lines if line and not line.startswith('#'))

  def uses(self, name: str) -> set[str]:
    """Returns what a name uses: names of this file, and dotted ones of what it imports."""
    found = set()
    for node in ast.walk(self.nodes[name]):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        found.add(f'{self.imports.get(node.value.id, "")}.{node.attr}')
      elif isinstance(node, ast.Name):
        found.add(self.imports.get(node.id, node.id))
    return found - {name}


def code_of(places: tuple[str, ...], root: pathlib.Path = ROOT) -> dict[str, str]:
  """Returns the code of functions, 'file:name', and of all that they use in files that draw."""
  found, left, files = {}, list(places), {}
  while left:
    place = left.pop()
    path, _, name = place.partition(':')
    file = files.setdefault(path, None) or _File(root / path)
    files[path] = file
    found[place] = file.code(name)
    for used in file.uses(name):
      module, _, attribute = used.rpartition('.')
      other = path if used in file.nodes else DRAWING.get(module)
      if other and f'{other}:{attribute}' not in [*found, *left]:
        left.append(f'{other}:{attribute}')
  return found


def hash_of(picture: Picture, root: pathlib.Path = ROOT) -> str:
  """Returns a hash of the code that draws a picture, and of the table that it is drawn from."""
  parts = [f'{place}\n{code}' for place, code in sorted(code_of(picture.code, root).items())]
  if picture.data:
    parts.append((root / picture.data).read_text())
  return hashlib.sha256('\n\n'.join(parts).encode()).hexdigest()[:16]


def recorded() -> dict[str, str]:
  """Returns the hash that each picture was drawn with, by name."""
  return json.loads((ROOT / 'docs' / 'pictures.json').read_text())


def old() -> list[str]:
  """Returns the pictures that are older than the code that draws them."""
  known = recorded()
  return [n for n, picture in PICTURES.items() if known.get(n) != hash_of(picture)]


def draw(names: list[str], runs: pathlib.Path):
  """Runs the commands of the pictures, each once, and puts what they make into docs/."""
  runs.mkdir(parents=True, exist_ok=True)
  commands = dict.fromkeys(c for name in names for c in PICTURES[name].commands)
  for command in commands:
    typed = command.replace('RUNS', shlex.quote(str(runs)))
    print(typed, flush=True)
    subprocess.run(
      typed.replace('python ', f'{sys.executable} ', 1), shell=True, cwd=ROOT, check=True
    )
  for name in names:
    *_, made = sorted(runs.glob(PICTURES[name].made))
    shutil.copy(made, ROOT / 'docs' / f'{name}.png')
    record(name)


def record(name: str):
  """Writes that a picture was drawn by the code as it is."""
  known = {n: h for n, h in recorded().items() if n in PICTURES}
  known[name] = hash_of(PICTURES[name])
  text = json.dumps(known, indent=2, sort_keys=True) + '\n'
  (ROOT / 'docs' / 'pictures.json').write_text(text)


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit status, 1 where pictures are old."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('names', nargs='*', metavar='NAME', help="of pictures, or 'old'")
  parser.add_argument('--runs', type=pathlib.Path, help='folder of the runs that are drawn')
  args = parser.parse_args(argv)
  names = [n for name in args.names for n in (old() if name == 'old' else [name])]
  for name in set(names) - PICTURES.keys():
    parser.error(f"{name} is no picture of docs/; choose 'old', or of {', '.join(PICTURES)}")
  if not args.names:
    print('\n'.join(old()))
    return int(bool(old()))
  if args.runs is None:
    parser.error('--runs=DIR must be given with the names of pictures')
  draw(names, args.runs.absolute())
  return 0


if __name__ == '__main__':
  sys.exit(main())
