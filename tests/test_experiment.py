"""The door for Python: what it returns is what the commands write."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import vdm
from vdm import data
from vdm.evaluation.bound import elbo_fields

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {'train.num_steps': 6, 'train.eval_every_steps': 6, 'model.dropout': 0.0}


@pytest.fixture(scope='module')
def exp():
  return vdm.Experiment('digits:debug', SMALL)


@pytest.fixture(scope='module')
def trained(exp):
  state, losses = exp.init(), []
  for state, metrics in exp.fit(state, steps=6):  # noqa: B007, B020  as in the README
    losses.append(metrics['loss'])
  assert int(state.step) == 6 and np.isfinite(np.array(losses)).all()
  return state


@pytest.fixture(scope='module')
def workdir(exp, trained, tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  exp.save(trained, path)
  return path


def moved(state):
  """A state whose network does not return zero, as it does at the start."""
  bump = lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)
  network = jax.tree.map(bump, state.params['network'])
  params = {**state.params, 'network': network}
  return state.replace(params=params, averages=dict.fromkeys(state.averages, params))


@pytest.mark.slow
def test_fitting_is_what_the_command_does(exp, trained, tmp_path, rank_promotion_allowed):
  """The same batches, the same noise: the same parameters."""
  state = exp.train(tmp_path)
  assert int(state.step) == 6
  pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(trained.params), strict=True)
  for ours, theirs in pairs:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
  (card,) = tmp_path.glob('cards/bits_per_dim_ema_*_step00000006.json')
  found = exp.bits_per_dim(trained)
  np.testing.assert_allclose(found.value, json.loads(card.read_text())['value'], rtol=1e-5)


@pytest.mark.slow
def test_a_state_stays_usable_and_fitting_goes_on(exp, trained):
  start = exp.init()
  middle = [state for state, _ in exp.fit(start, steps=3)][-1]
  end = [state for state, _ in exp.fit(middle)][-1]  # up to config.train.num_steps
  assert [int(state.step) for state in (start, middle, end)] == [0, 3, 6]
  for ours, theirs in zip(jax.tree.leaves(end), jax.tree.leaves(trained), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_the_step_and_an_evaluation_are_compiled_once(exp, trained, monkeypatch):
  first = exp.bits_per_dim(trained, draws=2)
  monkeypatch.setattr('vdm.experiment.make_evaluator', None)
  monkeypatch.setattr('vdm.system.runners.jit_runner', None)
  assert exp.bits_per_dim(trained, draws=2).value == first.value
  assert exp.bits_per_dim(trained, 'raw', draws=2).value != first.value
  for _ in exp.fit(exp.init(), steps=1):
    pass
  with pytest.raises(TypeError):  # other settings are another program
    exp.bits_per_dim(trained, draws=3)


def test_the_schedule_of_training_is_the_adaptive_one_if_there_is_one():
  t = jnp.linspace(0.0, 1.0, 5)
  learns = vdm.Experiment('digits:debug', {'schedule.name': 'learned_endpoints'})
  state = learns.init()
  np.testing.assert_array_equal(
    learns.training_schedule(state)(t), learns.schedule(state, 'raw')(t)
  )
  adapts = vdm.Experiment('digits:debug', {'schedule.name': 'adaptive'})
  state = adapts.init()
  uniform = adapts.schedule(state)(t)
  np.testing.assert_allclose(adapts.training_schedule(state)(t), uniform, rtol=1e-6)
  adaptive = adapts.model.adaptive
  log_snr, loss = jnp.array([6.0, -4.0]), jnp.array([100.0, 0.0])
  hits = adaptive.hits(jnp.repeat(log_snr, 50), jnp.repeat(loss, 50))
  state = state.replace(adaptive=adaptive.update(state.adaptive, hits))
  assert adapts.training_schedule(state)(t)[1] > uniform[1]


def test_names_of_the_face_are_loaded_when_they_are_asked_for():
  code = 'import vdm; vdm.data.of_arrays, vdm.fields.coverage, vdm.weightings.WEIGHTINGS'
  subprocess.run([sys.executable, '-c', code], check=True)


def test_a_run_is_loaded_by_its_own_config(workdir, trained):
  loaded, state = vdm.load(workdir)
  assert loaded.config.train.num_steps == 6 and int(state.step) == 6
  for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(trained), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert int(vdm.load(workdir, step=6)[1].step) == 6
  with pytest.raises(ValueError, match='holds the steps 6'):
    vdm.load(workdir, step=5)
  with pytest.raises(ValueError, match='holds no checkpoint'):
    vdm.load(workdir / 'nowhere')


def test_a_step_is_saved_once_and_its_reading_may_be_changed(exp, trained, workdir):
  with pytest.raises(ValueError, match='must be one without step 6'):
    exp.save(trained, workdir)
  loaded, _ = vdm.load(workdir, overrides={'sample.batch_size': 16})
  assert loaded.config.sample.batch_size == 16


def test_a_run_older_than_a_leaf_is_loaded_with_its_default(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / 'old')
  file = tmp_path / 'old' / 'config.json'
  saved = json.loads(file.read_text())
  del saved['model']['condition_on'], saved['eval']['ode']['probe'], saved['train']['microbatches']
  file.write_text(json.dumps(saved))
  loaded, _ = vdm.load(tmp_path / 'old')
  assert loaded.config.model.condition_on == 'live' and loaded.config.train.microbatches == 1
  assert loaded.config.eval.ode.probe == 'rademacher'


def test_the_door_defines_no_flags():
  """Whose own script defines --config and --workdir can import it."""
  code = """
from absl import flags
import vdm
vdm.Experiment
flags.DEFINE_string('workdir', '', '')
flags.DEFINE_string('config', '', '')
"""
  subprocess.run([sys.executable, '-c', code], check=True)


def test_own_files_need_no_argument(tmp_path):
  file = tmp_path / 'own.py'
  file.write_text("""
from vdm.configs import digits

def get_config():
  return digits.get_config('debug')
""")
  assert vdm.Experiment(file).config.name == 'digits_debug'


def test_log_prob_has_the_mean_of_bits_per_dim(exp, trained):
  images = exp.source('eval').fetch(np.arange(40))['image']
  for params in ('ema', 'raw'):
    found = exp.log_prob(trained, images, draws=32, params=params)
    assert found.value.shape == found.stderr.shape == (40,) and (found.stderr > 0).all()
    whole = exp.bits_per_dim(trained, params, data.of_arrays(images), draws=32, max_images=0)
    nats = 64 * math.log(2)
    error = np.hypot(np.linalg.norm(found.stderr) / 40 / nats, whole.stderr)
    assert abs(-found.value.mean() / nats - whole.value) < 4 * error < 0.3
    np.testing.assert_allclose(found.terms.sum(axis=1), -found.value, rtol=1e-6)
  one = exp.log_prob(trained, images[:1], draws=1)
  assert np.isnan(one.stderr).all()


@pytest.mark.slow
def test_log_prob_by_the_ode(exp, trained):
  images = exp.source('eval').fetch(np.arange(3))['image']
  found = exp.log_prob(trained, images, draws=2, bound='ode')
  assert found.value.shape == (3,) and (found.stderr > 0).all() and (found.value < 0).all()
  again = exp.log_prob(trained, images[:2], draws=2, bound='ode')
  np.testing.assert_allclose(again.value, found.value[:2], rtol=1e-4)  # each on its own
  more = exp.log_prob(trained, images, draws=1, bound='ode', importance_samples=4)
  assert np.isnan(more.stderr).all() and (more.value != found.value).all()
  with pytest.raises(ValueError, match=r"settings=\['trace'\] must be left out for the bound"):
    exp.log_prob(trained, images, trace='exact')
  with pytest.raises(ValueError, match=r'importance=4 must be a leaf of config\.eval\.ode'):
    exp.log_prob(trained, images, bound='ode', importance=4)


def test_samples_take_objects_and_seeds(exp, trained):
  sampler = vdm.samplers.ddim()
  images = exp.sample(trained, 5, sampler=sampler, num_steps=3)
  assert images.shape == (5, 8, 8, 1)
  assert images.min() >= 0 and images.max() <= 16
  np.testing.assert_array_equal(images[:3], exp.sample(trained, 3, sampler=sampler, num_steps=3))
  assert (images != exp.sample(trained, 5, sampler=sampler, num_steps=3, seed=1)).any()
  by_name = vdm.Experiment(exp.config, {'sample.sampler.name': 'ddim', 'sample.num_steps': 3})
  np.testing.assert_array_equal(images, by_name.sample(trained, 5))


@pytest.mark.slow
def test_labels_and_guidance():
  settings = {'model.class_conditional': True, 'train.label_dropout': 0.1, 'sample.num_steps': 3}
  exp = vdm.Experiment('digits:debug', settings)
  state = moved(exp.init())
  label = np.array([3, 1, 4])
  same = exp.sample(state, 3, label=label)
  np.testing.assert_array_equal(same[:1], exp.sample(state, 1, label=3))
  assert exp.sample(state, 3, label=label, guidance=2.0).shape == same.shape
  np.testing.assert_array_equal(exp.sample(state, 3, label=label, guidance=1.0), same)
  guided = {'sample.guidance.kind': 'classifier_free', 'sample.guidance.weight': 3.0}
  own = vdm.Experiment(exp.config, guided)
  assert (own.sample(state, 3, label=label) != same).any()
  np.testing.assert_array_equal(own.sample(state, 3, label=label, guidance=1.0), same)
  with pytest.raises(ValueError, match=r'label=10 must be classes, 0 .. 9'):
    exp.sample(state, 3, label=10)
  images = exp.source('eval').fetch(np.arange(2))['image']
  nats = [exp.log_prob(state, images, draws=2, label=label).value for label in (None, [-1, -1])]
  np.testing.assert_array_equal(*nats)
  of_class = exp.log_prob_given(state, images, draws=2)
  assert np.isfinite(of_class(label=9)).all()
  for wrong in (10, np.array([3, -2])):
    with pytest.raises(ValueError, match=r'label=.* must be classes, 0 .. 9'):
      of_class(label=wrong)
  source = data.of_arrays(images, label=np.array([3, 10]))
  with pytest.raises(ValueError, match=r'label=.* must be classes, 0 .. 9'):
    exp.bits_per_dim(state, split=source)
  with pytest.raises(ValueError, match=r'label=\(3,\) must be an array \[4\]'):
    exp.sample(state, 4, label=label)


def test_guidance_needs_a_model_that_was_trained_for_it(exp, trained):
  with pytest.raises(ValueError, match=r"config.sample.guidance.kind='classifier_free' must be"):
    exp.sample(trained, 1, guidance=2.0)


@pytest.mark.slow
def test_denoiser_and_schedule_are_those_of_the_maths(exp, trained):
  schedule, denoiser = exp.schedule(trained), exp.denoiser(trained)
  log_snr = schedule(jnp.array([0.1, 0.9]))
  z = jnp.ones((2, 8, 8, 1))
  x, eps = denoiser(z, log_snr)
  again = vdm.gaussian.q_sample(x, eps, log_snr)
  np.testing.assert_allclose(again, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('digitz',), "config='digitz' must be a file, or one of configs/"),
    (('',), "config='' must be a file"),
    (('digits', {'train.stepz': 3}), 'config.train.stepz=3 is refused'),
    (('digits', {'train.num_steps': 'many'}), "config.train.num_steps='many' is refused"),
    (('digits', {'train.num_steps': 0}), 'config.train.num_steps=0 must be positive'),
  ],
)
def test_bad_input_is_refused_by_name(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    vdm.Experiment(*arguments)


def test_an_unknown_setting_is_refused_by_name(exp, trained):
  with pytest.raises(ValueError, match=r'drawz=3 must be a leaf of config.eval; it has '):
    exp.bits_per_dim(trained, drawz=3)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda exp, state, u: exp.log_prob(state, u, bound='ode', trace='exakt'),
      "config.eval.ode.trace='exakt' must be 'hutchinson' or 'exact'",
    ),
    (
      lambda exp, state, u: exp.log_prob(state, u, bound='ode', num_probes=0),
      'config.eval.ode.num_probes=0 must be 1 or more',
    ),
    (lambda exp, state, u: exp.log_prob(state, u, draws=0), 'draws=0 must be positive'),
    (lambda exp, state, u: exp.log_prob_given(state, u, draws=0), 'draws=0 must be positive'),
    (
      lambda exp, state, u: exp.sample(state, 1, num_steps=0),
      'config.sample.num_steps=0 must be positive',
    ),
    (
      lambda exp, state, u: exp.sample(state, 1, sampler='ddim'),
      "sampler='ddim' must be a Sampler such as vdm.samplers.ddim(); a name is for config.sample",
    ),
    (
      lambda exp, state, u: exp.bits_per_dim(state, max_images=-1),
      'config.eval.max_images=-1 must be zero or more',
    ),
    (
      lambda exp, state, u: exp.bits_per_dim(state, params='mean'),
      "params='mean' must be one of raw, ema",
    ),
    (
      lambda exp, state, u: exp.bits_per_dim(state, split=data.of_arrays(u * 15)),
      'must be integers 0 .. 16',
    ),
    (
      lambda exp, state, u: next(exp.fit(state, 1, source=data.of_arrays(u / 16))),
      'must be integers 0 .. 16',
    ),
    (
      lambda exp, state, u: exp.bits_per_dim(state, split=u),
      "source='ndarray' must be 'train', 'eval' or a vdm.data.Source; vdm.data.of_arrays(images)",
    ),
    (
      lambda exp, state, u: next(exp.fit(state, 1, source=u)),
      "source='ndarray' must be 'train', 'eval' or a vdm.data.Source",
    ),
    (
      lambda exp, state, u: exp.bits_per_dim(state, split=data.of_arrays(u, condition=u)),
      'condition=(1, 8, 8, 1) must be left out',
    ),
    (
      lambda exp, state, u: exp.bits_per_dim(state, split=data.of_arrays(u, valid=u[..., :1] > 0)),
      'mask=(1, 8, 8, 1) must be left out',
    ),
    (
      lambda exp, state, u: data.of_arrays(u, label=np.zeros((16, 1), int)),
      'label=(16, 1) must be of shape (16,)',
    ),
  ],
)
def test_arguments_that_no_config_could_have_are_refused(exp, trained, call, message):
  images = exp.source('eval').fetch(np.arange(16))['image']
  with pytest.raises(ValueError, match=re.escape(message)):
    call(exp, trained, images)


def test_a_mask_of_any_numbers_is_a_mask(rank_promotion_allowed):
  changes = {'data.derive': 'inpainting', 'data.masked': True, 'data.condition_shape': (8, 8, 1)}
  exp = vdm.Experiment('digits:debug', SMALL | changes)
  state = moved(exp.init())
  batch = exp.source('eval').fetch(np.arange(4))
  nats = [
    exp.log_prob_given(state, batch['image'], draws=2, mask=mask)(condition=batch['condition'])
    for mask in (batch['valid'], 255 * batch['valid'].astype(np.uint8))
  ]
  np.testing.assert_array_equal(*nats)


def test_bins_lie_between_the_ends_of_the_evaluation(exp, trained):
  """What is spent in the bins is the diffusion term, whatever schedule it was measured with."""
  narrow = ConfigDict(dict(name='linear', log_snr_min=-3.0, log_snr_max=2.0))
  for settings, width in (({}, 13.0), ({'schedule': narrow}, 5.0)):
    found = exp.bits_per_dim(trained, draws=16, max_images=360, **settings)
    assert found.ends[0] - found.ends[1] == pytest.approx(width, abs=0.1)
    assert np.isfinite(found.bins).all()
    spent = found.bins.mean() * (found.ends[0] - found.ends[1])
    assert spent == pytest.approx(found.terms['diffusion']['value'], rel=0.03)
    fields = elbo_fields(exp.config.eval, found)
    assert (fields['log_snr_max'], fields['log_snr_min']) == found.ends


CONDITIONAL = {'data.derive': 'low_resolution', 'data.condition_shape': (4, 4, 1)}


@pytest.mark.parametrize(('absent', 'shown'), [(None, 'None'), (np.nan, "'none for image 0'")])
def test_a_model_that_knows_no_lack_of_conditions_is_given_them(absent, shown):
  exp = vdm.Experiment('digits:debug', SMALL | CONDITIONAL)
  learned = vdm.Experiment('digits:debug', SMALL | CONDITIONAL | {'train.label_dropout': 0.1})
  state, batch = moved(exp.init()), exp.source('eval').fetch(np.arange(4))
  images = batch['image']
  none = absent and np.full((4, 4, 4, 1), absent)
  message = rf'^condition={shown} must be given for each image: .*; give it, or train'
  for call in (
    lambda: exp.log_prob(state, images, draws=1, condition=none),
    lambda: exp.log_prob_given(state, images, draws=1)(condition=none),
    lambda: exp.denoiser(state, condition=none),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(ValueError, match=r"^condition='none for image 3' must be given"):
    some = np.concatenate([batch['condition'][:3], np.full((1, 4, 4, 1), np.nan)])
    exp.sample(state, 4, condition=some)
  assert np.isfinite(learned.log_prob(state, images, draws=1, condition=none).value).all()
  assert learned.denoiser(state, condition=none)


def test_a_source_by_hand_without_classes_has_none_and_not_the_first():
  classes = {'model.class_conditional': True}
  exp = vdm.Experiment('digits:debug', SMALL | classes)
  learned = vdm.Experiment('digits:debug', SMALL | classes | {'train.label_dropout': 0.1})
  state, images = moved(exp.init()), exp.source('eval').fetch(np.arange(16))['image']
  source = data.of_arrays(images)
  for call in (exp.bits_per_dim, lambda state, **given: next(exp.fit(state, 1, given['split']))):
    with pytest.raises(ValueError, match=r"^label='none for image 0' must be given"):
      call(state, split=source)
  told = [data.of_arrays(images, label=np.full(16, label)) for label in (-1, 0)]
  left_out, none, first = [
    learned.bits_per_dim(state, 'raw', each, draws=1, max_images=16).value
    for each in (source, *told)
  ]
  assert left_out == none != first


@pytest.mark.parametrize(
  ('name', 'bad', 'message'),
  [('condition', np.nan, 'must be finite'), ('valid', 0, 'must be nonzero somewhere')],
)
def test_a_source_by_hand_is_looked_at_as_files_are(name, bad, message):
  changes = {'data.derive': 'inpainting', 'data.masked': True, 'data.condition_shape': (8, 8, 1)}
  exp = vdm.Experiment('digits:debug', SMALL | changes)
  batch = dict(exp.source('eval').fetch(np.arange(4)))
  images, rows = batch.pop('image'), batch[name].astype(np.float32)
  rows[1, :4] = bad
  if name == 'valid':
    rows[1] = bad
  source = data.of_arrays(images, **batch | {name: rows})
  with pytest.raises(ValueError, match=message):
    exp.bits_per_dim(exp.init(), split=source, draws=1)


def test_a_config_given_is_not_changed(exp):
  before = exp.config.to_dict()
  changed = vdm.Experiment(exp.config, {'train.batch_size': 32})
  assert changed.config.train.batch_size == 32 and exp.config.to_dict() == before


def test_the_door_in_the_readme_runs(tmp_path, monkeypatch, rank_promotion_allowed):
  """As it stands, but for the sizes."""
  (code,) = re.findall(r'```python door\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
  code = code.replace("'digits'", "'digits:debug'").replace('steps=100', 'steps=2')
  monkeypatch.chdir(tmp_path)
  scope = {}
  exec(code, scope)
  assert scope['images'].shape == (16, 8, 8, 1) and np.isfinite(scope['result'].value)
  assert (tmp_path / 'runs' / 'mine' / 'config.json').exists()


def test_a_script_of_your_own_uses_the_cores():
  code = """
import os
import vdm
vdm.use_cores()
import jax
cores = min(len(os.sched_getaffinity(0)), 8)
assert jax.device_count() <= cores < 2 * jax.device_count()
assert '--xla_cpu_collective_call_terminate_timeout_seconds' in os.environ['XLA_FLAGS']
"""
  ours = ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')
  environment = {k: v for k, v in os.environ.items() if k not in ours}
  subprocess.run([sys.executable, '-c', code], check=True, env=environment)
