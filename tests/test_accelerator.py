"""The benchmarks of an accelerator, as far as a CPU can tell."""

import functools
import json

import jax
import numpy as np
import pytest

from benchmarks import accelerator, correctness, kernels, public_step
from vdm import build


def test_the_port_of_the_public_network_is_of_the_published_size(rank_promotion_allowed):
  network = public_step.ScoreNetwork(128, 32, train=False)
  params = jax.eval_shape(lambda: public_step.init(network, (32, 32, 3)))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 30_578_181


def test_the_port_starts_as_z_and_at_its_exact_loss(rank_promotion_allowed):
  """eps_hat = z at first, so that for one level the loss is known but for its noise."""
  network, shape = public_step.ScoreNetwork(32, 1, train=False), (8, 8, 3)
  params = jax.jit(lambda: public_step.init(network, shape))()
  z = jax.random.normal(jax.random.key(1), (2, *shape))
  eps_hat = jax.jit(network.apply)({'params': params['network']}, z, np.zeros(2, 'f'))
  np.testing.assert_allclose(eps_hat, z, atol=1e-6)
  images = np.random.default_rng(0).integers(0, 256, (64, *shape)).astype(np.uint8)
  keys = jax.random.split(jax.random.key(2), 8)
  loss = jax.jit(functools.partial(public_step.loss, network, train=False))
  found = np.mean([loss(params, images, key) for key in keys])
  # E |eps - alpha f - sigma eps|^2 = (1 - sigma)^2 + alpha^2 E f^2 per dimension, over gamma
  gamma = np.linspace(*public_step.GAMMA, 100_001)
  sigma = np.sqrt(1 / (1 + np.exp(-gamma)))
  square = np.mean(((2 * images + 1.0) / 256 - 1) ** 2)
  diffusion = np.trapezoid((1 - sigma) ** 2 + (1 - sigma**2) * square, gamma) / 2 / np.log(2)
  assert abs(found - diffusion) < 0.02 * diffusion + 0.012  # 0.012: the other two terms


@pytest.mark.parametrize(
  'kernel, name',
  [
    ('sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc', 'convolutions'),
    ('nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT', 'matrix products'),
    ('input_add_reduce_select_fusion_1', 'reductions'),
    ('loop_dynamic_slice_slice_fusion', 'other fusions'),
    ('MemcpyD2D', 'copies'),
    ('cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma', 'attention'),
    ('something', 'rest'),
  ],
)
def test_kernels_have_classes(kernel, name):
  assert kernels.class_of(kernel) == name


def test_a_cpu_has_no_kernels():
  run = jax.jit(lambda: jax.numpy.ones(3) + 1)
  assert kernels.by_class(run, 1) == {'ms': {}, 'longest': {}}


def module(folder, name, text):
  (folder / f'{name}.py').write_text(text)
  return accelerator.Part(name, name, (), 60, (('PYTHONPATH', str(folder)),))


@pytest.mark.slow
def test_a_part_is_stopped_at_its_limit_and_what_it_has_printed_is_kept(tmp_path):
  text = 'import time\nprint("{\\"a\\": 1}", flush=True)\ntime.sleep(60)'
  result = accelerator.run(module(tmp_path, 'slow', text), 3)
  assert result['status'] == -15 and result['result'] == {'a': 1} and result['seconds'] < 20
  assert accelerator.status_of(result) == 'stopped at its limit'


def test_results_are_kept_after_each_part_and_not_made_twice(tmp_path, monkeypatch):
  parts = [
    module(tmp_path, 'good', 'print("noise")\nprint("{\\"value\\": 3}")'),
    module(tmp_path, 'bad', 'raise ValueError("no such thing")'),
  ]
  monkeypatch.setattr(accelerator, 'all_parts', lambda *_: parts)
  out = tmp_path / 'out'
  assert accelerator.main(['--out', str(out)]) == 1
  first = json.loads((out / 'results.json').read_text())['parts']
  assert first['good']['result'] == {'value': 3} and first['bad']['status'] == 1
  assert 'no such thing' in first['bad']['errors']
  page = (out / 'RESULTS.md').read_text()
  assert '| bad | `PYTHONPATH=' in page and 'failed, status 1' in page and '"value": 3' in page
  (tmp_path / 'good.py').write_text('raise SystemExit(2)')  # is not run again
  (tmp_path / 'bad.py').write_text('print("fine")')
  assert accelerator.main(['--out', str(out)]) == 0
  again = json.loads((out / 'results.json').read_text())['parts']
  assert again['good'] == first['good'] and again['bad']['result'] == 'fine'


def test_with_no_time_left_nothing_is_started(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(accelerator, 'run', lambda *_: pytest.fail('started'))
  assert accelerator.main(['--out', str(tmp_path), '--minutes=0.1']) == 0
  assert 'no time is left' in capsys.readouterr().err


def test_every_part_names_a_module_and_a_config_that_are_there():
  for rehearse in (False, True):
    for part in accelerator.all_parts(rehearse):
      assert part.module.startswith('benchmarks.')
      for argument in part.arguments:
        if argument.startswith('--config='):
          path = argument.removeprefix('--config=').partition(':')[0]
          assert (accelerator.ROOT / path).exists()


@pytest.mark.parametrize('name', correctness.CASES)
def test_every_case_of_correctness_is_a_model(name):
  config = correctness.config_of(*correctness.CASES[name])
  model = build.model(config)
  assert jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.slow
def test_relative_errors_are_none_of_equal_programs_and_small_of_bfloat16():
  """A CPU beside itself: its bits agree in float32, and bfloat16 has its eight of them."""
  found = correctness.relative_errors('digits', {'model.name': 'mlp'}, jax.devices('cpu')[0])
  assert all(value == 0 for value in found['float32'].values())
  assert 1e-6 < found['bfloat16']['eps_hat'] < 0.02 and found['bfloat16']['gradient'] < 0.1
