"""Benchmarks on the digits' debug config: what they count and print, and all of them in turn."""

import importlib
import itertools
import json
import math
import pathlib
import re
import subprocess

import jax
import pytest
from ml_collections import ConfigDict

from vdm import build

NUM_DEVICES = 8


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


@pytest.fixture
def benchmark(monkeypatch):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1])
  return lambda name: importlib.import_module(f'benchmarks.{name}')


@pytest.fixture
def train_step(benchmark):
  return benchmark('train_step')


@pytest.fixture
def config():
  config = importlib.import_module('vdm.configs.digits').get_config('debug')
  with config.unlocked():
    config.sample.batch_size = NUM_DEVICES
    config.model.dropout = 0.2
  return config


@pytest.mark.parametrize('scan_blocks', ['off', 'on'])
def test_layer_calls_finds_every_convolution_and_dropout(train_step, config, scan_blocks):
  config.model.scan_blocks = scan_blocks
  convs, dropouts = train_step.layer_calls(config, build.model(config), 2)
  width = config.model.width
  assert len(convs) == 1 + 2 * (1 + 2 + 2) + 1  # in, two in each block down, mid and up, out
  features, x = convs[0]
  assert (features, x.shape) == (width, (2, 8, 8, 5))  # z, and its two sines and cosines
  assert convs[-1][0] == 1
  # The two blocks up read an earlier output too.
  assert sorted(x.shape[-1] for _, x in convs[1:]) == [width] * 9 + [2 * width] * 2
  assert [(rate, x.shape) for rate, x in dropouts] == [(0.2, (2, 8, 8, width))] * 5


def test_layer_calls_under_a_multivariate_schedule(train_step, config):
  with config.unlocked():
    config.schedule = ConfigDict(
      dict(name='learned_multivariate', log_snr_min=-5.0, log_snr_max=8.0)
    )
  convs, _ = train_step.layer_calls(config, build.model(config), 2)
  assert len(convs) == 12 and convs[0][1].shape[:-1] == (2, 8, 8)


@pytest.fixture
def quick_compilation():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.mark.slow
def test_measure(train_step, config, quick_compilation, monkeypatch):
  make_parts, compiled = train_step.make_parts, {}

  def make_and_keep_parts(*args):
    parts = make_parts(*args)
    compiled.update({name: part for name, (part, _) in parts.items()})
    return parts

  monkeypatch.setattr(train_step, 'make_parts', make_and_keep_parts)
  result = train_step.measure(config, steps=1, warmup=1)

  line = train_step.to_json(result)
  assert '\n' not in line
  printed = json.loads(line)
  assert printed.keys() == result.keys()
  assert printed['step_ms'] == pytest.approx(result['step_ms'], rel=1e-4)

  assert result['config'] == 'digits_debug' and result['devices'] == NUM_DEVICES
  assert result['model']['dtype'] == 'float32' and result['jax'] == jax.__version__
  for name in ('trace_and_lower_s', 'compile_s', 'images_per_s', 'bytes_accessed'):
    assert result[name] > 0
  assert 0 < result['step_ms']['min'] <= result['step_ms']['q25'] <= result['step_ms']['q75']
  assert result['flops'] >= result['convolution_flops'] > 0
  # ours have the products with a convolution's padding too, and XLA's all that is no product
  assert result['convolution_flops'] < result['matmul_flops'] < 2 * result['flops']
  assert result['flop_utilisation'] is None  # a CPU's peak is not known
  memory = result['memory_bytes_per_device']
  assert memory['total'] >= memory['arguments'] + memory['temporaries'] > 0

  shares = {name: part['share'] for name, part in result['breakdown'].items()}
  assert list(shares) == ['decoder', 'random_bits', 'convolutions', 'rest']
  assert all(share > 0 for name, share in shares.items() if name != 'rest')
  assert sum(shares.values()) == pytest.approx(1)

  # Nothing of the parts was optimised away.
  flops = {name: NUM_DEVICES * part.cost_analysis()['flops'] for name, part in compiled.items()}
  assert result['convolution_flops'] <= flops['convolutions'] < 1.1 * result['convolution_flops']
  _, dropouts = train_step.layer_calls(config, build.model(config), config.train.batch_size)
  elements = sum(math.prod(x.shape) for _, x in dropouts)  # each is a hash of five operations
  noise = 2 * config.train.batch_size * math.prod(build.model(config).image_shape)
  threefry = 20 * 5 / 2  # per word: 20 rounds of add, rotate (three), xor make two
  assert flops['random_bits'] > 5 * elements + threefry * noise


SPAN = r'[\d.e+-]+ \([\d.e+-]+ to [\d.e+-]+\)'


def test_on_nan_runs_the_two_steps_in_turn(benchmark, config, quick_compilation):
  on_nan, order = benchmark('on_nan'), []
  make = on_nan.make_call

  def noting(config, name):
    call = make(config, name)
    return lambda: (order.append(name), call())

  on_nan.make_call = noting
  try:
    result = on_nan.measure(config, steps=2, warmup=1)
  finally:
    on_nan.make_call = make
  assert order == ['stop', 'skip', 'skip', 'stop', 'stop', 'skip']
  assert config.train.on_nan == 'stop'  # the given config is left as it is
  assert 0 < result['ratio'] < math.inf and result['stderr'] >= 0


def test_data_takes_whole_groups_of_batches(benchmark, config):
  data = benchmark('data')
  batches = itertools.count()
  parts = data.rates(batches, group=3, size=8, seconds=0.0)
  assert next(parts) > 0 and next(batches) == 3
  assert next(parts) > 0 and next(batches) == 7
  assert re.fullmatch(SPAN, data.measure(config, repeats=2, seconds=0.0, warm=True))


@pytest.mark.slow
def test_checkpoint_writes_all_bytes_and_leaves_nothing(benchmark, config, tmp_path):
  text = benchmark('checkpoint').measure(config, repeats=1, directory=tmp_path)
  size, files = map(float, re.search(r': ([\d.]+) GB in \d+ arrays, ([\d.]+) GB', text).groups())
  assert files > 0.9 * size  # random numbers do not compress
  for part in ('save, blocking', 'save, whole', 'restore'):
    assert re.search(rf'^\| {part} \| {SPAN} \| [\d.e+-]+ \|$', text, re.MULTILINE), part
  assert not list(tmp_path.iterdir())


ENVIRONMENT = {
  'device': 'some chip',
  'platform': 'gpu',
  'num_devices': 8,
  'python': '3.11',
  'versions': {'jax': '0.10.2'},
  'git_revision': 'abc',
}
STEP = {
  'batch_size': 16,
  'devices': 8,
  'trace_and_lower_s': 1.0,
  'compile_s': 2.0,
  'step_ms': {'median': 10.0, 'min': 8.0, 'q25': 9.0, 'q75': 11.0},
  'images_per_s': 1600.0,
  'matmul_flops': 8e12,
  'flop_utilisation': 0.125,
  'memory_bytes_per_device': {'total': 3e9},
}


def test_all_writes_what_each_part_prints_and_what_failed(benchmark, tmp_path, monkeypatch):
  every, ran = benchmark('__main__'), []

  def run(command, env=None, **_):
    if command[1] == '-c':
      return subprocess.CompletedProcess(command, 0, json.dumps(ENVIRONMENT))
    ran.append((command[2], (env or {}).get('JAX_DEFAULT_MATMUL_PRECISION', '')))
    if command[2] == 'benchmarks.data':
      stderr = 'Traceback (most recent call last):\n  File\nValueError: no such data\n---\nNote.\n'
      return subprocess.CompletedProcess(command, 1, 'a line before', stderr)
    printed = json.dumps(STEP) if command[2] == 'benchmarks.train_step' else '| a table |'
    return subprocess.CompletedProcess(command, 0, printed, 'warnings')

  monkeypatch.setattr(subprocess, 'run', run)
  monkeypatch.delenv('JAX_DEFAULT_MATMUL_PRECISION', raising=False)
  output = tmp_path / 'RESULTS.md'
  arguments = ['--data_dir=/some/where', f'--output={output}']
  assert every.main([*arguments, '--only=train_step,data']) == 1
  assert ran[:6] == 2 * [('benchmarks.train_step', p) for p in ('highest', '', '')]
  text = output.read_text()
  assert '8 x some chip (gpu)' in text and 'jax 0.10.2' in text and 'abc' in text
  assert 'JAX_DEFAULT_MATMUL_PRECISION=highest python -m benchmarks.train_step --config=' in text
  assert '| 16 | 1 | 2 | 10 (9 to 11) | 1600 | 100 | 12.5% | 3 |' in text
  assert text.count('**Failed**: `ValueError: no such data (status 1)`') == 2
  assert '--config.data.dir=DIR' in text and '/some/where' not in text

  assert every.main([*arguments, '--only=checkpoint,parameters']) == 0
  text = output.read_text()
  assert text.count('| a table |') == 3 and 'Failed' not in text
  with pytest.raises(SystemExit):
    every.main([*arguments, '--only=steps'])


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('quick', [True, False])
def test_all_runs_configs_that_exist(benchmark, platform, quick):
  every = benchmark('__main__')
  parts = every.parts(quick, 'DIR', ENVIRONMENT | {'platform': platform})
  assert tuple(parts) == every.PARTS and all(parts.values())
  for part in itertools.chain(*parts.values()):
    for path in re.findall(r'--config=([\w/.]+)', part.shown()):
      assert (every.ROOT / path).exists()
    for leaf, value in re.findall(r'--config\.([\w.]+)=(\S+)', part.shown()):
      block, name = leaf.split('.')
      default = importlib.import_module('vdm.configs.cifar10').get_config()[block][name]
      assert isinstance(default, str) or int(value) % 8 == 0 or block == 'model'
