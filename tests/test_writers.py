import io
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vdm.system import writers

SCALARS = {'train/loss': 1.5, 'eval/ema_bits_per_dim': np.float32(2.25)}
GREY, RGB = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4, 1), np.full((1, 5, 6, 3), 7, 'u1')


def written(directory):
  """tag -> (step, plugin, value): a number, or (width, height, images) as TensorBoard has them."""
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  events = EventAccumulator(str(directory), size_guidance={'tensors': 0})
  events.Reload()
  found = {}
  for tag in events.Tags()['tensors']:
    *_, event = events.Tensors(tag)
    plugin, value = events.SummaryMetadata(tag).plugin_data.plugin_name, event.tensor_proto
    if plugin == 'images':
      width, height, *files = make_ndarray(value)
      images = [np.asarray(Image.open(io.BytesIO(file))).tolist() for file in files]
      found[tag] = event.step, plugin, (width, height, images)
    else:
      found[tag] = event.step, plugin, float(make_ndarray(value))
  return found


def write(writer):
  writer.write_scalars(3, SCALARS)
  writer.write_images(3, {'samples': GREY, 'plot': RGB})
  writer.close()


def test_both_writers_write_the_same_events(tmp_path):
  pytest.importorskip('tensorflow')
  write(writers.open_writer(tmp_path / 'clu'))
  write(writers.EventWriter(tmp_path / 'own'))
  own = written(tmp_path / 'own')
  assert own == written(tmp_path / 'clu')
  assert own['train/loss'] == (3, 'scalars', 1.5)
  assert own['samples'][2] == (b'4', b'3', [image[..., 0].tolist() for image in GREY])


@pytest.mark.slow
@pytest.mark.parametrize('tensorflow', [True, False])
def test_a_run_that_goes_on_has_every_step_once(tmp_path, tensorflow):
  """A process that was killed at step 9 had a checkpoint of step 6, where another goes on."""
  for start, end in ((0, 9), (6, 12)):
    session = f"""
from vdm.system import writers
if not {tensorflow}:
  writers.packages.has_tensorflow = lambda: False
writer = writers.open_writer({str(tmp_path)!r}, {start})
for step in range({start} + 1, {end} + 1):
  writer.write_scalars(step, {{'train/loss': float(step + {start})}})
writer.close()
"""
    subprocess.run([sys.executable, '-c', session], check=True)
    time.sleep(1)  # names of files have seconds
  from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

  events = EventAccumulator(str(tmp_path), tensor_size_guidance={'scalars': 0})
  events.Reload()
  assert [event.step for event in events.Tensors('train/loss')] == list(range(1, 13))
  scalars, damaged = writers.read_scalars(tmp_path)
  assert not damaged and list(scalars['train/loss']) == list(range(1, 13))
  assert scalars['train/loss'][8] == 14  # of the second


def test_a_silent_writer_writes_nothing(tmp_path):
  write(writers.open_writer(tmp_path / 'silent', silent=True))
  assert not list(tmp_path.iterdir())


HIDE = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in ('tensorflow', 'clu'):
      raise ModuleNotFoundError(f'{name} is hidden', name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == 'tensorflow' else find(name, *a)
"""


def run_without_tensorflow(text):
  command = [sys.executable, '-c', HIDE + text]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_without_tensorflow_a_run_trains_and_writes(tmp_path):
  run = run_without_tensorflow(f"""
sys.argv = ['main', '--config=configs/digits.py:debug', '--workdir={tmp_path}/run']
from absl import app
from vdm import cli, main
app.run(main.main, flags_parser=cli.parse_flags)
""")
  assert run.returncode == 0, run.stderr
  found = written(tmp_path / 'run' / 'tensorboard')
  assert {'train/loss', 'eval/ema_bits_per_dim', 'samples'} <= set(found)


def test_what_needs_tensorflow_says_so_in_a_line():
  run = run_without_tensorflow("""
from vdm.system import packages
try:
  packages.require_tensorflow('this')
except ValueError as error:
  print(error)
""")
  assert run.stdout == "this needs TensorFlow; pip install 'vdm-jax[tensorflow]'.\n", run.stderr
