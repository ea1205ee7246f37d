"""What the README says can be typed, and what it maps exists."""

import importlib
import pathlib
import re
import tomllib

import jax
import pytest

import vdm
from vdm import build
from vdm.diffusion import schedules, weightings
from vdm.training.step import make_train_step

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
pytestmark = pytest.mark.skipif(not README.exists(), reason='not in a checkout')


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', README.read_text(), re.DOTALL)


def test_the_five_line_weighting_builds_and_traces(rank_promotion_allowed):
  (code,) = blocks('python')
  scope = {}
  try:
    exec(code, scope)
    config = scope['get_config']('debug')
    model = build.model(config)
    state = jax.eval_shape(build.init_state(config, model))
    batch = {
      'image': jax.ShapeDtypeStruct((8, 8, 8, 1), 'uint8'),
      'label': jax.ShapeDtypeStruct((8,), 'int32'),
      'index': jax.ShapeDtypeStruct((8,), 'int32'),
    }
    _, metrics = jax.eval_shape(make_train_step(config, model), state, batch)
    assert metrics.scalars['loss'].shape == ()
  finally:
    weightings.WEIGHTINGS.pop('power', None)
  assert 'mine' not in schedules.SCHEDULES


def test_there_is_one_command_to_run_and_one_to_test():
  for name, part in (('main', '--config=configs/digits.py'), ('test', 'pytest')):
    (command,) = blocks(f'bash {name}')
    assert part in command and len(command.strip().splitlines()) == 1


def test_what_is_installed_has_the_name_and_the_extras_that_are_typed():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert project['name'] == 'vdm-jax' and 'version' in project['dynamic']
  module, _, function = project['scripts']['vdm'].partition(':')
  assert callable(getattr(importlib.import_module(module), function))
  files = [README, *ROOT.glob('vdm/**/*.py'), *ROOT.glob('launch/**/*'), *ROOT.glob('docs/*.md')]
  text = ''.join(path.read_text() for path in files if path.is_file())
  typed = re.findall(r"""['"](\.|vdm[\w-]*)\[(\w+)\]['"]""", text)
  assert {name for name, _ in typed} == {'.', 'vdm-jax'}
  assert {extra for _, extra in typed} <= project['optional-dependencies'].keys()


def test_map_names_every_file():
  text = README.read_text()
  for path in pathlib.Path(vdm.__file__).parent.glob('[a-z]*.py'):
    assert f'{path.name}`' in text, path.name


def test_every_picture_of_the_docs_is_there_and_shown_somewhere():
  pages = [README, *ROOT.glob('docs/*.md'), *ROOT.glob('benchmarks/*.md')]
  shown = set()
  for page in pages:
    for link in re.findall(r'!\[[^\]]*\]\(([^)]*)\)', page.read_text()):
      assert (page.parent / link).exists(), f'{page} shows {link}'
      shown.add((page.parent / link).resolve())
  unseen = {path.name for path in ROOT.glob('docs/*.png')} - {path.name for path in shown}
  assert not unseen
