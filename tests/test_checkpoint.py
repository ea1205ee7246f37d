import dataclasses
import gc
import json
import os
import re
import socket
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from vdm.configs import default

from configs.default import get_config
from vdm import build
from vdm.system import files, parallel
from vdm.workdir import checkpoint, config_file, integrity


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: optax.OptState
  absent: None = None


def make_state(seed=0, width=128):
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    'dense': {'kernel': jax.random.normal(keys[0], (8, width)), 'bias': jnp.zeros((width,))},
    'half': jax.random.normal(keys[1], (16, 3), jnp.bfloat16),
    'bits': jax.random.bits(keys[2], (4,)),
    'odd': jnp.array([-0.0, 3e38, 1e-42]),
    'flag': jnp.array(True),
    'nothing': None,
  }
  optimizer = optax.chain(optax.identity(), optax.trace(0.9), optax.scale_by_schedule(lambda t: t))
  return State(jnp.int32(seed), params, optimizer.init(params))


def abstract(state, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
  )


def same(a, b):
  """Equal structures, dtypes and bits."""
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def save_all(workdir, saves, keep=9):
  """Saves {step: (state, bits per dim or None)}."""
  manager = checkpoint.manager(workdir, keep)
  for step, (state, bpd) in saves.items():
    assert checkpoint.save(manager, step, state, None if bpd is None else {'bits_per_dim': bpd})
  manager.close()


def test_a_save_does_not_ask_jax_about_preemption(tmp_path, monkeypatch):
  """`Stop.agreed` does, by another count than that of steps."""
  asked = []
  name = 'reached_preemption_sync_point'
  monkeypatch.setattr(multihost_utils, name, lambda step: asked.append(step) or False)
  save_all(tmp_path, {7: (make_state(), None)})
  assert asked == []


# The config in the workdir.


def test_open_workdir_twice(tmp_path):
  config_file.open_workdir(tmp_path / 'a' / 'b', get_config())
  config_file.open_workdir(tmp_path / 'a' / 'b', get_config())
  assert [p.name for p in (tmp_path / 'a' / 'b').iterdir()] == ['config.json']


@pytest.mark.parametrize(
  'change',
  [
    {'name': 'x'},
    {'data.dir': '/x', 'data.eval_split': 'y', 'data.eval_images': 1},
    {'eval.draws': 9, 'sample.num_steps': 1, 'checkpoint.keep': 5, 'parallel.fsdp': 2},
    {'train.log_every_steps': 1, 'train.eval_every_steps': 1, 'train.num_steps': 7},
  ],
)
def test_free_leaves_may_change_and_are_rewritten(tmp_path, change):
  config = get_config()
  config_file.open_workdir(tmp_path, config)
  config.update_from_flattened_dict(change)
  config_file.open_workdir(tmp_path, config)
  saved = ConfigDict(json.loads((tmp_path / 'config.json').read_text()))
  for leaf, value in change.items():
    block, _, name = leaf.rpartition('.')
    assert (saved[block] if block else saved)[name] == value


def refusal(workdir, config):
  before = (workdir / 'config.json').read_text()
  with pytest.raises(ValueError) as error:
    config_file.open_workdir(workdir, config)
  assert (workdir / 'config.json').read_text() == before
  assert '\n' not in str(error.value)
  return str(error.value)


def test_another_run_is_refused(tmp_path):
  config = get_config()
  config_file.open_workdir(tmp_path, config)
  config.model.width = 64
  assert refusal(tmp_path, config) == (
    f'--workdir={tmp_path} holds a run with config.model.width=32, not 64; '
    'choose another --workdir, or restore these values.'
  )
  config.model.fourier_exponents = (6, 7)
  config.eval.draws = 9
  config.data.dir = '/x'
  config.data.train_split = ''
  assert (
    "with config.data.train_split=train, not '', and config.model.fourier_exponents=(3, 4), "
    'not (6, 7), and config.model.width=32, not 64;'
  ) in refusal(tmp_path, config)


def test_num_steps_belongs_to_a_run_with_decay(tmp_path):
  config = get_config()
  config.optimizer.decay = 'cosine'
  config_file.open_workdir(tmp_path, config)
  config.train.num_steps = 7
  assert 'config.train.num_steps=1000, not 7' in refusal(tmp_path, config)


def test_a_run_older_than_a_leaf_goes_on_where_the_leaf_has_its_default(tmp_path):
  config = get_config()
  config_file.open_workdir(tmp_path, config)
  file = tmp_path / 'config.json'
  old = json.loads(file.read_text())
  del old['model']['remat'], old['data']['num_bits']
  file.write_text(json.dumps(old))
  config_file.open_workdir(tmp_path, config)
  file.write_text(json.dumps(old))
  config.data.num_bits = 4
  assert 'no config.data.num_bits, not 4' in refusal(tmp_path, config)


def test_missing_and_new_leaves_are_refused(tmp_path):
  config = get_config()
  config_file.open_workdir(tmp_path, config)
  with config.unlocked():
    del config.ema.rampup_ratio
    config.ema.power = 0.75
  message = refusal(tmp_path, config)
  assert 'no config.ema.power, not 0.75' in message
  assert 'config.ema.rampup_ratio=0.05, which this config lacks' in message


def test_a_broken_config_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text('{"name": ')
  assert 'config.json cannot be read' in refusal(tmp_path, get_config())


def test_unwritable_workdir(tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file' / 'run', tmp_path / 'file', '/proc/self/run'):
    expected = re.escape(f'--workdir={workdir} cannot be written (')
    with pytest.raises(ValueError, match=expected + r'[\w ]+\); choose another --workdir.$'):
      config_file.open_workdir(workdir, get_config())


# Saving and restoring.


def test_round_trip_is_exact(tmp_path):
  state = make_state()
  save_all(tmp_path, {3: (state, None)})
  restored, step = checkpoint.restore(checkpoint.manager(tmp_path), abstract(state))
  assert step == 3 and same(restored, state)


def test_nothing_to_restore(tmp_path):
  for manager in (checkpoint.manager(tmp_path / 'absent'), checkpoint.manager(tmp_path, 1)):
    assert checkpoint.restore(manager, abstract(make_state())) is None
    assert checkpoint.latest_step(manager) is None and checkpoint.best_step(manager) is None
  assert not (tmp_path / 'absent').exists()


def test_restores_onto_another_mesh(tmp_path):
  state = make_state()
  devices = np.array(jax.devices())
  narrow = jax.device_put(state, jax.devices()[-1])
  save_all(tmp_path, {0: (narrow, None)})
  manager = checkpoint.manager(tmp_path, 9)

  def wide(x):
    spec = P('fsdp') if x.ndim and x.shape[0] % len(devices) == 0 else P()
    sharding = NamedSharding(Mesh(devices, 'fsdp'), spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  target = jax.tree.map(wide, state)
  restored, _ = checkpoint.restore(manager, target)
  assert same(restored, state)
  assert restored.params['dense']['kernel'].sharding == target.params['dense']['kernel'].sharding
  # And back: the checksums of a sharded state are those of the same state on one device.
  assert checkpoint.save(manager, 1, restored)
  assert same(checkpoint.restore(manager, abstract(narrow), 1)[0], state)


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
  state = {'x': jnp.ones((1000, 1000))}
  double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)
  manager = checkpoint.manager(tmp_path, 9)
  for step in range(3):
    checkpoint.save(manager, step, state)
    state = double(state)
  for step in range(3):
    restored, _ = checkpoint.restore(manager, abstract(state), step)
    assert np.unique(restored['x']) == 2**step


def test_keeps_the_newest_and_the_best(tmp_path):
  state = {'x': jnp.zeros(())}
  nan = float('nan')
  bpds = [nan, 3.0, 2.0, None, 5.0, nan, 2.5, None]
  kept = [[0], [0, 1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [2, 6, 7]]
  for step, bpd in enumerate(bpds):  # reopened each time: the best is not forgotten
    save_all(tmp_path, {step: (state, bpd)}, keep=2)
    manager = checkpoint.manager(tmp_path)
    assert sorted(manager.all_steps()) == kept[step]
    assert checkpoint.latest_step(manager) == step
    assert checkpoint.best_step(manager) == [None, 1, 2, 2, 2, 2, 2, 2][step]
  save_all(tmp_path, {8: (state, 1.0), 9: (state, None), 10: (state, 1.0)}, keep=1)
  assert sorted(checkpoint.manager(tmp_path).all_steps()) == [10]  # the newest of equals


def test_a_step_is_saved_once(tmp_path):
  manager = checkpoint.manager(tmp_path, 2)
  assert checkpoint.save(manager, 1, {'x': jnp.zeros(())})
  assert not checkpoint.save(manager, 1, {'x': jnp.ones(())})
  assert checkpoint.restore(manager, abstract({'x': jnp.ones(())}))[0]['x'] == 0


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match=r'config\.checkpoint\.keep=0 must be at least 1'):
    checkpoint.manager(tmp_path, 0)


# What is not finite.


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('tree', ['params', 'averages.ema', 'averages.std_0.05', 'opt_state'])
def test_a_state_that_is_not_finite_is_not_saved(tree, bad, tmp_path):
  state = {
    'params': {'kernel': jnp.zeros((3, 5), jnp.bfloat16)},
    'averages': {'ema': {'kernel': jnp.zeros(7)}, 'std_0.05': {'kernel': jnp.zeros(7)}},
    'opt_state': (jnp.int32(1), jnp.zeros((2, 2))),
  }
  assert integrity.not_finite(state) == []
  paths = {'params': ('params', 'kernel'), 'opt_state': ('opt_state', 1)}
  *way, last = paths.get(tree, ('averages', tree.removeprefix('averages.'), 'kernel'))
  node = state
  for name in way:
    node = node[name]
  value = node[last].at[-1].set(bad)
  if tree == 'opt_state':
    state['opt_state'] = (state['opt_state'][0], value)
  else:
    node[last] = value
  manager = checkpoint.manager(tmp_path, 1)
  with pytest.raises(FloatingPointError, match=rf'^step 4: {tree} not finite$'):
    checkpoint.save(manager, 4, state)
  assert checkpoint.latest_step(manager) is None


def test_one_that_was_saved_all_the_same_is_passed_over(tmp_path, monkeypatch):
  good = {'params': jnp.ones(3)}
  monkeypatch.setattr(integrity, 'require_finite', lambda *_: None)
  save_all(tmp_path, {1: (good, None), 2: ({'params': good['params'] * jnp.nan}, None)})
  manager = checkpoint.manager(tmp_path, 9)
  assert checkpoint.restore(manager, abstract(good))[1] == 1
  assert (tmp_path / 'checkpoints/2.corrupt').exists()


def test_scores_may_come_later(tmp_path):
  state = make_state()
  save_all(tmp_path, {1: (state, 5.0), 2: (state, None)})
  manager = checkpoint.manager(tmp_path, 9)
  assert checkpoint.is_scored(manager, 1) and not checkpoint.is_scored(manager, 2)
  checkpoint.score(manager, 2, {'bits_per_dim': 4.0})
  assert checkpoint.is_scored(manager, 2) and checkpoint.best_step(manager) == 2
  assert same(checkpoint.restore(manager, abstract(state), 2)[0], state)


def test_a_score_that_is_not_finite_is_a_score_and_never_the_best(tmp_path):
  state = make_state()
  save_all(tmp_path, {1: (state, 5.0), 2: (state, np.nan), 3: (state, None)})
  manager = checkpoint.manager(tmp_path, 9)
  assert [checkpoint.is_scored(manager, step) for step in (1, 2, 3)] == [True, True, False]
  checkpoint.score(manager, 3, {'bits_per_dim': np.inf})
  assert checkpoint.is_scored(manager, 3) and checkpoint.best_step(manager) == 1


# What is broken.


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A workdir with steps 1 and 2."""
  workdir = tmp_path_factory.mktemp('two')
  save_all(workdir, {1: (make_state(1), 3.0), 2: (make_state(2), None)})
  return workdir


def copy(two, tmp_path):
  subprocess.run(['cp', '-r', str(two / 'checkpoints'), str(tmp_path)], check=True)
  return tmp_path / 'checkpoints'


def flip(data):
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


DAMAGE = {
  'gone': lambda path: path.unlink(),
  'empty': lambda path: path.write_bytes(b''),
  'half': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
  'flipped': lambda path: path.write_bytes(flip(path.read_bytes())),
}


# Where one array fails in Orbax, those it was reading beside it print tracebacks: tolerable after
# a flipped bit, avoided in the cases that happen.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', DAMAGE)
def test_no_damage_to_any_file_gives_a_wrong_state(two, tmp_path, damage, monkeypatch):
  noise = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda args: noise.append(str(args.exc_value)))
  files = sorted(p for p in (two / 'checkpoints' / '2').rglob('*') if p.is_file())
  assert len(files) > 10
  seen = set()
  for n, file in enumerate(files):
    workdir = tmp_path / str(n)
    workdir.mkdir()
    copy(two, workdir)
    DAMAGE[damage](workdir / file.relative_to(two))
    manager = checkpoint.manager(workdir, 2)
    assert checkpoint.best_step(manager) == 1
    restored, step = checkpoint.restore(manager, abstract(make_state()))
    assert same(restored, make_state(step)), file
    assert manager.latest_step() == step
    assert (workdir / 'checkpoints' / '2.corrupt').exists() == (step == 1)
    manager.close()
    seen.add(step)
  gc.collect()  # what is left of those: here, not in the next test
  assert not noise or damage == 'flipped'
  assert seen == {1, 2}  # Orbax writes some files that a restore does not need


def test_the_broken_one_is_named_and_set_aside(two, tmp_path, caplog):
  directory = copy(two, tmp_path)
  for attempt in range(2):
    (directory / '2' / 'manifest' / 'metadata').write_text('')
    manager = checkpoint.manager(tmp_path, 1)
    with pytest.raises(ValueError, match=r'2 is broken .JSONDecodeError'):
      checkpoint.restore(manager, abstract(make_state()), 2)
    caplog.clear()
    with caplog.at_level('WARNING', 'absl'):
      assert checkpoint.restore(manager, abstract(make_state()))[1] == 1
    (line,) = [r.getMessage() for r in caplog.records]
    assert f'{directory}/2 is broken' in line and 'JSONDecodeError' in line
    assert checkpoint.save(manager, 2, make_state(2), {'bits_per_dim': 4.0})
    manager.close()
    assert checkpoint.restore(checkpoint.manager(tmp_path), abstract(make_state()))[1] == 2
    assert (directory / ('2.corrupt', '2.corrupt2')[attempt]).is_dir()


@pytest.mark.parametrize('body', ['[]', '3'])
def test_what_orbax_notes_of_a_step_and_cannot_read_is_named(body, two, tmp_path):
  note = copy(two, tmp_path) / '1' / '_CHECKPOINT_METADATA'
  note.write_text(body)
  with pytest.raises(
    files.Damaged, match=r'_CHECKPOINT_METADATA cannot be read .* remove'
  ) as error:
    checkpoint.manager(tmp_path)
  assert '\n' not in str(error.value)
  note.unlink()
  assert checkpoint.restore(checkpoint.manager(tmp_path), abstract(make_state()))[1] == 2


def test_when_all_are_broken_it_stops_and_touches_nothing(two, tmp_path):
  directory = copy(two, tmp_path)
  for step in '12':
    (directory / step / 'state' / 'manifest.ocdbt').write_bytes(b'')
  for _ in range(2):  # a second start must not begin anew
    with pytest.raises(ValueError) as error:
      checkpoint.restore(checkpoint.manager(tmp_path, 1), abstract(make_state()))
    assert str(directory) in str(error.value) and '\n' not in str(error.value)
  assert sorted(p.name for p in directory.iterdir()) == ['1', '2']


def test_another_model_is_not_a_broken_checkpoint(two, tmp_path):
  directory = copy(two, tmp_path)
  manager = checkpoint.manager(tmp_path, 1)
  target = abstract(make_state())
  wider = abstract(make_state(width=64))
  more = target.replace(absent=target.step)
  fewer = target.replace(params=target.params | {'half': None})
  other = target.replace(step=jax.ShapeDtypeStruct((), jnp.float32, sharding=target.step.sharding))
  for wrong, leaf in [
    (wider, r'params.dense.bias float32\[128\], not float32\[64\]'),
    (more, r'no absent int32\[\]'),
    (fewer, 'opt_state.1.trace.half|params.half'),
    (other, r'step int32\[\], not float32\[\]'),
  ]:
    with pytest.raises(ValueError, match=leaf) as error:
      checkpoint.restore(manager, wrong)
    assert '\n' not in str(error.value)
  with pytest.raises(ValueError, match=r'holds the steps \[1, 2\], not 7'):
    checkpoint.restore(manager, target, 7)
  assert sorted(p.name for p in directory.iterdir()) == ['1', '2']


def test_checksum_sees_every_bit_and_rows_that_move():
  x = jnp.zeros((4, 4), jnp.uint32)
  tables = [x]
  tables += [x.at[i, 1].set(1 << bit) for i in range(4) for bit in (2, 7, 31)]
  tables += [x.astype(jnp.bfloat16).at[2, 3].set(-0.0), jnp.array(True), jnp.float32(-1)]
  sums = integrity.checksums(tables)
  assert len(set(sums)) == len(tables) and not sums[0]
  assert integrity.checksums([jnp.zeros((0, 3)), jnp.array(False)]) == [0, 0]
  rows = jnp.arange(8.0).reshape(4, 2)
  assert integrity.checksums(rows) != integrity.checksums(rows[::-1])


def start(program, *args, **env):
  root = os.path.dirname(os.path.dirname(checkpoint.__file__))
  return subprocess.Popen(
    [sys.executable, '-c', program, *map(str, args)],
    env=os.environ | {'PYTHONPATH': root, 'JAX_PLATFORMS': 'cpu'} | env,
    stderr=subprocess.PIPE,
    text=True,
  )


SAVER = """
import os, resource, signal, sys, threading, time
import jax, jax.numpy as jnp
from vdm.workdir import checkpoint

def child(workdir, kill_after):
  state = lambda step: {'x': jax.random.normal(jax.random.key(step), (1_000_000,))}
  manager = checkpoint.manager(workdir, 1)
  checkpoint.save(manager, 1, state(1))
  manager.wait_until_finished()
  second = jax.block_until_ready(state(2))
  if kill_after is None:  # the disk is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
  else:
    threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
  checkpoint.save(manager, 2, second)
  try:
    manager.wait_until_finished()
  except Exception as error:
    sys.exit('File too large' not in str(error))
  time.sleep(5)

for workdir, kill_after in zip(sys.argv[1:], (None, 0.01, 0.04, 0.1), strict=True):
  pid = os.fork()
  if not pid:
    child(workdir, kill_after)
  code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  assert code == (0 if kill_after is None else -signal.SIGKILL), (workdir, code)
"""


@pytest.mark.slow
def test_a_save_that_is_cut_off_loses_nothing(tmp_path):
  workdirs = [tmp_path / str(n) for n in range(4)]
  saver = start(SAVER, *workdirs)
  error = saver.communicate(timeout=120)[1]
  assert saver.returncode == 0, error
  target = abstract({'x': jnp.zeros((1_000_000,))})
  for workdir in workdirs:
    manager = checkpoint.manager(workdir, 1)
    restored, step = checkpoint.restore(manager, target)
    assert same(restored, {'x': jax.random.normal(jax.random.key(step), (1_000_000,))})
    assert checkpoint.save(manager, 3, restored)
    manager.close()
    assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['3']  # no rubbish either


PROCESS = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from configs.default import get_config
from vdm.configs import default
from vdm import build
from vdm.system import parallel
from vdm.workdir import checkpoint, config_file

index, address, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, num_processes=2, process_id=index)
config_file.open_workdir(workdir, get_config())
mesh = Mesh(jax.devices(), 'fsdp')
assert mesh.size == 4
shardings = {'sharded': NamedSharding(mesh, P('fsdp')), 'whole': NamedSharding(mesh, P())}
make = lambda step: {'sharded': step + jnp.arange(4000.0), 'whole': step + jnp.arange(3)}
make = jax.jit(make, out_shardings=shardings)
target = jax.tree.map(
  lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0)
)
manager = checkpoint.manager(workdir, 9)
for step in range(1, 5):
  checkpoint.save(manager, step, make(step))
manager.wait_until_finished()

def damage(step, change):  # what only process 1 wrote, and only process 1 will read
  sync_global_devices('before')
  if index == 0:
    files = pathlib.Path(workdir, 'checkpoints', str(step)).rglob('ocdbt.process_1/d/*')
    file = max(files, key=lambda f: f.stat().st_size)
    data = file.read_bytes()
    file.write_bytes(change(data))
  sync_global_devices('after')

damage(4, lambda data: data[: len(data) // 2])
damage(3, lambda data: bytes(len(data)))
damage(2, lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
state, step = checkpoint.restore(manager, target)
assert step == 1, step
for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(make(1)), strict=True):
  for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
    np.testing.assert_array_equal(a.data, b.data)
assert checkpoint.save(manager, 2, make(2))
manager.close()
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2'
  processes = [start(PROCESS, i, address, tmp_path, XLA_FLAGS=flags) for i in range(2)]
  errors = [process.communicate(timeout=120)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], errors
  names = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  assert names == ['1', '2', '2.corrupt', '3.corrupt', '4.corrupt']
  target = abstract({'sharded': jnp.arange(4000.0), 'whole': jnp.arange(3)})
  state, step = checkpoint.restore(checkpoint.manager(tmp_path), target)
  assert step == 2
  assert same(state, {'sharded': 2 + jnp.arange(4000.0), 'whole': 2 + jnp.arange(3)})


@pytest.mark.slow
def test_a_checkpoint_with_its_main_average_beside_the_others_is_read(tmp_path):
  """As version 0.1 wrote them until averages were one dict; with further averages, in both."""
  config = default.get_config('debug')
  config.ema.extra_halflives_images = (1000,)
  model, mesh = build.model(config), parallel.make_mesh()
  init = build.init_state(config, model)
  state = jax.tree.map(lambda leaf: leaf + 1, parallel.initial_state(mesh, init))
  older = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  others = dict(older['averages'])
  older |= {'ema_params': others.pop('ema'), 'averages': others}
  with checkpoint.manager(tmp_path, 1) as manager:
    checkpoint.save(manager, 7, older)
    manager.wait_until_finished()
    restored, step = checkpoint.restore(manager, parallel.abstract_state(mesh, init))
  assert step == 7 and list(restored.averages) == list(state.averages)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
