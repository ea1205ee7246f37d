"""One step, run every way there is: the parameters must come out the same."""

import inspect
import os
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vdm.configs import digits

from vdm import build
from vdm.data.augment import augment
from vdm.nn.attention import softmax_attention
from vdm.system import hosts, parallel, runners
from vdm.system.runners import jit_runner, pmap_runner
from vdm.training.step import make_train_step

STEPS = 5


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def config_of(**settings):
  config = digits.get_config('debug')
  with config.unlocked():
    config.train.batch_size = 32
    config.model.dropout = 0.0
    config.data.flip = True
    config.schedule.name = 'learned_net'
    config.optimizer.update(warmup_steps=1, clip_norm=1.0)
    for name, value in settings.items():
      block, leaf = name.split('__')
      config[block][leaf] = value
  return config


def batches(count, size):
  rng = np.random.default_rng(0)
  for _ in range(count):
    yield {
      'image': rng.integers(0, 17, (size, 8, 8, 1)).astype(np.uint8),
      'label': rng.integers(0, 10, size).astype(np.int32),
      'index': np.arange(size, dtype=np.int32),
    }


def run(num_devices=8, **settings):
  """Initial and final parameters after STEPS steps, as one vector each, and the metrics."""
  state, before, metrics = final_state(num_devices, **settings)
  return before, flat(state.params), metrics


def final_state(num_devices, **settings):
  config = config_of(**settings)
  model = build.model(config)
  devices = np.asarray(jax.devices()[:num_devices]).reshape(-1, config.parallel.fsdp)
  mesh = jax.sharding.Mesh(devices, parallel.BATCH_AXES)
  init = build.init_state(config, model)
  abstract = parallel.abstract_state(mesh, init)
  state = parallel.initial_state(mesh, init)
  before = flat(state.params)
  step = make_train_step(config, model)
  runner = runners.runner(config.parallel.mode, step, mesh, abstract)
  state = runner.put_state(state)
  for batch in batches(STEPS, config.train.batch_size):
    state, metrics = runner.step(state, runner.put_batch(batch))
  state = runner.get_state(state)
  assert int(state.step) == STEPS
  return state, before, runner.get_metrics(metrics)


def flat(params):
  return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(params)])


@pytest.mark.parametrize(
  'job, message',
  [
    (('', 2, None, 100), '--num_processes=2 needs --coordinator=host:port'),
    (('', 1, 0, 100), '--process_id=0 needs --coordinator=host:port'),
    (('10.0.0.1', 2, 0, 100), '--coordinator=10.0.0.1 must be host:port; try 10.0.0.1:8476'),
    (('a:1', 2, None, 100), '--coordinator=a:1 needs --num_processes and --process_id'),
    (('a:1', 2, 2, 100), '--process_id=2 must be in 0 .. --num_processes=2 - 1'),
    (('a:1', 0, 0, 100), '--process_id=0 must be in 0 .. --num_processes=0 - 1'),
    (('', None, None, 0), '--heartbeat_seconds=0 must be at least 1; try 100'),
  ],
)
def test_flags_that_name_no_process_of_a_job_are_refused(job, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    hosts.initialize(*job)


@pytest.mark.parametrize(('processes', 'kept'), [(1, True), (2, False)])
def test_several_processes_keep_compiled_programs_where_all_can_read(processes, kept, monkeypatch):
  given = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    hosts.keep_compiled()
    assert bool(jax.config.jax_compilation_cache_dir) == kept
    jax.config.update('jax_compilation_cache_dir', '/shared')
    hosts.keep_compiled()
    assert jax.config.jax_compilation_cache_dir == '/shared'
  finally:
    jax.config.update('jax_compilation_cache_dir', given)


@pytest.fixture(scope='module')
def one_device():
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  return run(num_devices=1)


@pytest.mark.slow
@pytest.mark.parametrize(
  'settings',
  [
    dict(),
    dict(parallel__fsdp=4),
    dict(parallel__mode='pmap'),
    dict(train__microbatches=4),
    dict(parallel__mode='pmap', train__microbatches=4),
  ],
  ids=str,
)
def test_eight_devices_move_the_parameters_as_one_does(settings, one_device):
  """To 1e-3 of the distance moved: times, noise and flips are those of the whole batch."""
  before, after, metrics = one_device
  before_8, after_8, metrics_8 = run(num_devices=8, **settings)
  np.testing.assert_allclose(before_8, before, rtol=1e-5, atol=1e-6)
  moved = np.linalg.norm(after - before)
  assert moved > 0.01
  assert np.linalg.norm(after_8 - after) < 1e-3 * moved
  for name in ('loss', 'bits_per_dim', 'recon_bpd', 'grad_norm'):
    np.testing.assert_allclose(
      metrics_8.scalars[name], metrics.scalars[name], rtol=1e-3, err_msg=name
    )


@pytest.mark.slow
def test_dropout_differs_between_microbatches_and_devices():
  """What a carried key forgets: all parts would drop the same elements."""
  config = config_of(train__microbatches=4, model__dropout=0.5, optimizer__warmup_steps=0)
  model = build.model(config)
  state = build.init_state(config, model)()
  batch = next(batches(1, 32))
  same = {k: np.repeat(v[:4], 8, axis=0) for k, v in batch.items()}
  keys = []
  original = model.denoiser

  def spy(params, label, flag, *, train, key_dropout):
    jax.debug.callback(lambda k: keys.append(tuple(np.ravel(k))), jax.random.key_data(key_dropout))
    return original(params, label, flag, train=train, key_dropout=key_dropout)

  step = make_train_step(config, model._replace(denoiser=spy))
  jax.block_until_ready(jax.jit(step)(state, same))
  jax.effects_barrier()
  assert len(set(keys)) == 4


@pytest.mark.parametrize(
  'cores, works, env, expected',
  [
    (6, 'True', {}, 6),
    (6, '12 % n == 0 and n != 6', {}, 4),
    (6, 'False', {}, 1),
    (64, 'True', {}, hosts.MOST_CORES),
    (6, 'True', {'JAX_NUM_CPU_DEVICES': '3'}, 3),
    (6, 'True', {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}, 2),
    (6, 'build.works_on(digits.get_config("debug"), n)', {}, 4),
  ],
)
def test_a_cpu_is_as_many_devices_as_cores_that_divide_the_batch(cores, works, env, expected):
  code = f"""
import os
os.sched_getaffinity = lambda pid: range({cores})
import jax
from vdm import build
from vdm.system import hosts
from vdm.configs import digits
hosts.use_cores(lambda n: {works})
print(jax.device_count())
"""
  env = os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'} | env
  done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
  assert done.stdout == f'{expected}\n', done.stderr


def test_a_config_with_a_zero_works_on_no_number_of_devices():
  assert build.works_on(config_of(), 8)
  for name in ('train__microbatches', 'parallel__fsdp'):
    assert not build.works_on(config_of(**{name: 0}), 1)


def test_batches_are_put_in_order_by_a_thread_that_is_ahead():
  put, in_use, third_is_put = [], threading.Event(), threading.Event()

  def on_device(batch):
    put.append(batch)
    if batch == 2 and in_use.wait(timeout=20):
      third_is_put.set()
    return 10 * batch

  batches = parallel.prefetch(range(5), on_device, depth=2)
  assert next(batches) == 0
  in_use.set()
  assert third_is_put.wait(timeout=20)
  assert list(batches) == [10, 20, 30, 40] and put == [0, 1, 2, 3, 4]


def test_who_stops_early_does_not_wait_for_the_data():
  reading, data = threading.Event(), threading.Event()

  def slow():
    yield 0
    reading.set()
    data.wait(timeout=20)

  batches = parallel.prefetch(slow(), lambda batch: batch)
  assert next(batches) == 0 and reading.wait(timeout=20)
  start = time.monotonic()
  batches.close()
  assert time.monotonic() - start < 10
  data.set()


def test_what_fails_while_putting_a_batch_is_raised_for_that_batch():
  batches = parallel.prefetch(iter([1, 0, 2]), lambda batch: 1 / batch)
  assert next(batches) == 1
  with pytest.raises(ZeroDivisionError):
    next(batches)


@pytest.mark.parametrize('examples', [8, 16])
def test_attention_is_the_same_under_pmap_and_on_a_mesh(examples):
  """One example per device, and as many as there are devices: each maps over its own."""
  x = jax.random.normal(jax.random.key(0), (8 * examples, 4, 1, 2))
  plain = jax.jit(softmax_attention)(x, x, x)
  split = jax.pmap(softmax_attention)(*[x.reshape(8, examples, 4, 1, 2)] * 3)
  np.testing.assert_allclose(split.reshape(x.shape), plain, rtol=1e-6)
  mesh = parallel.make_mesh()
  placed = jax.device_put(x, parallel.batch_sharding(mesh))
  on_mesh = parallel.jit(softmax_attention, mesh)
  np.testing.assert_allclose(on_mesh(placed, placed, placed), plain, rtol=1e-6)
  assert 'all-gather' not in on_mesh.lower(placed, placed, placed).compile().as_text()


@pytest.mark.slow
def test_step_is_traced_once():
  config = config_of()
  model = build.model(config)
  mesh = parallel.make_mesh()
  init = build.init_state(config, model)
  traces = []
  step = make_train_step(config, model)

  def counted(*args):
    traces.append(1)
    return step(*args)

  runner = jit_runner(counted, mesh, parallel.abstract_state(mesh, init))
  state = parallel.initial_state(mesh, init)
  for batch in batches(3, 32):
    state, _ = runner.step(state, runner.put_batch(batch))
  assert len(traces) == 1


def test_fsdp_splits_large_arrays_and_replicates_small_ones():
  mesh = parallel.make_mesh(fsdp=4)
  tree = {'kernel': jnp.zeros((3, 3, 8, 16)), 'odd': jnp.zeros((3, 7)), 'bias': jnp.zeros(16)}
  shardings = parallel.state_sharding(mesh, tree)
  assert shardings['kernel'].shard_shape((3, 3, 8, 16)) == (3, 3, 8, 4)
  assert shardings['odd'].is_fully_replicated and shardings['bias'].is_fully_replicated


def test_state_survives_the_way_to_replicas_and_back():
  mesh = parallel.make_mesh()
  runner = pmap_runner(lambda state, batch, axis_name: (state, {}), mesh)
  state = jax.device_put(
    {'a': jnp.arange(6.0).reshape(2, 3), 'b': jnp.int32(3)}, parallel.replicated(mesh)
  )
  back = runner.get_state(runner.put_state(state))
  for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
    np.testing.assert_array_equal(one, other)
    assert other.sharding.is_fully_replicated


@pytest.mark.slow
def test_the_adaptive_schedule_pools_devices_and_microbatches():
  adaptive = dict(schedule__name='adaptive')
  one, _, _ = final_state(1, **adaptive)
  many, _, metrics = final_state(8, parallel__mode='pmap', train__microbatches=2, **adaptive)
  assert one.adaptive.weight.max() > 0
  for a, b in zip(many.adaptive, one.adaptive, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3)
  assert 0 < metrics.scalars['square_reduction_predicted'] < 1


def drawn(images, flip, rotate):
  """How often each of the eight flips and turns of one image came, and whether it was flagged."""
  keys = (jax.random.split(jax.random.key(seed), len(images)) for seed in (0, 1))
  out, flag = jax.jit(augment, static_argnums=(3, 4))(*keys, images, flip, rotate)
  orbit = {
    (f, k): np.rot90(images[0, :, ::-1] if f else images[0], k)
    for f in (False, True)
    for k in range(4)
  }
  counts = dict.fromkeys(orbit, 0)
  for image, flagged in zip(np.asarray(out), np.asarray(flag), strict=True):
    (found,) = [name for name, same in orbit.items() if np.array_equal(same, image)]
    counts[found] += 1
    assert flagged == (found != (False, 0))
  return counts


def test_flips_and_turns_are_drawn_as_published_and_flagged():
  """Mirrored one time in two; then turned one time in two, one to three quarters as likely."""
  images = np.arange(6).reshape(1, 2, 3, 1) * np.ones((400, 1, 1, 1), np.int32)
  counts = drawn(images, True, False)  # images need not be square
  assert 150 < counts[True, 0] < 250 and counts[True, 0] + counts[False, 0] == 400
  images = np.arange(27).reshape(1, 3, 3, 3) * np.ones((2400, 1, 1, 1), np.int32)
  for (_, k), count in drawn(images, True, True).items():
    expected = 2400 / (12 if k else 4)
    assert abs(count - expected) < 4 * expected**0.5
  assert drawn(images, False, True)[False, 0] == pytest.approx(1200, abs=100)
  assert drawn(images, False, False)[False, 0] == 2400


def test_a_mesh_of_devices_that_are_not_here_is_like_one_that_is():
  assert parallel.make_mesh(2).abstract_mesh.axis_types == parallel.abstract_mesh(4, 2).axis_types
  assert parallel.make_mesh(2).shape == parallel.abstract_mesh(4, 2).shape


def test_no_more_steps_are_under_way_than_cpus_can_bear():
  done = []

  class Metric:
    def __init__(self, number):
      self.number = number

    def block_until_ready(self):
      done.append(self.number)

  step = runners.bounded(lambda state, batch: (state + 1, {'loss': Metric(state)}))
  for number in range(40):
    assert step(number, None)[0] == number + 1
    assert done == list(range(max(0, number + 1 - runners.AHEAD)))
  assert runners.AHEAD < 32  # computations that XLA:CPU lets a device have waiting


@pytest.mark.parametrize('mode', ['jit', 'pmap'])
def test_a_runner_bounds_its_step_and_has_the_program_by_itself(mode):
  mesh = parallel.make_mesh()
  abstract = jax.ShapeDtypeStruct((), jnp.float32, sharding=parallel.replicated(mesh))

  def add(state, batch, axis_name=None):
    del axis_name
    return state + 1, {'mean': batch.mean()}

  runner = runners.runner(mode, add, mesh, abstract)
  state = runner.put_state(jax.device_put(jnp.float32(0), abstract.sharding))
  batch = runner.put_batch(np.ones(8, np.float32))
  assert 'add' in runner.program.lower(state, batch).as_text()
  taken = inspect.getclosurevars(runner.step).nonlocals
  assert taken['step'] is runner.program and not taken['under_way']
  state, metrics = runner.step(state, batch)
  assert runner.get_state(state) == 1 and runner.get_metrics(metrics)['mean'] == 1
  assert len(taken['under_way']) == 1
