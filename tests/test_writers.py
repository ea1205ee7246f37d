import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vdm.system import writers
from vdm.training import tags
from vdm.workdir.config_file import flat, plain, read_config

SCALARS = {'train/loss': 1.5, 'eval/ema_bits_per_dim': np.float32(2.25)}
GREY, RGB = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4, 1), np.full((1, 5, 6, 3), 7, 'u1')


def written(directory):
  """tag -> (step, plugin, what it is, value): a number, text, or (width, height, images)."""
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  events = EventAccumulator(str(directory), size_guidance={'tensors': 0})
  events.Reload()
  found = {}
  for tag in events.Tags()['tensors']:
    *_, event = events.Tensors(tag)
    metadata, value = events.SummaryMetadata(tag), event.tensor_proto
    plugin = metadata.plugin_data.plugin_name, metadata.summary_description
    if plugin[0] == 'images':
      width, height, *files = make_ndarray(value)
      images = [np.asarray(Image.open(io.BytesIO(file))).tolist() for file in files]
      found[tag] = event.step, *plugin, (width, height, images)
    else:
      found[tag] = event.step, *plugin, make_ndarray(value).tolist()
  return found


def write(writer):
  writer.write_scalars(3, SCALARS)
  writer.write_images(3, {'samples': GREY, 'plot': RGB})
  writer.close()


def test_both_writers_write_the_same_events(tmp_path):
  pytest.importorskip('tensorflow')
  write(writers.CluWriter(tmp_path / 'clu', tags.describe))
  write(writers.EventWriter(tmp_path / 'own', tags.describe))
  own = written(tmp_path / 'own')
  assert own == written(tmp_path / 'clu')
  assert own['train/loss'] == (3, 'scalars', tags.describe('train/loss'), 1.5)
  assert own['samples'][3] == (b'4', b'3', [image[..., 0].tolist() for image in GREY])


def test_a_session_says_what_its_run_is(tmp_path):
  """As TensorBoard's plugins for text and for hyperparameters read it."""
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.plugins.hparams import metadata

  leaves = {'ema.power_stds': (0.1,), 'data.path': 'a|b', 'optimizer.learning_rate': 0.002}
  tree = plain(read_config('digits', leaves))
  about = tags.describe, tags.texts(tree), tags.hparams(tree)
  writers.open_writer(tmp_path, 6, False, *about).close()
  found = written(tmp_path)
  step, plugin, _, text = found['config/differs']
  assert (step, plugin) == (6, 'text')
  assert b'| optimizer.learning_rate | 0.002 | 0.0002 |' in text and rb'"a\|b"' in text
  whole = found['config/whole'][3]
  assert json.loads(whole) == tree
  events = EventAccumulator(str(tmp_path))
  events.Reload()
  content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
  values = metadata.parse_session_start_info_plugin_data(content).hparams
  assert values['optimizer.learning_rate'].number_value == 0.002
  assert values['ema.power_stds'].string_value == '[0.1]'
  assert values['eval.fid'].bool_value is False
  assert set(values) == set(flat(tree))


def test_files_are_read_as_tensorboard_reads_them(tmp_path):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  writer = writers.EventWriter(tmp_path)
  for step in range(6):
    writer.write_scalars(step, {'train/loss': 1 / (1 + step), 'eval/ema_loss': step})
    writer.write_images(step, {'samples': RGB})
  writer.write_images(
    6, {'large': np.random.RandomState(0).randint(0, 255, (1, 300, 300, 3), 'u1')}
  )
  writer.write_scalars(7, {'train/loss': 7.0})
  writer.close()
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  assert len(whole) > 3 * writers.LONGEST_SCALARS

  def theirs():
    events = EventAccumulator(str(tmp_path), size_guidance={'tensors': 0})
    events.Reload()
    tags = [tag for tag in events.Tags()['tensors'] if '/' in tag]
    return {
      t: {e.step: float(make_ndarray(e.tensor_proto)) for e in events.Tensors(t)} for t in tags
    }

  found, damaged = writers.read_scalars(tmp_path)
  assert found == theirs() and not damaged and list(found['train/loss']) == [0, 1, 2, 3, 4, 5, 7]
  for place in (40, 400, 700):
    content = bytearray(whole)
    content[place] ^= 4
    path.write_bytes(content)
    found, (line,) = writers.read_scalars(tmp_path)
    assert found == theirs() and path.name in line and 'curves end there' in line
  path.write_bytes(whole[:700])  # being written
  assert writers.read_scalars(tmp_path) == (theirs(), [])


def test_reading_imports_no_tensorflow(tmp_path):
  writers.open_writer(tmp_path).close()
  code = f'import sys; from vdm.system import writers; writers.read_scalars({str(tmp_path)!r})'
  code += "; assert not {'tensorflow', 'jax'} & set(sys.modules)"
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize('tensorflow', [True, False])
def test_a_run_that_goes_on_has_every_step_once(tmp_path, tensorflow):
  """A process that was killed at step 9 had a checkpoint of step 6, where another goes on."""
  for start, end in ((0, 9), (6, 12)):
    session = f"""
from vdm.system import writers
from vdm.training import tags
from vdm.workdir.config_file import flat, plain, read_config
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
  assert {'train/loss', 'eval/ema_bits_per_dim', 'samples', 'config/whole'} <= set(found)
  assert [tag for tag, facts in found.items() if facts[1] == 'scalars' and not facts[2]] == []


def test_what_needs_tensorflow_says_so_in_a_line():
  run = run_without_tensorflow("""
from vdm.system import packages
try:
  packages.require_tensorflow('this')
except ValueError as error:
  print(error)
""")
  assert run.stdout == "this needs TensorFlow; pip install 'vdm-jax[tensorflow]'.\n", run.stderr
