"""Folders are levels: see docs/map.md."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import vdm

ROOT = pathlib.Path(vdm.__file__).parent
# A folder or file of a level imports from the levels before it, and a folder from itself.
LEVELS = (
  'errors',
  'diffusion nn system',
  'data build cards style',
  'cli workdir',
  'sampling fid',
  'evaluation',
  'codec training',
  'planning ablate experiment report',
  'main',
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names.split()}
FOLDERS = sorted(path.parent.name for path in ROOT.glob('*/__init__.py') if path.parent != ROOT)
FOLDERS = [name for name in FOLDERS if name not in ('configs', 'pretrained')]


def imports(path):
  """Yields what a file imports of vdm, as tuples: ('data', 'tfds'), ('cards',)."""
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'vdm':
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names if alias.name.startswith('vdm.')]
    for name in names:
      first, *rest = name.split('.')[1:]
      if first in FOLDERS and rest and not (ROOT / first / f'{rest[0]}.py').exists():
        rest = ['__init__']  # a name of the folder's face
      yield (first, rest[0] if rest else '__init__') if first in FOLDERS else (first,)


def test_the_listing_is_that_of_the_levels():
  files = {path.stem for path in ROOT.glob('*.py')} - {'__init__'}
  assert files | set(FOLDERS) == set(LEVEL)


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
  place = path.relative_to(ROOT).with_suffix('').parts
  if place == ('__init__',) or place[0] in ('configs', 'pretrained'):
    return  # the face, whose names are loaded when asked for
  for found in set(imports(path)):
    if found[0] in ('configs', 'pretrained'):
      continue
    if found[0] != place[0]:
      assert LEVEL[found[0]] < LEVEL[place[0]], f'imports {".".join(found)}'
    else:
      order = __import__(f'vdm.{place[0]}', fromlist=['ORDER']).ORDER
      assert order.index(found[1]) < order.index(place[1]), f'imports {".".join(found)}'


@pytest.mark.parametrize('folder', FOLDERS)
def test_the_order_of_a_folder_has_all_its_files(folder):
  order = __import__(f'vdm.{folder}', fromlist=['ORDER']).ORDER
  assert sorted(order) == sorted(path.stem for path in (ROOT / folder).glob('*.py'))


def test_the_maths_hold_no_jit_config_io_or_logging():
  for path in (ROOT / 'diffusion').glob('*.py'):
    for word in ('jax.jit', 'ml_collections', 'open(', 'logging', 'print('):
      assert word not in path.read_text(), f'{path.name} has {word}'


def test_the_map_is_the_listing():
  text = (ROOT.parent / 'docs' / 'map.md').read_text()
  found = set(re.findall(r'`vdm/([\w/]+?)(?:/|\.py)`', text))
  names = {name for line in re.findall(r'^\| `vdm/\w+/` \|.*$', text, re.M) for name in [line]}
  assert set(LEVEL) <= found
  for line in names:
    folder = re.match(r'\| `vdm/(\w+)/`', line)[1]
    files = set(re.findall(r'`(\w+)`', line)) - {folder}
    assert files >= {path.stem for path in (ROOT / folder).glob('[a-z]*.py')}, folder


@pytest.mark.parametrize(
  ('module', 'absent'),
  [
    ('vdm', 'jax numpy matplotlib tensorflow'),
    ('vdm.main', 'jax matplotlib.pyplot tensorflow'),
    ('vdm.diffusion.elbo', 'flax optax orbax diffrax matplotlib tensorflow'),
    ('vdm.fid.metrics', 'flax optax orbax diffrax matplotlib tensorflow'),
    ('vdm.training.loop', 'tensorflow sklearn tensorflow_datasets matplotlib.pyplot'),
  ],
)
def test_imports_are_quiet(module, absent):
  """What is heavy is imported where it is used."""
  code = f'import sys, {module}; print([m for m in {absent.split()} if m in sys.modules])'
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == '[]'


def test_few_functions_take_the_whole_config():
  """77 did once. A function takes what it uses: a block, or better what was built from it."""
  found = []
  for path in ROOT.rglob('*.py'):
    if 'configs' in path.parts:
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        names = {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
        if names & {'config', 'given'}:
          found.append(f'{path.relative_to(ROOT)}: {node.name}')
  assert len(found) <= 20, sorted(found)


# Words that end in s as verbs do.
NOT_VERBS = tuple('Bits Classes Curves Images Means Nats Params Paths Pixels Steps This'.split())


def test_docstrings_begin_with_a_verb():
  """'Returns ...', 'Draws ...': not 'Of ...', not 'Whether ...', not a bare noun."""
  found = []
  for path in ROOT.rglob('*.py'):
    if 'configs' in path.parts:
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        verb = re.match(r'[A-Z][a-z]+s\b', ast.get_docstring(node))
        if not verb or verb[0] in NOT_VERBS:
          found.append(f'{path.relative_to(ROOT)}:{node.lineno} {node.name}')
  assert not found, '\n'.join(sorted(found))
