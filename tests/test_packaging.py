"""What is installed is what lies here, under one version; the lock is that of pyproject.toml."""

import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement

import vdm

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / 'pyproject.toml').exists(), reason='not in a checkout')


@pytest.fixture
def pyproject():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def test_every_folder_is_a_package_that_is_installed(pyproject):
  setuptools = pyproject['tool']['setuptools']
  folders = {
    path.parent for top in ('vdm', 'configs', 'pretrained') for path in ROOT.glob(f'{top}/**/*.py')
  }
  names = {'.'.join(folder.relative_to(ROOT).parts) for folder in folders}
  assert set(setuptools['packages']) == {
    re.sub('^(configs|pretrained)', r'vdm.\1', name) for name in names
  }
  places = setuptools['package-dir']
  assert {name for name in setuptools['packages'] if name.startswith('vdm.configs')} < set(places)
  assert all((ROOT / place / '__init__.py').exists() for place in places.values())
  folders = {'vdm.pretrained': ROOT / 'pretrained'}
  assert setuptools['package-data'].keys() == {'vdm', 'vdm.report', 'vdm.pretrained'}
  for name, patterns in setuptools['package-data'].items():
    folder = folders.get(name, ROOT / name.replace('.', '/'))
    assert all(list(folder.glob(pattern)) for pattern in patterns), name


def test_there_is_one_version(pyproject):
  assert pyproject['project']['dynamic'] == ['version']
  assert pyproject['tool']['setuptools']['dynamic']['version'] == {'attr': 'vdm.__version__'}
  (cited,) = re.findall(r'^version: (.*)$', (ROOT / 'CITATION.cff').read_text(), re.M)
  assert cited == vdm.__version__


def test_the_lock_has_what_pyproject_asks_for(pyproject):
  """`uv lock` brings it up to date."""
  project = pyproject['project']
  asked = [Requirement(text) for text in project['dependencies']]
  asked += [Requirement(text) for of in project['optional-dependencies'].values() for text in of]
  (ours,) = [
    package
    for package in tomllib.loads((ROOT / 'uv.lock').read_text())['package']
    if package['name'] == project['name']
  ]
  locked = {(r['name'], r.get('specifier', '')) for r in ours['metadata']['requires-dist']}
  assert {(r.name, str(r.specifier)) for r in asked} == locked
  assert set(ours['metadata']['provides-extras']) == project['optional-dependencies'].keys()


def test_the_lock_names_no_index_but_pypi():
  hosts = re.findall(r'\w+://[^/"]*', (ROOT / 'uv.lock').read_text())
  assert set(hosts) == {'https://pypi.org', 'https://files.pythonhosted.org'}
