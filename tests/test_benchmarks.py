"""benchmarks/train_step.py on the digits' debug config: what it counts, and its line."""

import importlib
import json
import math
import pathlib

import jax
import pytest

from vdm import build

NUM_DEVICES = 8


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


@pytest.fixture
def train_step(monkeypatch):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1])
  return importlib.import_module('benchmarks.train_step')


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


@pytest.fixture
def quick_compilation():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


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
  words = sum(math.prod(x.shape) / 4 for _, x in dropouts)
  assert flops['random_bits'] > words * 20 * 3  # Threefry: 20 rounds of add, rotate, xor
