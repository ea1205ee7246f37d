"""What is installed is what lies here, under one version."""

import pathlib
import re
import tomllib

import pytest

import vdm

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / 'pyproject.toml').exists(), reason='not in a checkout')


@pytest.fixture
def pyproject():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def test_every_folder_is_a_package_that_is_installed(pyproject):
  setuptools = pyproject['tool']['setuptools']
  folders = {path.parent for top in ('vdm', 'configs') for path in ROOT.glob(f'{top}/**/*.py')}
  names = {'.'.join(folder.relative_to(ROOT).parts) for folder in folders}
  assert set(setuptools['packages']) == {re.sub('^configs', 'vdm.configs', name) for name in names}
  places = setuptools['package-dir']
  assert {name for name in setuptools['packages'] if name.startswith('vdm.configs')} < set(places)
  assert all((ROOT / place / '__init__.py').exists() for place in places.values())
  assert setuptools['package-data'] == {'vdm': ['py.typed']} and (ROOT / 'vdm/py.typed').exists()


def test_there_is_one_version(pyproject):
  assert pyproject['project']['dynamic'] == ['version']
  assert pyproject['tool']['setuptools']['dynamic']['version'] == {'attr': 'vdm.__version__'}
  (cited,) = re.findall(r'^version: (.*)$', (ROOT / 'CITATION.cff').read_text(), re.M)
  assert cited == vdm.__version__
