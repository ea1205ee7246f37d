"""A file imports only from lower levels: see the map of the files in the README."""

import ast
import pathlib

import vdm

LEVELS = [
  {'errors'},
  {'gaussian', 'schedules', 'weightings', 'times', 'ema', 'nn', 'data', 'files', 'chips', 'counts'},
  {'adaptive', 'augmented', 'guidance', 'likelihood', 'samplers'},
  {'losses', 'ode', 'state', 'writers'},
  {'parallel', 'build', 'cards'},
  {'released'},
  {'checkpoint', 'costs', 'evaluate_ode', 'fid', 'shards'},
  {
    'evaluate',
    'sample',
    'score',
    'report',
    'progressive',
    'import_vdm',
    'profile',
    'reconstruct',
    'release',
  },
  {'look'},
  {'train'},
  {'plan'},
  {'main'},
  {'ablate'},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
# gaussian is below the rest of the maths: it defines what a schedule and a denoiser are
ALLOWED_SIDEWAYS = {('schedules', 'gaussian')}
MATHS = 'gaussian schedules weightings times likelihood samplers losses ode'.split()
ROOT = pathlib.Path(vdm.__file__).parent


def imports(path):
  """Names of the vdm modules that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == 'vdm':
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('vdm.'):
      yield node.module.split('.')[1]


def test_every_file_imports_only_from_lower_levels():
  for path in ROOT.glob('*.py'):
    for name in set(imports(path)) - {'configs'}:
      if path.stem != '__init__' and (path.stem, name) not in ALLOWED_SIDEWAYS:
        assert LEVEL[name] < LEVEL[path.stem], f'{path.stem} imports {name}'


def test_fid_imports_only_from_lower_levels_and_its_own_files_in_order():
  """Its command line, __main__, is above everything, and nothing imports that."""
  files = 'statistics inception weights network classifier extractor streaming images references'
  order = [*files.split(), 'metrics', '__init__']
  assert {path.stem for path in (ROOT / 'fid').glob('*.py')} == {*order, '__main__'}
  for number, name in enumerate(order):
    path = ROOT / 'fid' / f'{name}.py'
    for module in set(imports(path)) - {'fid'}:
      assert LEVEL[module] < LEVEL['fid'], f'fid/{name} imports {module}'
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('vdm.fid'):
        _, _, *inner = node.module.split('.')
        for other in inner or [alias.name for alias in node.names]:
          assert order.index(other) < number, f'fid/{name} imports fid/{other}'


def test_maths_files_hold_no_jit_config_io_or_logging():
  level_1 = ('gaussian', 'schedules', 'weightings', 'times')
  for name in (
    *level_1,
    'adaptive',
    'augmented',
    'likelihood',
    'samplers',
    'guidance',
    'losses',
    'ode',
  ):
    text = (ROOT / f'{name}.py').read_text()
    for word in ('jax.jit', 'ml_collections', 'open(', 'logging', 'print('):
      assert word not in text, f'{name}.py has {word}'
