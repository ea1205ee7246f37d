import ast
import importlib.util
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vdm
from vdm.diffusion.decoders import discrete
from vdm.sampling.folder import open_samples, write_shard

TOY = pathlib.Path(__file__).parents[1] / 'examples' / 'toy2d.py'


def test_the_toy_is_short_and_uses_the_maths_alone():
  text = TOY.read_text()
  assert len(text.splitlines()) <= 130
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.ImportFrom) and node.module.startswith('vdm'):
      drawn = [alias.name for alias in node.names] == ['style']  # and the look of its picture
      assert node.module.startswith('vdm.diffusion') or drawn


def example(name):
  spec = importlib.util.spec_from_file_location(name, TOY.with_name(f'{name}.py'))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def toy(rank_promotion_allowed):
  return example('toy2d')


def test_the_toy_learns(toy):
  network = toy.Network().init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))
  params = start = {'network': network, 'schedule': toy.LEARNED.init()}
  opt_state, history = toy.OPTIMIZER.init(params), []
  for i in range(150):
    params, opt_state, (loss, _) = toy.step(params, opt_state, jax.random.key(i))
    history.append(float(loss))
  assert np.mean(history[-20:]) < 0.8 * np.mean(history[:5])
  for name in ('log_snr_max', 'slope'):
    assert params['schedule'][name] == start['schedule'][name]
  assert (
    np.abs(params['schedule']['interior']['a'] - start['schedule']['interior']['a']).max() > 0.01
  )


def test_samples_by_class_and_guidance_become_one_picture(tmp_path):
  for weight in (1.0, 4.0):
    images = np.random.default_rng(0).integers(0, 17, (8, 8, 8, 1))
    folder = tmp_path / str(weight)
    open_samples(
      folder,
      {'guidance': {'weight': weight}, 'num_values': 17, 'num_images': 8, 'batch_size': 8}
      | {'format': 'npz'},
    )
    write_shard(folder, 'npz', 0, images, discrete(17))
  picture = tmp_path / 'picture.png'
  script = TOY.with_name('guidance.py')
  command = [sys.executable, script, picture, tmp_path / '1.0', tmp_path / '4.0', '--classes=a,b,c']
  subprocess.run([*command, '--rows=2'], check=True)
  width, height = Image.open(picture).size
  assert width > 150 and height > 150


@pytest.mark.slow
def test_samples_of_a_run_become_one_picture(tmp_path, monkeypatch, capsys):
  main, picture = example('sample').main, tmp_path / 'picture.png'
  exp = vdm.Experiment('digits:debug')
  exp.save(exp.init(), tmp_path / 'run')
  monkeypatch.setattr(sys, 'argv', ['sample.py', str(tmp_path / 'run'), f'--out={picture}'])
  main()
  with Image.open(picture) as image:
    width, height = image.size  # 8 by 8 of 8 pixels and frames, enlarged by a whole number
    assert width == height >= 640
    assert len(image.getcolors()) > 2
  monkeypatch.setattr(sys, 'argv', ['sample.py', str(tmp_path / 'nowhere')])
  with pytest.raises(SystemExit):
    main()
  assert 'nowhere holds no' in capsys.readouterr().err
