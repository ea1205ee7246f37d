"""Runs recipes at equal network, data and steps, and writes a page with their curves.

  python -m benchmarks.front --runs=DIR --data=digits --recipes=public_4e-3,muon_adaptive_fast
  python -m benchmarks.front --runs=DIR --data=cifar10 --config.base.data.dir=TFDS
  python -m benchmarks.front --runs=DIR --page=docs/front.md  # no training: adds what is in DIR

Runs are those of configs/ablations/recipe.py, in DIR/digits, DIR/fashion_mnist and DIR/cifar10, by
`vdm.ablate`, which takes the flags --config.base.*: the same command goes on where it stopped. With
--config.base.data.as_found=True another set under the name will do, and the page says so. The page
keeps its runs beside it (front_digits.json): runs of another DIR join them.

The table says in which share of the steps of a reference each other recipe comes down to the
reference's value at each of its evaluations. The reference is the best of the recipes of Adam with
learned end points that were run, the public one tuned, or --reference where a data set has it.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
from vdm.configs.ablations import recipe

from vdm.ablate import expand
from vdm.errors import require
from vdm.evaluation import grids
from vdm.evaluation.curve_plots import plot_lines
from vdm.system import files
from vdm.workdir.config_file import flat, plain, saved_config

DATA = {'digits': '', 'fashion_mnist': 'fashion_mnist', 'cifar10': 'cifar10'}  # recipe.py:...
RIVALS = 'public_', 'cosine_', 'linear_'  # the public recipe tuned: rate, warm-up, decay
SETTINGS = (  # of a run, (block, leaf): what must be equal in all rows of a table
  ('data', 'as_found'),
  ('data', 'train_images'),
  ('data', 'eval_images'),
  ('train', 'num_steps'),
  ('train', 'batch_size'),
  ('eval', 'max_images'),
  ('eval', 'draws'),
)
DECIDES = 'data.', 'model.', 'schedule.', 'optimizer.', 'train.', 'ema.', 'eval.'  # on the curves
NEUTRAL = 'data.dir', 'data.path', 'train.log_every_steps', 'eval.batch_size'  # but these
TITLES = {
  'digits': 'Digits',
  'fashion_mnist': 'Fashion-MNIST',
  'cifar10': 'CIFAR-10',
}


def indices(runs: list, recipes: list[str], seeds: int) -> list[int]:
  """Returns which runs of a grid (`ablate.expand`) have one of the recipes and the first seeds.

  Args:
    runs: of the grid, ({axis: label}, config).
    recipes: labels of the axis `recipe`; [] for all.
    seeds: how many of the axis `seed`.

  Raises:
    ValueError: the grid has no such recipe, or there is no such seed.
  """
  check_recipes(runs, '--recipes', recipes)
  require(seeds >= 1, '--seeds', seeds, '1 or more', 'leave it out for three')
  return [
    i
    for i, (labels, _) in enumerate(runs)
    if (not recipes or labels['recipe'] in recipes) and int(labels['seed']) < seeds
  ]


def check_recipes(runs: list, flag: str, names: list[str]):
  """Refuses names of a flag that are not labels of the axis `recipe` of a grid's runs."""
  known = list(dict.fromkeys(labels['recipe'] for labels, _ in runs))
  for name in names:
    require(name in known, flag, name, f'one of {", ".join(known)}', 'name one')


def curves_of(found: list[dict]) -> dict[str, np.ndarray]:
  """Returns the bound of each recipe against steps, [4 N]: steps, mean, least, greatest of seeds.

  Args:
    found: finished runs as `grids.collect` yields them.
  """
  groups: dict[str, list] = {}
  for run in found:
    groups.setdefault(run['labels']['recipe'], []).append(run['bound'])
  curves = {}
  for name, bounds in groups.items():
    steps = sorted(set.intersection(*map(set, bounds)))
    values = np.array([[bound[step] for step in steps] for bound in bounds])
    curves[name] = np.array([steps, values.mean(0), values.min(0), values.max(0)])
  return dict(sorted(curves.items(), key=lambda item: item[1][1, -1]))


def reference_of(curves: dict[str, np.ndarray], name: str) -> str:
  """Returns the recipe that others are timed against: `name`, or the best of RIVALS; or ''."""
  return name if name in curves else next((own for own in curves if own.startswith(RIVALS)), '')


def table(found: list[dict], reference: str) -> list[str]:
  """Returns the lines of a Markdown table: values at the end, shares of the reference's steps."""
  curves = curves_of(found)
  ends: dict[str, list] = {}
  for run in found:
    ends.setdefault(run['labels']['recipe'], []).append(list(run['bound'].values())[-1])
  reference = reference_of(curves, reference)
  levels = curves[reference][:2].T if reference else np.zeros((0, 2))
  units = found[0]['metric'].replace('_per_', '/')
  head = ['recipe', 'seeds', units, *(f'{level:.2f} ({step:.0f})' for step, level in levels)]
  lines = [f'| {" | ".join(head)} |', '|' + '---|' * len(head)]
  for name, (steps, mean, *_) in curves.items():
    curve = dict(zip(steps, mean, strict=True))
    shares = [grids.steps_to(curve, level) / step for step, level in levels]
    cells = ['never' if np.isnan(share) else f'{share:.2f}' for share in shares]
    shown = f'**{name}**' if name == reference else name
    value = grids.over_seeds(ends[name], '.3f', '.3f')
    lines.append(f'| {" | ".join([shown, str(len(ends[name])), value, *cells])} |')
  return lines


def records(runs: pathlib.Path, data: str) -> list[dict]:
  """Returns what the finished runs of a data set have for the page, one dict each.

  `labels`, `metric` and `bound` are as `grids.collect` has them, `settings` are SETTINGS' values,
  and `changed` the other leaves in which a run is not the grid's own, but for where things are.

  Args:
    runs: folder of --runs.
    data: one of DATA.
  """
  found, grid = [], expand(recipe.get_config(DATA[data]))
  by_name = {grids.folder(labels): flat(plain(config)) for labels, config in grid}
  for run in grids.collect(runs / data, grid):
    folder = grids.folder(run['labels'])
    leaves, own = flat(saved_config(runs / data / folder)), by_name[folder]
    settings = {leaf: leaves[f'{block}.{leaf}'] for block, leaf in SETTINGS}
    told = {f'{block}.{leaf}' for block, leaf in SETTINGS}
    changed = {
      leaf: value
      for leaf, value in leaves.items()
      if leaf in own and value != own[leaf]
      if leaf.startswith(DECIDES) and leaf not in (*told, *NEUTRAL)
    }
    kept = {name: run[name] for name in ('labels', 'metric', 'bound')}
    found.append(kept | {'settings': settings, 'changed': changed})
  return found


def merged(path: pathlib.Path, new: list[dict]) -> list[dict]:
  """Returns the records of a page's file with the new ones in place of those of equal labels.

  Args:
    path: a file of records as JSON, `runs`; it need not be there.
    new: other records.

  Raises:
    ValueError: their settings differ: such runs are not to be compared.
  """
  known = files.read_json(path, 'remove it')['runs'] if path.exists() else []
  for run in known:
    run['bound'] = {int(step): value for step, value in run['bound'].items()}
    run.setdefault('changed', {})  # a page is older than this
  for run in new:
    first, rule = (known or new)[0], f'as in {path}' if known else 'as in the others'
    for part in ('settings', 'changed'):
      rest = f'{first[part]}, {rule}'
      require(run[part] == first[part], '--runs', run[part], rest, 'give another --page')
  names = [run['labels'] for run in new]
  return [*(run for run in known if run['labels'] not in names), *new]


def title_of(settings: dict, data: str) -> tuple[str, list[str]]:
  """Returns a data set's title, and lines that say which set it was.

  Args:
    settings: of a record.
    data: one of DATA.
  """
  if not settings['as_found']:
    return TITLES[data], []
  sizes = (
    f'{settings["train_images"]:,} pictures for training and '
    f'{settings["eval_images"]:,} for testing'
  )
  return f'Another set under the name {data}', [f'Not {TITLES[data]}: {sizes}.', '']


def write_page(path: pathlib.Path, runs: pathlib.Path, reference: str):
  """Writes the page, and beside it of each data set its runs, their curves and a picture.

  Runs that the page has already stay on it, unless `runs` has them anew.

  Raises:
    ValueError: those of a data set differ in more than recipe and seed.
  """
  lines = [
    '# Recipes at equal steps',
    '',
    'The same network, data, steps and evaluation in every row of a table; raw parameters; ± is',
    'the standard deviation over seeds. The columns after the value are levels, with the steps in',
    'which the recipe in bold comes down to each: which share of those steps a row takes, between',
    'two evaluations by a straight line, and its first evaluation where that is below the level',
    'already. [recipe.md](recipe.md) says what the recipes are.',
  ]
  pages = {}
  for data in DATA:
    beside = path.with_name(f'{path.stem}_{data}.json')
    found = merged(beside, records(runs, data))
    if found:
      pages[data] = beside, found
  for data, (beside, found) in pages.items():
    metric, curves = found[0]['metric'], curves_of(found)
    rows = [(metric, name, *point) for name, points in curves.items() for point in points.T]
    files.write(beside, files.json_text({'runs': found}))
    files.write_table(path.with_name(f'{path.stem}_{data}_curves.csv'), grids.CURVES, rows)
    plot_lines(metric, curves, beside.with_suffix('.png'))
    seeds = len({run['labels']['seed'] for run in found})
    settings, chosen = found[0]['settings'], ','.join(curves)
    title, note = title_of(settings, data)
    flag = ' --config.base.data.as_found=True' if note else ''
    flag += ''.join(f' --config.base.{leaf}={value}' for leaf, value in found[0]['changed'].items())
    lines += [
      '',
      f'## {title}',
      '',
      *note,
      f'{settings["num_steps"]:,} steps of {settings["batch_size"]}, by',
      '',
      '```bash',
      f'python -m benchmarks.front --runs=DIR --data={data} --seeds={seeds}{flag} \\',
      f'  --recipes={chosen}',
      '```',
      '',
    ]
    lines += table(found, reference)
    lines += ['', f'![The bound against training steps, by recipe]({path.stem}_{data}.png)']
  path.write_text('\n'.join(lines) + '\n')


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--runs', type=pathlib.Path, required=True, help='folder of the runs')
  parser.add_argument(
    '--data', choices=DATA, help='to train on; without it only the page is written'
  )
  parser.add_argument('--recipes', default='', help='labels of recipe.py, by commas; all')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--workers', type=int, default=1, help='processes, on a CPU one core each')
  parser.add_argument('--reference', default='', help='recipe that others are timed against')
  parser.add_argument('--page', type=pathlib.Path, default=None, help='DIR/front.md if not given')
  args, overrides = parser.parse_known_args(argv)
  strange = [flag for flag in overrides if not flag.startswith('--config.base.')]
  if strange:
    parser.error(f'unrecognized arguments: {" ".join(strange)}')
  runs = expand(recipe.get_config(DATA[args.data or 'digits']))
  try:
    chosen = indices(runs, list(filter(None, args.recipes.split(','))), args.seeds)
    check_recipes(runs, '--reference', [args.reference] if args.reference else [])
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  status = 0
  if args.data:
    name = f'recipe.py:{DATA[args.data]}' if DATA[args.data] else 'recipe.py'
    config = pathlib.Path(recipe.__file__).with_name(name)
    command = [sys.executable, '-m', 'vdm.ablate', f'--config={config}']
    command += [f'--workdir={args.runs / args.data}', f'--workers={args.workers}']
    command += [f'--index={",".join(map(str, chosen))}']
    status = subprocess.run([*command, *overrides], check=False).returncode
    if status not in (0, 1):  # with 1 some runs failed, and the page has the others
      return status
  page = args.page or args.runs / 'front.md'
  try:
    write_page(page, args.runs, args.reference)
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(page)
  return status


if __name__ == '__main__':
  sys.exit(main())
