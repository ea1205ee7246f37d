"""Notebooks run at toy size, and the ones that are kept show what their code made in full."""

import importlib.util
import json
import pathlib
import re

import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))
NOISE = 'Warning', 'WARNING', 'INFO', 'Traceback', 'absl'
MACHINE = '/home/', '/root/', '/tmp/', '/Users/', '/work/', 'site-packages'

every_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def kinds(cell):
  """What a cell shows: 'stdout', 'image/png', ..."""
  found = set()
  for output in cell.outputs:
    found |= {output.name} if output.output_type == 'stream' else set(output.data) - {'text/plain'}
  return found


def words(output):
  """The text of an output, without its pictures."""
  data = {k: v for k, v in output.get('data', {}).items() if not k.startswith('image/')}
  return json.dumps([output.get('text', ''), data], ensure_ascii=False)


def test_they_are_numbered():
  assert [int(path.stem.partition('_')[0]) for path in NOTEBOOKS] == [1, 2, 3, 4, 5, 6]


@every_notebook
def test_what_is_kept_was_run_in_full_and_is_clean(path):
  assert path.stat().st_size < 1e6
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  code = code_of(notebook)
  assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
  assert code[0].source.count('quick = False') == 1
  assert sum('image/png' in kinds(cell) for cell in code) >= 4
  for cell in code:
    for output in cell.outputs:
      assert output.output_type != 'error' and output.get('name') != 'stderr', output
      for word in (*NOISE, *MACHINE):
        assert word not in words(output)


@every_notebook
def test_links_lead_to_files(path):
  cells = nbformat.read(path, as_version=4).cells
  text = '\n'.join(cell.source for cell in cells if cell.cell_type == 'markdown')
  links = re.findall(r'\]\((?!https?:)([^)#]+)', text)
  assert links
  for link in links:
    assert (FOLDER / link).exists(), link


@pytest.fixture(scope='module')
def run():
  spec = importlib.util.spec_from_file_location('run', FOLDER / 'run.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_at_toy_size(run, path):
  """Its cells show what the kept ones show, so that those are of this code."""
  executed, kept = run.execute(path, quick=True), nbformat.read(path, as_version=4)
  for ours, theirs in zip(code_of(executed), code_of(kept), strict=True):
    assert ours.source == theirs.source and kinds(ours) == kinds(theirs)
