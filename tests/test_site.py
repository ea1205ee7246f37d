"""The site: complete in its pages, in its reference and in the code beside its formulas."""

import ast
import functools
import importlib
import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from vdm.configs import default

import vdm
from vdm import build
from vdm.training.step import make_train_step

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(DOCS.glob('**/*.md'))
THEORY = sorted(DOCS.glob('theory/*.md'))
SOURCE = re.compile(r'\[`?([\w.]+)`?\]\(((?:\.\./)+vdm/[\w/]+\.py)\)')
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason='not in a checkout')


@functools.cache
def hooks():
  spec = importlib.util.spec_from_file_location('hooks', DOCS / 'hooks.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def blocks(page):
  return re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)


def named(page):
  return str(page.relative_to(DOCS))


def test_every_page_is_in_the_navigation_once():
  navigation = (ROOT / 'mkdocs.yml').read_text().partition('\nnav:\n')[2]
  listed = re.findall(r'([\w/]+\.md)$', navigation, re.M)
  assert len(listed) == len(set(listed))
  assert {named(page) for page in PAGES} <= set(listed)
  assert all((ROOT / hooks().path_of(page)).exists() for page in listed)


def test_no_docstring_reads_as_a_link_by_reference():
  # a["x"]["y"] outside backticks is one to Markdown, and the site is built with warnings as errors
  for path in sorted(pathlib.Path(vdm.__file__).parent.rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        words = re.sub(r'```.*?```|`[^`]*`', '', ast.get_docstring(node) or '', flags=re.DOTALL)
        assert not re.search(r'\]\s?\[', words), (path, getattr(node, 'lineno', 1))


def test_every_module_is_in_the_reference():
  package = pathlib.Path(vdm.__file__).parent
  modules = set()
  for path in package.rglob('*.py'):
    parts = path.relative_to(package).with_suffix('').parts
    if parts[0] != 'configs':
      modules.add('.'.join(('vdm', *parts)).removesuffix('.__init__'))
  text = ''.join(page.read_text() for page in DOCS.glob('reference/**/*.md'))
  shown = re.findall(r'^::: ([\w.]+)$', text, re.M)
  assert len(shown) == len(set(shown))
  assert set(shown) == modules


def test_every_public_name_has_a_docstring_for_the_reference():
  """Fields and tables are shown as they are."""
  found = []
  for path in pathlib.Path(vdm.__file__).parent.rglob('*.py'):
    if 'configs' not in path.parts:
      for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != '_':
          if not ast.get_docstring(node):
            found.append(f'{path.name}: {node.name}')
  assert not found


def test_every_leaf_of_a_config_is_in_the_table():
  rows = re.findall(r'^\| `config\.([\w.]+)` \| `([^`]+)` \|', hooks().leaves(), re.M)
  found = {name: ast.literal_eval(value) for name, value in rows}
  leaves = {}

  def walk(name, block):
    for key, value in block.items():
      if isinstance(value, type(block)):
        walk(f'{name}{key}.', value)
      else:
        leaves[name + key] = value

  walk('', default.get_config())
  assert len(rows) == len(found)
  assert found == leaves


@pytest.mark.parametrize('page', THEORY, ids=named)
def test_every_equation_has_its_function(page):
  text = page.read_text()
  equations = re.findall(r'^\$\$\n.*?\n\$\$\n\n([^\n]*\n)', text, re.M | re.DOTALL)
  assert len(equations) == text.count('\n$$\n') / 2
  for following in equations:
    assert following.startswith('In code: ') and SOURCE.search(following), following
  assert equations or page.name == 'index.md'


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_links_into_the_package_name_what_exists(page):
  for text, link in SOURCE.findall(page.read_text()):
    path = (page.parent / link).resolve().relative_to(ROOT)
    module = '.'.join(path.with_suffix('').parts)
    name = hooks().identifier(text, str(path))
    value = importlib.import_module(module)
    for part in name.removeprefix(module).strip('.').split('.'):
      value = getattr(value, part) if part else value


@pytest.mark.parametrize('page', THEORY, ids=named)
def test_the_python_of_theory_runs(page):
  for block in blocks(page):
    exec(block, {})


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_python_on_pages_is_python(page):
  for block in blocks(page):
    ast.parse(block)


def text_to_image(folder, monkeypatch):
  """Makes the arrays and the config of docs/text_to_image.md; returns their config's preset."""
  monkeypatch.chdir(folder)
  arrays, config, _ = blocks(DOCS / 'text_to_image.md')
  exec(arrays, {})
  pathlib.Path('latents.py').write_text(config)
  return 'latents.py:debug'


def test_text_to_image_builds_and_traces(tmp_path, monkeypatch, rank_promotion_allowed):
  config = vdm.Experiment(text_to_image(tmp_path, monkeypatch), {'data.as_found': True}).config
  assert config.data.embedding_size == 32 and config.data.image_shape == (8, 8, 4)
  assert len(config.data.vector_scale) == 32 and len(config.data.scale) == 4
  model = build.model(config)
  state = jax.eval_shape(build.init_state(config, model))
  batch = {
    'image': jax.ShapeDtypeStruct((8, 8, 8, 4), 'float32'),
    'vector': jax.ShapeDtypeStruct((8, 32), 'float32'),
    'index': jax.ShapeDtypeStruct((8,), 'int32'),
  }
  _, metrics = jax.eval_shape(make_train_step(config, model), state, batch)
  assert metrics.scalars['loss'].shape == ()


@pytest.mark.slow
def test_text_to_image_trains_and_draws_what_captions_ask_for(
  tmp_path, monkeypatch, rank_promotion_allowed
):
  exp = vdm.Experiment(text_to_image(tmp_path, monkeypatch))
  *_, (state, _) = exp.fit(exp.init(), steps=3)  # the output starts at zero, whatever is asked
  captions = np.load('captions.npy')
  draw = lambda vector: exp.sample(state, 3, vector=vector, guidance=2.0, num_steps=2)
  latents = draw(captions)
  assert latents.shape == (3, 8, 8, 4) and np.isfinite(latents).all()
  assert not np.array_equal(latents, draw(captions[::-1]))
  assert np.isfinite(exp.log_prob(state, latents, vector=captions, draws=2).value).all()


def test_links_of_pages_are_those_of_the_site():
  """In the checkout a link leads to a file; on the site to its page, or to the reference."""
  site = hooks()

  def of(page, markdown):
    file = type('File', (), {'src_uri': page})
    return site.on_page_markdown(markdown, type('Page', (), {'file': file}))

  assert of('README.md', '[a](docs/data.md#tfds-sets)') == '[a](data.md#tfds-sets)'
  assert of('README.md', '![a](docs/soak.png)') == '![a](soak.png)'
  assert of('devices.md', '[a](../launch/README.md)') == '[a](launch.md)'
  assert of('launch.md', '[a](../benchmarks/H100.md)') == '[a](benchmarks/H100.md)'
  assert of('benchmarks/H100.md', '[a](../docs/data.md)') == '[a](../data.md)'
  assert of('install.md', '[a](../LICENSE)') == '[a](LICENSE.md)'
  assert of('map.md', '[a](https://arxiv.org/)') == '[a](https://arxiv.org/)'
  link = '[`elbo.moments`](../../vdm/diffusion/elbo.py)'
  assert of('theory/bound.md', link) == '[`elbo.moments`][vdm.diffusion.elbo.moments]'
  assert site.identifier('`Experiment.fit`', 'vdm/experiment.py') == 'vdm.experiment.Experiment.fit'
