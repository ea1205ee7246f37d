"""The benchmarks of an accelerator, as far as a CPU can tell."""

import functools
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import correctness, kernels, public_step
from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import page, parts
from vdm import build, data


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


def plan_of(rehearse=False, data='fashion_mnist.npz'):
  return parts.Plan(pathlib.Path('/out'), data, 4.0, rehearse)


def module(folder, name, text, needs=''):
  (folder / f'{name}.py').write_text(text)
  return parts.Part(name, name, (), 0, 60, (('PYTHONPATH', str(folder)),), needs)


@pytest.mark.slow
def test_a_part_is_stopped_at_its_limit_and_what_it_has_printed_is_kept(tmp_path):
  text = 'import time\nprint("{\\"a\\": 1}", flush=True)\ntime.sleep(60)'
  result = accelerator.run(module(tmp_path, 'slow', text), 3)
  assert result['status'] == -15 and result['result'] == {'a': 1} and result['seconds'] < 20
  assert page.status_of(result) == 'stopped at its limit' and page.failed(result)


def test_results_are_kept_after_each_part_and_not_made_twice(tmp_path, monkeypatch):
  given = [
    module(tmp_path, 'good', 'print("noise")\nprint("{\\"value\\": 3}")'),
    module(tmp_path, 'bad', 'raise ValueError("no such thing")'),
  ]
  monkeypatch.setattr(accelerator, 'all_parts', lambda *_: given)
  out = tmp_path / 'out'
  assert accelerator.main(['--out', str(out)]) == 1
  first = json.loads((out / 'results.json').read_text())['parts']
  assert first['good']['result'] == {'value': 3} and first['bad']['status'] == 1
  assert 'no such thing' in first['bad']['log']
  text = (out / 'RESULTS.md').read_text()
  assert '| bad | `PYTHONPATH=' in text and 'failed, status 1' in text and '"value": 3' in text
  (tmp_path / 'good.py').write_text('raise SystemExit(2)')  # is not run again
  (tmp_path / 'bad.py').write_text('print("fine")')
  assert accelerator.main(['--out', str(out)]) == 0
  again = json.loads((out / 'results.json').read_text())['parts']
  assert again['good'] == first['good'] and again['bad']['result'] == 'fine'


def test_with_no_time_left_nothing_is_started(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(accelerator, 'run', lambda *_: pytest.fail('started'))
  assert accelerator.main(['--out', str(tmp_path), '--minutes=0.1']) == 0
  assert 's are left, and it takes' in capsys.readouterr().err


def test_a_part_has_what_is_left_at_most_and_is_not_begun_without_what_it_takes(
  tmp_path, monkeypatch
):
  given = [
    module(tmp_path, 'long', '')._replace(expected=30, limit=500),
    module(tmp_path, 'longer', '')._replace(expected=50, limit=500),
    module(tmp_path, 'short', '')._replace(expected=5, limit=7),
  ]
  monkeypatch.setattr(accelerator, 'all_parts', lambda *_: given)
  ran = {}

  def run(part, seconds):
    ran[part.name] = seconds
    return {'status': 0, 'seconds': 0, 'cpu_seconds': 0, 'result': {}, 'log': ''}

  monkeypatch.setattr(accelerator, 'run', run)
  assert accelerator.main(['--out', str(tmp_path), '--minutes=1']) == 0
  assert list(ran) == ['long', 'short']
  assert 40 < ran['long'] <= 60 - accelerator.GRACE and ran['short'] == 7


def test_what_needs_a_run_follows_its_stop_and_is_made_again_when_it_goes_on(tmp_path, monkeypatch):
  once = 'import pathlib\npath = pathlib.Path(__file__).with_suffix(".ran")\nran = path.exists()\n'
  given = [
    module(tmp_path, 'first', 'raise SystemExit(1)'),
    module(tmp_path, 'after_first', 'print("never")', needs='first'),
    module(tmp_path, 'train', once + 'path.touch()\nraise SystemExit(0 if ran else 75)'),
    module(tmp_path, 'score', once + 'path.touch()\nprint("again" if ran else "once")', 'train'),
  ]
  monkeypatch.setattr(accelerator, 'all_parts', lambda *_: given)

  def results():
    accelerator.main(['--out', str(tmp_path / 'out')])
    return json.loads((tmp_path / 'out' / 'results.json').read_text())['parts']

  found = results()
  assert found['train']['status'] == parts.EXIT_SAVED and not page.failed(found['train'])
  assert found['score']['result'] == 'once' and 'after_first' not in found
  assert 'stopped and saved' in (tmp_path / 'out' / 'RESULTS.md').read_text()
  found = results()
  assert found['train']['status'] == 0 and found['score']['result'] == 'again'


def test_a_rehearsal_is_good_only_if_all_is_done(tmp_path, monkeypatch, capsys):
  given = [module(tmp_path, 'stopped', 'raise SystemExit(75)')]
  monkeypatch.setattr(accelerator, 'all_parts', lambda *_: given)
  assert accelerator.main(['--out', str(tmp_path / 'real')]) == 0
  rehearsed = ['--out', str(tmp_path / 'rehearsed'), '--rehearse']
  assert accelerator.main(rehearsed) == 1
  (tmp_path / 'stopped.py').write_text('')
  assert accelerator.main(rehearsed) == 0
  with pytest.raises(SystemExit):  # its parts are no measurements
    accelerator.main(rehearsed[:2])
  assert 'has the results of a rehearsal; give another folder' in capsys.readouterr().err


def test_the_run_lasts_as_long_as_it_may_at_the_rate_that_was_measured():
  name = 'step fashion_mnist_full bfloat16'
  for ms in (10.0, 29.4, 80.0):
    done = {name: {'status': 0, 'result': {'step_ms': {'median': ms}}}}
    steps = parts.num_steps(plan_of(), done)
    assert steps % (4 * parts.EPOCH) == 0
    longer = (steps + 4 * parts.EPOCH) * ms / 1000
    assert parts.START + steps * ms / 1000 < 240 < parts.START + longer / 0.95
    flags = next(p for p in parts.training(plan_of(), done) if p.name.startswith('train')).arguments
    assert f'--config.train.num_steps={steps}' in flags
  assert parts.num_steps(plan_of(), {}) == parts.num_steps(plan_of(), {name: {'status': 1}})


def test_fashion_mnist_travels_as_one_file_in_its_order(tmp_path, monkeypatch):
  shape, random = (28, 28, 1), np.random.default_rng(0)
  sources = {}
  for split, count in (('train', 70), ('eval', 26)):
    image = random.integers(0, 256, (count, *shape), np.uint8)
    sources[split] = data.of_arrays(image, label=np.arange(count) % 10)
  load = data.load
  monkeypatch.setattr(data, 'load', lambda _, split: sources[split])
  path = tmp_path / 'packed.npz'
  accelerator.pack(path, 'DIR')
  monkeypatch.setattr(data, 'load', load)
  config = importlib.import_module('vdm.configs.fashion_mnist_full').get_config()
  with config.unlocked():
    config.data.update(parts.arrays(str(path), 70), train_images=70, eval_images=26)
  for split, source in sources.items():
    found, given = (s.fetch(np.arange(len(source))) for s in (load(config.data, split), source))
    np.testing.assert_array_equal(found['image'], given['image'])
    np.testing.assert_array_equal(found['label'], given['label'])


def test_the_released_model_is_scored_on_the_file_and_is_left_as_it_is(tmp_path):
  kept = accelerator.ROOT / 'pretrained' / 'fashion_mnist_full'
  before = (kept / 'config.json').read_bytes()
  accelerator.released_model(tmp_path / 'released', '/data/packed.npz')
  config = json.loads((tmp_path / 'released' / 'config.json').read_text())
  assert parts.arrays('/data/packed.npz').items() <= config['data'].items()
  assert config | {'data': 0} == json.loads(before) | {'data': 0}
  assert (kept / 'config.json').read_bytes() == before
  params = [folder / 'params.npz' for folder in (kept, tmp_path / 'released')]
  assert params[0].read_bytes() == params[1].read_bytes()
  name = 'evaluate the released model'
  part = next(part for part in parts.all_parts(plan_of(), {}) if part.name == name)
  assert '--workdir=/out/released' in part.arguments


def test_the_plan_adds_its_minutes_up():
  all_of_it = parts.all_parts(plan_of(), {})
  lines = parts.table(all_of_it).splitlines()
  assert parts.table(all_of_it) in (accelerator.ROOT / 'launch' / 'README.md').read_text()
  assert len(lines) == 2 + len(all_of_it)
  assert float(lines[-1].split('|')[-2]) == round(sum(p.expected for p in all_of_it) / 60, 1)
  assert all(part.expected < part.limit for part in all_of_it)
  without = {p.name for p in all_of_it} - {p.name for p in parts.all_parts(plan_of(data=''), {})}
  assert without and all(
    '--data' in ' '.join(p.arguments) or 'arrays' in ' '.join(p.arguments)
    for p in all_of_it
    if p.name in without
  )


def test_every_part_names_a_module_and_a_config_that_are_there():
  for rehearse in (False, True):
    for part in parts.all_parts(plan_of(rehearse), {}):
      assert importlib.util.find_spec(part.module)
      flags = dict(a.removeprefix('--').split('=', 1) for a in part.arguments if '=' in a)
      if 'config' in flags:
        path, _, preset = flags['config'].partition(':')
        assert (accelerator.ROOT / path).exists()
        config = importlib.import_module(f'vdm.configs.{pathlib.Path(path).stem}').get_config(
          preset
        )
        for name in flags:
          if name.startswith('config.'):
            *blocks, leaf = name.split('.')[1:]
            assert leaf in functools.reduce(lambda tree, block: tree[block], blocks, config)


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
