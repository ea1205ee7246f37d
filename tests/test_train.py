"""The loop, end to end: what a run leaves behind, how it goes on, and how it stops."""

import contextlib
import csv
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from vdm.configs import default, digits

from vdm import build, cards, data
from vdm.data.augment import augment
from vdm.diffusion.gaussian import Prediction, fold_in
from vdm.evaluation import evaluate
from vdm.nn import NETWORKS, layers
from vdm.nn.conditioning import Conditioning
from vdm.sampling import run as run_lib
from vdm.system import parallel, runners, stopping
from vdm.training import loop
from vdm.training import step as step_lib
from vdm.training.step import loss, make_train_step, recipe
from vdm.workdir import posthoc_ema
from vdm.workdir.load import read_run


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def config_of(**settings):
  config = digits.get_config('debug')
  with config.unlocked():
    config.model.dropout = 0.2
    config.eval.max_images = 8
    config.schedule.name = 'learned_net'
    config.ema.update(power_stds=(0.05, 0.1), snapshot_every_steps=1)
    for name, value in settings.items():
      block, leaf = name.split('__')
      config[block][leaf] = value
  return config


def test_what_a_network_refuses_is_refused_before_anything_is_written(tmp_path):
  """Else the workdir holds a run with the bad value, and the remedy is refused for it."""
  with pytest.raises(ValueError, match=r"config.model.padding='circular' must be 'zero', "):
    loop.train(config_of(model__padding='circular'), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def final_state(config, workdir):
  return read_run(config, workdir).state


def assert_equal_bit_for_bit(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """A run of four steps without a break."""
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  workdir = tmp_path_factory.mktemp('straight')
  assert loop.train(config_of(), workdir) == 0
  return workdir


@pytest.mark.slow
def test_a_run_leaves_checkpoints_cards_samples_plots_and_tensorboard(straight):
  names = {str(path.relative_to(straight)) for path in straight.rglob('*') if path.is_file()}
  for expected in (
    'config.json',
    'samples/step_00000004.png',
    'plots/bits_per_dim.png',
    'plots/diffusion_loss.png',
    'plots/schedule.png',
    'plots/spectrum.png',
    'samples/progressive_00000004.png',
  ):
    assert expected in names
  assert any(name.startswith('tensorboard/events') for name in names)
  ema, raw = cards.series(straight).values()
  assert [c['step'] for c in ema] == [c['step'] for c in raw] == [2, 4]
  card = ema[-1]
  assert card['metric'] == 'bits_per_dim' and card['step'] == 4 and card['num_images'] == 8
  assert not card['whole_split'] and card['data']['name'] == 'digits'
  assert card['value'] == pytest.approx(sum(term['value'] for term in card['terms'].values()))
  assert card['environment']['versions']['jax'] == jax.__version__
  assert card['config']['model']['width'] == config_of().model.width


@pytest.mark.slow
def test_a_run_writes_its_speed_and_its_wait_for_data(straight):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util.tensor_util import make_ndarray

  events = event_accumulator.EventAccumulator(str(straight / 'tensorboard')).Reload()
  for name in ('images_per_second', 'data_wait'):
    steps = [event.step for event in events.Tensors(f'train/{name}')]
    assert steps == [2, 3, 4]  # the first compiles
  shares = [float(make_ndarray(e.tensor_proto)) for e in events.Tensors('train/data_wait')]
  assert all(0 <= share < 1 for share in shares) and max(shares) > 0


@pytest.mark.slow
def test_an_evaluation_is_one_line(tmp_path, caplog):
  with caplog.at_level('INFO'):
    assert loop.train(config_of(fid__train_every_steps=4), tmp_path) == 0
  own = [record for record in caplog.records if f'{os.sep}vdm{os.sep}' in record.pathname]
  lines = [record.getMessage() for record in own]
  value = r'[\d.]+ \+- [\d.]+'
  bound = rf'{value} bits/dim on the first 8 of 360 test images \(ema\), {value} \(raw\)'
  two, four = [line for line in lines if 'test images' in line]
  assert re.fullmatch(rf'step 2: {bound} \(\d+ s\)', two), two
  assert re.fullmatch(rf'step 4: {bound}; FD-classifier {value} \(\d+ s\)', four), four
  assert max(map(len, lines[:-4])) < 160, lines  # the end says where to look, by whole paths


@pytest.mark.slow
def test_two_and_two_resumed_steps_are_four_straight_ones(tmp_path):
  resumed = tmp_path / 'resumed'
  config = config_of(optimizer__decay='constant')
  straight_constant = tmp_path / 'constant'
  assert loop.train(config, straight_constant) == 0
  config.train.num_steps = 2
  assert loop.train(config, resumed) == 0
  config.train.num_steps = 4
  assert loop.train(config, resumed) == 0
  assert_equal_bit_for_bit(final_state(config, straight_constant), final_state(config, resumed))


@pytest.mark.slow
def test_a_finished_run_says_so_and_does_nothing(straight, caplog):
  before = {path: path.stat().st_mtime for path in straight.rglob('*.json')}
  with caplog.at_level('INFO'):
    assert loop.train(config_of(), straight) == 0
  assert 'is done' in caplog.text and 'bits/dim' in caplog.text
  assert f'samples: {straight}/samples/step_00000004.png' in caplog.text
  assert f'curves: tensorboard --logdir={straight}/tensorboard' in caplog.text
  assert f'all of it on one page: python -m vdm.report {straight}' in caplog.text
  written = {path: t for path, t in before.items() if path.parent.name == 'cards'}
  assert all(path.stat().st_mtime == t for path, t in written.items())


@pytest.fixture
def not_under_nohup():
  """SIGHUP as it is in a terminal, whoever runs the tests."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_next_start_ends_as_if_uninterrupted(
  number, straight, tmp_path, not_under_nohup
):
  """Sent from a thread once the first step has been made."""
  config = config_of(train__num_steps=4, checkpoint__every_steps=100)
  original, sent = loop.make_train_step, []

  def step_then_signal(*args):
    step = original(*args)

    def wrapped(state, batch):
      jax.debug.callback(lambda n: n == 1 and sent.append(os.kill(os.getpid(), number)), state.step)
      return step(state, batch)

    return wrapped

  loop.make_train_step = step_then_signal
  try:
    assert loop.train(config, tmp_path) == stopping.EXIT_PREEMPTED
  finally:
    loop.make_train_step = original
  assert len(sent) == 1
  assert 1 <= int(final_state(config, tmp_path).step) < 4
  assert loop.train(config, tmp_path) == 0
  assert_equal_bit_for_bit(final_state(config, tmp_path), final_state(config_of(), straight))


@pytest.mark.slow
@pytest.mark.parametrize(
  'term, poison',
  [
    (
      'diffusion_bpd',
      lambda params: params | {'network': jax.tree.map(lambda a: a * np.nan, params['network'])},
    ),
    (
      'recon_bpd',
      lambda params: (
        params
        | {
          'schedule': params['schedule']
          | {'log_snr_max': params['schedule']['log_snr_max'] * np.nan}
        }
      ),
    ),
  ],
)
def test_a_value_that_is_not_finite_stops_the_run_and_names_the_term(term, poison, tmp_path):
  config = config_of(checkpoint__every_steps=2)
  original = build.init_state

  def poisoned(config, model):
    init = original(config, model)
    return lambda: init().replace(params=poison(init().params))

  build.init_state = poisoned
  try:
    with pytest.raises(FloatingPointError, match=rf'step 1: {term} is nan; stopped. .*checkpoint'):
      loop.train(config, tmp_path)
  finally:
    build.init_state = original
  assert not (tmp_path / 'checkpoints' / '2').exists()


def poison_gradients(monkeypatch, *steps):
  """Makes gradients NaN in the updates of these numbers, from 0 on."""
  original = step_lib.gradients

  def poisoned(recipe, state, *args):
    grads, metrics = original(recipe, state, *args)
    factor = jnp.where(jnp.isin(state.step, jnp.array(steps)), jnp.nan, 1.0)
    return jax.tree.map(lambda g: g * factor, grads), metrics

  monkeypatch.setattr(step_lib, 'gradients', poisoned)


@pytest.mark.slow
def test_a_step_that_is_skipped_changes_nothing(tmp_path, monkeypatch, caplog):
  poison_gradients(monkeypatch, 1, 2)
  config = config_of(train__on_nan='skip', train__most_skipped=2, checkpoint__every_steps=1)
  config.checkpoint.keep = 9
  with caplog.at_level('WARNING'):
    assert loop.train(config, tmp_path) == 0
  assert caplog.text.count('the step is skipped') == 2 and '2 in a row' in caplog.text
  states = [read_run(config, tmp_path, str(step)).state for step in (1, 2, 3, 4)]
  for state in states[1:3]:
    assert_equal_bit_for_bit(state.replace(step=states[0].step), states[0])
  kernel = lambda state: jax.tree.leaves(state.params['network'])[-1]
  assert (kernel(states[3]) != kernel(states[2])).any()


@pytest.mark.slow
def test_a_run_whose_lock_another_job_has_taken_saves_no_more(tmp_path, monkeypatch):
  calls = []

  def check():
    calls.append(None)
    if len(calls) == 3:
      raise ValueError('taken')

  monkeypatch.setattr(loop.lock, 'hold', lambda workdir: contextlib.nullcontext(check))
  with pytest.raises(ValueError, match='taken'):
    loop.train(config_of(checkpoint__every_steps=100), tmp_path)
  assert len(calls) == 3 and not list((tmp_path / 'checkpoints').glob('[0-9]*'))


def test_too_many_skipped_steps_stop_the_run(tmp_path, monkeypatch):
  poison_gradients(monkeypatch, 1, 2)
  config = config_of(train__on_nan='skip', train__most_skipped=1, checkpoint__every_steps=1)
  message = r'step 3: grad_norm is nan, 2 in a row; stopped. The last good checkpoint is .*/2\.'
  with pytest.raises(FloatingPointError, match=message):
    loop.train(config, tmp_path)


PLACES = {
  'params': lambda state: state.replace(params=poisoned(state.params)),
  'averages.ema': lambda state: state.replace(
    averages=state.averages | {'ema': poisoned(state.averages['ema'])}
  ),
  'averages.std_0.1': lambda state: state.replace(
    averages=state.averages | {'std_0.1': poisoned(state.averages['std_0.1'])}
  ),
  'opt_state': lambda state: state.replace(opt_state=poisoned(state.opt_state)),
}


def poisoned(tree):
  last = lambda a: a.ravel().at[-1].set(jnp.nan).reshape(a.shape) if a.dtype == 'float32' else a
  return jax.tree.map(last, tree)


@pytest.mark.slow
@pytest.mark.parametrize('place', PLACES)
def test_what_is_not_finite_is_never_saved_and_the_same_command_goes_on(
  place, straight, tmp_path, monkeypatch
):
  """After the update of step 3, behind the metrics of its loss."""
  original = loop.make_train_step

  def with_fault(*args):
    step = original(*args)

    def run(state, batch, axis_name=None):
      after, metrics = step(state, batch, axis_name)
      bad = PLACES[place](after)
      return jax.tree.map(lambda a, b: jnp.where(after.step == 3, b, a), after, bad), metrics

    return run

  config = config_of(checkpoint__every_steps=1)
  monkeypatch.setattr(loop, 'make_train_step', with_fault)
  message = rf'step 3: .*{place}.* not finite; stopped. The last good checkpoint is .*/2\.'
  with pytest.raises(FloatingPointError, match=message):
    loop.train(config, tmp_path)
  monkeypatch.setattr(loop, 'make_train_step', original)  # a fault of the machine
  assert loop.train(config, tmp_path) == 0
  assert_equal_bit_for_bit(final_state(config, tmp_path), final_state(config_of(), straight))


@pytest.mark.slow
@pytest.mark.parametrize('interrupted', [False, True])
def test_an_evaluation_that_fails_stops_the_run_once(interrupted, straight, tmp_path, monkeypatch):
  """At its step, or when it is made up for; the same command then goes on."""
  original, steps = evaluate.evaluate, []

  def fails(state, *args):
    steps.append(int(state.step))
    if interrupted and len(steps) == 1:
      raise stopping.Stopped
    if steps[-1] == 2:
      raise FloatingPointError('the bound of step 2 is nan')
    return original(state, *args)

  config = config_of(train__eval_every_steps=2, checkpoint__every_steps=1)
  monkeypatch.setattr(evaluate, 'evaluate', fails)
  if interrupted:
    assert loop.train(config, tmp_path) == stopping.EXIT_PREEMPTED
  with pytest.raises(FloatingPointError, match='the bound of step 2 is nan'):
    loop.train(config, tmp_path)
  assert loop.train(config, tmp_path) == 0
  assert steps == [2, 2, 4][not interrupted :]
  assert_equal_bit_for_bit(final_state(config, tmp_path), final_state(config_of(), straight))


@pytest.mark.slow
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(straight, tmp_path, caplog):
  config = config_of()
  assert loop.train(config, tmp_path) == 0
  newest = tmp_path / 'checkpoints' / '4'
  # Orbax leaves files that it does not read again: which are read is its business.
  for path in (newest / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with caplog.at_level('WARNING'):
    assert loop.train(config, tmp_path) == 0
  assert (tmp_path / 'checkpoints' / '4.corrupt').exists()
  assert 'checkpoints/4' in caplog.text and 'broken' in caplog.text
  assert_equal_bit_for_bit(final_state(config, tmp_path), final_state(config, straight))


@pytest.mark.slow
def test_eval_and_sample_read_the_newest_checkpoint(straight):
  config = config_of(eval__num_timesteps=10, eval__augmented_elbo=True)
  assert evaluate.run(read_run(config, straight)) == 0
  (table,) = (straight / 'tables').glob('augmented_elbo_ema_*.csv')
  rows = list(csv.DictReader(table.read_text().splitlines()))
  spent = sum(float(r['bits_per_log_snr']) for r in rows) * 13 / len(rows)
  assert float(rows[-1]['prior_and_diffusion']) == pytest.approx(spent, rel=0.05)
  assert all(float(r['weight']) == 0 for r in rows)  # weight one: all of it on the data itself
  (card,) = straight.glob('cards/bits_per_dim_ema_T10_8x2_seed0_*_step00000004.json')
  card = json.loads(card.read_text())
  assert card['bound'] == 'discrete-time ELBO, T = 10'
  assert run_lib.run(read_run(config, straight)) == 0
  (path,) = (straight / 'samples').glob('*/*.npz')
  stored = np.load(path)
  assert stored['images'].shape == (config.sample.num_images, 8, 8, 1)
  assert stored['images'].dtype == np.uint8 and stored['images'].max() < 17


@pytest.mark.slow
def test_a_workdir_of_another_config_is_refused(straight):
  with pytest.raises(ValueError, match=r'config.model.width=16.*not 24'):
    loop.train(config_of(model__width=24), straight)


@pytest.mark.slow
def test_the_network_sees_the_flag_in_training_and_zeros_after(monkeypatch):
  config = config_of(model__augmentation_flag=True, data__flip=True, data__rotate=True)
  model, seen = build.model(config), []
  params = jax.eval_shape(model.init, jax.random.key(0))

  def denoiser(params, given, flag, *, train, key_dropout):
    seen.append(flag)
    return lambda z, log_snr: Prediction(z, z)

  image = np.random.default_rng(0).integers(0, 17, (8, 8, 8, 1)).astype(np.uint8)
  index = jnp.arange(8)
  batch = {'image': jnp.asarray(image), 'label': 0 * index, 'index': index}
  learned, _ = build.schedule(config.schedule)
  fake = model._replace(denoiser=denoiser)
  given = ({'schedule': learned.init()}, None, {}, batch, jax.random.key(1), None)
  loss(recipe(config, fake), *given)
  keys = [fold_in(key, index) for key in jax.random.split(jax.random.key(1), 6)[3:5]]
  _, flag = augment(*keys, {'image': batch['image']}, True, True)
  np.testing.assert_array_equal(seen, [flag])
  assert 0 < flag.sum() < 8

  conditioning = Conditioning.__call__

  def note(self, t, label=None, vector=None, flag=None):
    seen.append(flag)
    return conditioning(self, t, label, vector, flag)

  monkeypatch.setattr(Conditioning, '__call__', note)
  for given in (flag, None):  # in training; in evaluation and sampling
    jax.eval_shape(
      lambda p, given=given: model.denoiser(p, flag=given)(jnp.ones(image.shape), index / 8), params
    )
    assert seen[-1] is given


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('rate', [None, 0.3])
def test_dropout_is_on_in_training_alone_at_the_rate_of_the_network(name, rate):
  """The leaf's, and where there is none that which the network has by default."""
  config = digits.get_config()
  default_rate = NETWORKS[name].dropout
  leaves = dict(default.SMALL_NETWORKS[name], name=name) | (
    {} if rate is None else {'dropout': rate}
  )
  with config.unlocked():
    kept = ('output', 'class_conditional', 'condition_on', 'dtype')
    config.model = {leaf: config.model[leaf] for leaf in kept} | leaves
    config.data.image_shape = (16, 16, 1)
  model, calls = build.model(config), []

  def note(call, args, kwargs, context):
    if isinstance(context.module, layers.Dropout) and context.method_name == '__call__':
      calls.append((context.module.rate, kwargs['train']))
    return call(*args, **kwargs)

  def seen(run, *args):
    calls.clear()
    with nn.intercept_methods(note):
      jax.eval_shape(run, *args)
    return {call for call in calls if call[0]}

  image, index = jnp.zeros((8, 16, 16, 1), jnp.uint8), jnp.arange(8)
  batch = {'image': image, 'label': 0 * index, 'index': index}
  mesh = parallel.make_mesh()
  state = parallel.abstract_state(mesh, build.init_state(config, model))
  step = make_train_step(config, model)
  evaluated = lambda params: model.denoiser(params)(jnp.float32(image), index / 8)
  wanted = default_rate if rate is None else rate
  assert seen(step, state, batch) == ({(wanted, True)} if wanted else set())
  assert seen(evaluated, state.params) == ({(wanted, False)} if wanted else set())


@pytest.mark.parametrize(
  'settings, message',
  [
    (
      dict(data__rotate=True),
      r'config\.data\.rotate=True must be False for a network that is not told .*; '
      r'set config\.model\.augmentation_flag=True\.$',
    ),
    (
      dict(data__rotate=True, model__augmentation_flag=True, data__image_shape=(28, 20, 1)),
      r'config\.data\.rotate=True must be False for images that are not square, '
      r'config\.data\.image_shape=\(28, 20, 1\); config\.data\.flip works',
    ),
  ],
)
def test_turns_need_the_flag_and_square_images(settings, message):
  with pytest.raises(ValueError, match=message):
    build.model(config_of(**settings))


@pytest.mark.slow
def test_training_lowers_the_loss_on_digits(tmp_path):
  """A minute of the real thing, in miniature: well below a uniform guess, log2(17) = 4.09 bits."""
  config = config_of(train__batch_size=32, train__num_steps=250, model__dropout=0.0)
  config.optimizer.update(learning_rate=3e-3, warmup_steps=10)
  model = build.model(config)
  mesh = parallel.make_mesh()
  init = build.init_state(config, model)
  runner = runners.runner(
    'jit',
    make_train_step(config, model),
    mesh,
    parallel.abstract_state(mesh, init),
  )
  state = parallel.initial_state(mesh, init)
  source = data.load(config.data, 'train')
  losses = []
  for batch, _ in zip(loop.train_batches(source, 32, config.seed), range(250), strict=False):
    state, metrics = runner.step(state, runner.put_batch(batch))
    losses.append(float(metrics.scalars['bits_per_dim']))
  assert np.mean(losses[-20:]) < 3.9 and np.mean(losses[:5]) > 4.5


@pytest.mark.slow
@pytest.mark.parametrize('std', [0.05, 0.1])
def test_a_stored_length_is_reconstructed_as_it_was_tracked(straight, std):
  config = config_of(ema__reconstruct_std=std)
  assert posthoc_ema.run(read_run(config, straight)) == 0
  out = straight.with_name(f'{straight.name}_std{std:g}')
  made, tracked = final_state(config, out), final_state(config, straight)
  pairs = zip(
    jax.tree.leaves(made.averages['ema']),
    jax.tree.leaves(tracked.averages[f'std_{std:g}']),
    strict=True,
  )
  for ours, theirs in pairs:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
  assert_equal_bit_for_bit(made.params, tracked.params)


@pytest.mark.slow
def test_reconstruction_needs_snapshots_of_the_run_whatever_the_config_given(tmp_path):
  config = config_of(ema__power_stds=(), ema__snapshot_every_steps=0, train__num_steps=2)
  assert loop.train(config, tmp_path) == 0
  with pytest.raises(ValueError, match=r'config.ema.power_stds=\(\) must be two lengths'):
    posthoc_ema.run(read_run(config_of(), tmp_path))


@pytest.mark.slow
def test_reconstruction_before_the_first_snapshot_is_refused(tmp_path):
  config = config_of(ema__snapshot_every_steps=50, train__num_steps=2)
  assert loop.train(config, tmp_path / 'run') == 0
  with pytest.raises(ValueError, match=r'--step=2 must be one after a stored snapshot'):
    posthoc_ema.run(read_run(config, tmp_path / 'run'))
  assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_a_signal_while_the_first_step_is_compiled_is_not_said_to_be_saved(
  tmp_path, monkeypatch, caplog
):
  def interrupted(*_):
    raise stopping.Stopped(stopping.EXIT_PREEMPTED)

  made = runners.runner
  runner = lambda *args: made(*args)._replace(step=interrupted)
  monkeypatch.setattr(runners, 'runner', runner)
  with caplog.at_level('INFO'), pytest.raises(stopping.Stopped):
    loop.train(config_of(), tmp_path)
  assert 'stopped and saved' not in caplog.text
  assert not any((tmp_path / 'checkpoints').iterdir())
