"""Executes the notebooks in full, in place, and keeps what they show.

  pip install -e '.[test]'
  python notebooks/run.py                                  # all, one after the other
  python notebooks/run.py notebooks/1_first_model.ipynb    # one

They run in an empty folder of their own, so that they leave nothing behind.
"""

import argparse
import os
import pathlib
import tempfile

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
TOY = 'quick = False', 'quick = True'  # the line of the first cell that makes it small


def execute(path: pathlib.Path, quick: bool = False) -> nbformat.NotebookNode:
  """Returns a notebook with the outputs of its code, all of which ran.

  Args:
    path: of the notebook.
    quick: at toy size.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
  """
  notebook = nbformat.read(path, as_version=4)
  first = next(cell for cell in notebook.cells if cell.cell_type == 'code')
  if first.source.count(TOY[0]) != 1:
    raise ValueError(f'{path} must have {TOY[0]!r} once in its first code cell.')
  source = first.source
  first.source = source.replace(*TOY) if quick else source
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # devices are its own
  if quick:  # what there is to do is little against compiling it
    environment['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
  with tempfile.TemporaryDirectory() as folder:
    client = NotebookClient(
      notebook,
      timeout=3600,
      kernel_name='python3',
      record_timing=False,
      coalesce_streams=True,
      resources={'metadata': {'path': folder}},
    )
    client.execute(env=environment)
  first.source = source
  # what varies from machine to machine and says nothing
  notebook.metadata = {
    'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
    'language_info': {'name': 'python'},
  }
  return notebook


def main():
  """Executes the notebooks that are named, or all."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('notebooks', nargs='*', type=pathlib.Path)
  for path in parser.parse_args().notebooks or sorted(FOLDER.glob('*.ipynb')):
    notebook = execute(path)
    path.write_text(nbformat.writes(notebook) + '\n')
    print(path)


if __name__ == '__main__':
  main()
