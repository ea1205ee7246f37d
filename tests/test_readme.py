"""What README and docs say can be typed, and what they map exists."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

import vdm
import vdm.main  # its flags
from vdm import build
from vdm.diffusion import schedules, weightings
from vdm.training.step import make_train_step

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, *sorted(ROOT.glob('docs/**/*.md')), *sorted(ROOT.glob('benchmarks/*.md'))]
pytestmark = pytest.mark.skipif(not README.exists(), reason='not in a checkout')


def blocks(language, page=README):
  return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)


def commands(text):
  """Returns the commands of the package that a text has, each as the words after its name."""
  text = re.sub(r'\\\n\s*', '', text)  # continued lines
  typed = re.findall(r'`(python -m vdm\.main [^`]*)`', text)
  typed += re.findall(r'^ *(?:.*&& )?(python -m vdm\.main .*)$', text, re.M)
  return [shlex.split(' '.join(command.split('  #')[0].split()))[3:] for command in typed]


def test_the_five_line_weighting_builds_and_traces(rank_promotion_allowed):
  (code,) = blocks('python', ROOT / 'docs' / 'extend.md')
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
    (line,) = re.findall('`(from vdm.configs.ablations.*)`', (ROOT / 'docs/extend.md').read_text())
    exec(line, scope)
    assert 'power' in scope['get_config']().axes.weighting
  finally:
    weightings.WEIGHTINGS.pop('power', None)
    schedules.SCHEDULES.pop('square', None)
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
  text = (ROOT / 'docs' / 'map.md').read_text()
  for path in pathlib.Path(vdm.__file__).parent.glob('[a-z]*.py'):
    assert f'{path.name}`' in text, path.name


def test_every_picture_of_the_docs_is_there_and_shown_somewhere():
  shown = set()
  for page in PAGES:
    for link in re.findall(r'!\[[^\]]*\]\(([^)]*)\)', page.read_text()):
      assert (page.parent / link).exists(), f'{page} shows {link}'
      shown.add((page.parent / link).resolve())
  unseen = {path.name for path in ROOT.glob('docs/*.png')} - {path.name for path in shown}
  assert not unseen


def test_links_between_pages_lead_somewhere():
  for page in [*PAGES, ROOT / 'CONTRIBUTING.md', ROOT / 'launch' / 'README.md']:
    for link in re.findall(r'\]\(([^)\s]*)\)', page.read_text()):
      place, _, heading = link.partition('#')
      if '://' in place:
        continue
      target = page.parent / place if place else page
      assert target.exists(), f'{page} links {link}'
      if heading:
        titles = re.findall(r'^#+ (.*)$', target.read_text(), re.M)
        anchors = {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}
        assert heading in anchors, f'{page} links {link}'


SOURCES = [*PAGES, ROOT / 'launch' / 'README.md', *sorted(ROOT.glob('configs/**/*.py'))]


@pytest.mark.filterwarnings('ignore:the load_module')  # of ml_collections
@pytest.mark.parametrize('page', SOURCES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_that_is_typed_somewhere_exists(page, monkeypatch):
  for words in commands(page.read_text()):
    chosen = [word for word in words if re.match(r'--config(\.|=configs/)', word)]  # not their own
    others = {word[2:].partition('=')[0] for word in words if word.startswith('--')} - {'config'}
    known = {*flags.FLAGS, *(f'no{name}' for name in flags.FLAGS if flags.FLAGS[name].boolean)}
    assert {name for name in others if not name.startswith('config.')} <= known
    if not any(word.startswith('--config=') for word in chosen):
      file = 'configs/digits.py' if 'digits' in page.name else 'configs/default.py'
      chosen.insert(0, f'--config={file}')
    chosen = [re.sub(r'=(S|T|N|SEED|SECONDS)$', '=1', word) for word in chosen]
    argv = ['', *(word.replace('=configs/', f'={ROOT}/configs/') for word in chosen)]
    monkeypatch.setattr(sys, 'argv', argv)  # ml_collections looks there for leaves
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file('config', flag_values=values)
    values(argv)
    assert config.value.name


@pytest.mark.slow
@pytest.mark.parametrize('words', [w for b in blocks('bash') for w in commands(b)], ids=' '.join)
def test_every_command_of_the_readme_runs_at_toy_size(words, tmp_path):
  rng = np.random.default_rng(0)
  for number in range(40):
    (tmp_path / 'DIR' / 'ab'[number % 2]).mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
    picture.save(tmp_path / 'DIR' / 'ab'[number % 2] / f'{number}.png')
  np.savez(tmp_path / 'FILE.npz', x=rng.normal(size=(64, 8, 8, 1)).astype(np.float32))
  typed = [re.sub(r'^(--config=[^:]*)$', r'\1:debug', word) for word in words]
  typed = [re.sub(r'^(--config=.*:large)$', r'\1_debug', word) for word in typed]
  typed = [word.replace('=FILE', '=FILE.npz') for word in typed]
  typed = [word.replace('=configs/', f'={ROOT}/configs/') for word in typed]
  done = subprocess.run(
    [sys.executable, '-m', 'vdm.main', *typed], cwd=tmp_path, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'is done' in done.stderr + done.stdout
