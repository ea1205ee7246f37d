"""Files that are damaged, missing or a stranger's, and disks that are full: one line each."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from vdm.configs import digits

from vdm import build, cards
from vdm.data.pictures import decode
from vdm.sampling.draw import make_sampler
from vdm.system import files, parallel
from vdm.training import loop
from vdm.workdir import checkpoint
from vdm.workdir.load import read_run

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def config_of(**leaves):
  config = digits.get_config('debug')
  config.update_from_flattened_dict({'eval.max_images': 8, 'optimizer.decay': 'constant'} | leaves)
  return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run with checkpoints of steps 2 and 4."""
  workdir = tmp_path_factory.mktemp('run')
  with jax.numpy_rank_promotion('allow'):
    assert loop.train(config_of(), workdir) == 0
  return workdir


def copy(finished, tmp_path):
  return pathlib.Path(shutil.copytree(finished, tmp_path / 'copy'))


@pytest.mark.slow
def test_reading_passes_over_a_broken_newest_checkpoint_and_renames_nothing(
  finished, tmp_path, caplog
):
  workdir = copy(finished, tmp_path)
  (workdir / 'checkpoints/4/manifest/metadata').write_text('{"metrics": {}}')
  assert int(read_run(config_of(), workdir).state.step) == 2
  assert 'checkpoints/4 is broken and is passed over' in caplog.text
  assert sorted(os.listdir(workdir / 'checkpoints')) == ['2', '4']
  with pytest.raises(ValueError, match=r'checkpoints/4 is broken \(.*\); put back a whole copy'):
    read_run(config_of(), workdir, '4')


@pytest.mark.slow
@pytest.mark.parametrize('content', ['', '{"metric": "bits_per_dim", "val', '[]', 'null', '{}'])
def test_a_damaged_card_stops_nothing(content, finished, tmp_path, caplog):
  workdir = copy(finished, tmp_path)
  card = sorted((workdir / 'cards').glob('*.json'))[0]
  card.write_text(content)
  assert loop.train(config_of(**{'train.num_steps': 5}), workdir) == 0
  assert f'{card} ' in caplog.text


@pytest.mark.slow
def test_a_card_without_what_a_series_needs_is_passed_over(finished, tmp_path, caplog):
  workdir = copy(finished, tmp_path)
  for number, path in enumerate(sorted((workdir / 'cards').glob('*.json'))):
    card = json.loads(path.read_text())
    for field in ('step', 'data', 'bound', 'num_images')[number % 4 :][:1]:
      del card[field]
    path.write_text(json.dumps(card))
  assert cards.series(workdir) == {} and cards.last_result(workdir) == ''
  assert 'cannot be read' in caplog.text


@pytest.mark.slow
def test_checkpoints_without_a_config_are_refused(finished, tmp_path):
  workdir = copy(finished, tmp_path)
  (workdir / 'config.json').unlink()
  with pytest.raises(ValueError, match=r'holds checkpoints without config.json.*restore that'):
    loop.train(config_of(), workdir)
  assert not (workdir / 'config.json').exists()


def test_no_room_for_a_checkpoint_is_said_before_it_is_begun(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  manager = checkpoint.manager(tmp_path, 1)
  assert checkpoint.save(manager, 1, {'params': jnp.zeros(10)})
  manager.wait_until_finished()
  with pytest.raises(files.NoSpace, match=r'has 3.000 MB left, and a checkpoint takes 6.400 MB'):
    checkpoint.save(manager, 2, {'params': jnp.zeros(1_000_000)})
  assert checkpoint.latest_step(manager) == 1


def has_namespaces():
  unshare = shutil.which('unshare')
  return unshare and subprocess.run([unshare, '-rm', 'true'], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_namespaces(), reason='no mounts of its own for this user')
@pytest.mark.parametrize('kilobytes', [40, 3200])
def test_a_full_disk_is_one_line_and_there_is_room_later(kilobytes, tmp_path):
  main = f'{sys.executable} -m vdm.main --config=configs/digits.py:debug --workdir={tmp_path}/m/w'
  (tmp_path / 'm').mkdir()
  script = f'mount -t tmpfs -o size={kilobytes}k none {tmp_path}/m && {main}; status=$?; '
  script += f'cp -r {tmp_path}/m/w {tmp_path}/w; exit $status'
  command = ['unshare', '-rm', 'sh', '-c', script]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
  text = done.stdout + done.stderr
  assert done.returncode == 1 and 'Traceback' not in text, text
  assert 'left, and a checkpoint takes' in text or 'No space left on device' in text
  again = [*main.split()[:-1], f'--workdir={tmp_path}/w']
  assert subprocess.run(again, cwd=ROOT, capture_output=True, timeout=500).returncode == 0


def test_samples_that_are_not_finite_are_not_drawn_as_black_pictures():
  config = config_of()
  model = build.model(config)
  params = jax.tree.map(lambda a: a * jnp.nan, model.init(jax.random.key(0)))
  with pytest.raises(FloatingPointError, match='samples 0 to 7 are not finite; choose another'):
    next(make_sampler(config, model, parallel.make_mesh())(params))


def npz(**arrays):
  return files.content(lambda file: np.savez(file, **arrays))


def test_an_array_larger_than_its_file_is_never_made(tmp_path):
  header = io.BytesIO()
  wrong = {'descr': '<f8', 'fortran_order': False, 'shape': (10**9, 10**6)}
  np.lib.format.write_array_header_1_0(header, wrong)
  path = tmp_path / 'huge.npz'
  with files.zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.npy', header.getvalue() + bytes(16))
  with pytest.raises(files.Damaged, match=rf'{path} cannot be read \(a.npy declares 8000000000000'):
    files.read_arrays(path)


def test_no_code_is_loaded_from_arrays(tmp_path):
  path = tmp_path / 'objects.npz'
  path.write_bytes(npz(a=np.array([print], dtype=object)))
  with pytest.raises(files.Damaged, match='Object arrays cannot be loaded'):
    files.read_arrays(path)


@pytest.mark.parametrize('number', range(60))
def test_any_damage_to_an_npz_file_is_one_line_or_none(number, tmp_path):
  rng = np.random.default_rng(number)
  content = bytearray(npz(a=np.arange(50.0), facts=np.array(json.dumps({'x': 1}))))
  place = rng.integers(len(content))
  content = content[:place] if number % 2 else content
  if number % 2 == 0:
    content[place] ^= 1 << rng.integers(8)
  path = tmp_path / 'a.npz'
  path.write_bytes(content)
  try:
    arrays = files.read_arrays(path)
  except files.Damaged as error:
    assert str(path) in str(error) and '\n' not in str(error)
  else:
    np.testing.assert_array_equal(arrays['a'], np.arange(50.0))


def test_a_picture_is_decoded_by_a_format_that_is_named(tmp_path):
  path = tmp_path / 'picture.png'
  path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n')
  with pytest.raises(ValueError, match=rf'{path} cannot be read \(cannot identify image'):
    decode(path, str(path))
  Image.new('RGB', (2, 2)).save(tmp_path / 'good.png')
  assert decode(tmp_path / 'good.png', 'good').shape == (2, 2, 3)


def test_a_picture_that_declares_millions_of_rows_is_refused(tmp_path):
  path = tmp_path / 'huge.png'
  Image.new('L', (2, 2)).save(path)
  content = bytearray(path.read_bytes())
  content[16:24] = (60_000).to_bytes(4, 'big') * 2
  path.write_bytes(content + bytes(8))
  with pytest.raises(ValueError, match=rf'{path} cannot be read'):
    decode(path, str(path))


def test_compiled_programs_are_not_read_from_a_workdir(finished):
  assert not (finished / 'xla_cache').exists()
