import csv
import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from vdm.configs import digits, gaussian_fields
from vdm.configs.ablations import loss_grid, multivariate, recipe, schedules, weightings

from vdm import ablate, build
from vdm.diffusion import heads
from vdm.evaluation import grids
from vdm.workdir import config_file


def config_of(reference=(), **axes):
  base = digits.get_config('debug')
  return ConfigDict(
    dict(base=base, axes=axes, evaluations=(2, 4), reference=dict(reference))
  ).lock()


AXES = dict(
  weighting=dict(
    elbo=dict(weighting=dict(name='elbo')),
    wide=dict(
      weighting=dict(name='sigmoid', bias=3.0),
      schedule=dict(name='cosine', log_snr_min=-5.0, log_snr_max=8.0),
    ),
  ),
  seed={'0': dict(seed=0), '1': dict(seed=1)},
)


def test_runs_are_the_product_of_the_axes():
  runs = ablate.expand(config_of(**AXES))
  assert [grids.folder(labels) for labels, _ in runs] == ['elbo+0', 'elbo+1', 'wide+0', 'wide+1']
  labels, config = runs[3]
  assert labels == dict(weighting='wide', seed='1')
  assert config.weighting.to_dict() == dict(name='sigmoid', bias=3.0)
  assert config.seed == 1 and config.name == 'wide+1' and config.is_locked
  assert runs[0][1].schedule == digits.get_config('debug').schedule  # the base's


@pytest.mark.parametrize(
  ('grid', 'arg', 'count'),
  [
    (weightings, '', 36),
    (schedules, '', 9),
    (loss_grid, '', 81),
    (loss_grid, 'debug', 8),
    (loss_grid, 'fashion_mnist', 36),
    (loss_grid, 'fashion_mnist_debug', 8),
  ],
)
def test_the_shipped_grids_build(grid, arg, count):
  runs = ablate.expand(grid.get_config(arg))
  assert len(runs) == count
  for _, config in runs[::3]:
    build.model(config)


@pytest.mark.parametrize('grid', [recipe, schedules, multivariate])
def test_a_range_of_log_snr_for_the_base_is_that_of_all_runs(grid):
  config = grid.get_config()
  with config.unlocked():
    config.base.schedule.log_snr_max = 9.5
  assert {run.schedule.log_snr_max for _, run in ablate.expand(config)} == {9.5}
  config.base.schedule = ConfigDict(dict(name='linear', log_snr_min=-5.0))
  with pytest.raises(ValueError, match=r'takes schedule.log_snr_max from config.base, which lacks'):
    ablate.expand(config)


def test_the_grid_of_losses_is_three_heads_by_three_weightings():
  """Whose networks start alike: what is predicted is 0, whatever it is."""
  runs = ablate.expand(loss_grid.get_config())[27::3][:9]
  assert [grids.folder(labels) for labels, _ in runs][:2] == [
    'p2+eps+eps-loss+0',
    'p2+eps+v-loss+0',
  ]
  log_snr = jnp.linspace(-6.0, 6.0, 5)
  weights = {}
  for labels, config in runs:
    assert config.model.output == labels['prediction'] and config.model.patch_size == 2
    weights.setdefault(labels['space'], []).append(build.model(config).weighting(log_snr))
  for weight, head in zip(weights.values(), ('eps', 'v', 'x'), strict=True):
    np.testing.assert_array_equal(weight, 3 * weight[:1])
    over_eps = weight[0] / weights['eps-loss'][0]
    np.testing.assert_allclose(over_eps, heads.loss_ratio(head, log_snr), rtol=1e-5)
  config = runs[0][1]  # eps, without z added to it
  model = build.model(config)
  z = jnp.ones((1, *model.image_shape))
  found = jax.eval_shape(model.init, jax.random.key(0))['network']
  zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), found)
  denoiser = model.denoiser({'network': zeros, 'schedule': {}})
  np.testing.assert_array_equal(denoiser(z, jnp.zeros(1)).eps, 0 * z)


def test_labels_are_text():
  config = config_of()
  with config.unlocked():
    config.axes.seed = ConfigDict({0: dict(seed=0)}, convert_dict=False)
  with pytest.raises(
    ValueError, match=r"config.axes.seed=0 must be a label that is text; write '0'"
  ):
    ablate.expand(config)


@pytest.mark.parametrize('index', ['36', '-1', 'x'])
def test_a_run_that_is_not_in_the_grid_is_refused(index, monkeypatch):
  monkeypatch.setattr(ablate, '_INDEX', SimpleNamespace(value=['0', index]))
  with pytest.raises(ValueError, match=f'--index={index} must be from 0 to 35'):
    ablate._indices(36)


def test_workers_share_the_runs_that_are_left(monkeypatch):
  started = []

  class Child:
    def __init__(self, command, env):
      started.append(command[1:])
      assert env['JAX_NUM_CPU_DEVICES'] == '1' and env['PATH'] == os.environ['PATH']
      self.status = {'--index=1,7': 1, '--index=4': 75}.get(command[-1], 0)

    def wait(self):
      return self.status

    def terminate(self):
      pass

  monkeypatch.delenv('JAX_NUM_CPU_DEVICES', raising=False)
  monkeypatch.setattr(ablate.subprocess, 'Popen', Child)
  argv = ['ablate', '--workdir=W', '--workers', '3', '-index=0']
  monkeypatch.setattr(ablate.sys, 'argv', argv)
  monkeypatch.setattr(ablate, '_WORKERS', SimpleNamespace(value=3))
  assert ablate._share([1, 4, 5, 7]) == 75
  monkeypatch.setattr(Child, 'wait', lambda self: -9 if self.status else 0)  # SIGKILL
  assert ablate._share([1, 4, 5, 7]) == 137
  started = started[:3]
  hands = [command[-1] for command in started]
  assert hands == ['--index=1,7', '--index=4', '--index=5']
  for command in started:  # of a flag that is given twice the last counts
    assert command[:3] == ['-m', 'vdm.ablate', '--workdir=W']
    assert command[-3:-1] == ['--workers=1', '--num_processes=1']  # none joins another's job


def test_workers_are_refused_in_a_job_of_several_processes(tmp_path, monkeypatch):
  monkeypatch.setattr(ablate, '_WORKERS', SimpleNamespace(value=2))
  monkeypatch.setattr(ablate, '_INDEX', SimpleNamespace(value=None))
  monkeypatch.setattr(ablate.cli, 'named_job', lambda: False)
  monkeypatch.setenv('SLURM_NTASKS', '2')
  monkeypatch.setenv('SLURM_STEP_NODELIST', 'a,b')
  with pytest.raises(ValueError, match=r'--workers=2 must be 1 in a job of several processes'):
    ablate.run(weightings.get_config('debug'), tmp_path)
  monkeypatch.delenv('SLURM_STEP_NODELIST')
  monkeypatch.setattr(ablate.cli, 'named_job', lambda: True)
  with pytest.raises(ValueError, match=r'--workers=2 must be 1 in a job of several processes'):
    ablate.run(weightings.get_config('debug'), tmp_path)


def test_steps_to_a_loss():
  curve = {10: 4.0, 20: 2.0, 30: 3.0, 40: 1.0}
  assert grids.steps_to(curve, 3.0) == 15
  assert grids.steps_to(curve, 1.5) == 37.5
  assert grids.steps_to(curve, 4.5) == 10
  assert np.isnan(grids.steps_to(curve, 0.9))


def test_a_reference_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match=r"reference\.weighting='elbow' must be of"):
    ablate.expand(config_of(reference=dict(weighting='elbow'), **AXES))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(weigting=dict(name='elbo')), 'config.axes.a changes weigting, which config.base lacks'),
    (dict(train=dict(stepz=3)), 'config.axes.a changes train.stepz, which config.base lacks'),
  ],
)
def test_changes_of_what_is_not_there_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    ablate.expand(config_of(a=dict(b=change)))


def test_the_density_of_the_times_is_one():
  ends = {'log_snr': [4.0, 1.0, -1.0, -3.0], 'weight': [1.0] * 4, 'fd_pixels': {}}
  run = ends | dict(metric='bits_per_dim', bound={}, train_loss={1: 1.0}, train_cv={}, distances={})
  rows = [row for row in grids.curves_of({'a': [run]}) if row[0] == 'density']
  assert [(float(x), float(mean)) for _, _, x, mean, *_ in rows] == [
    (2.5, 0.11111),
    (0.0, 0.16667),
    (-2.0, 0.16667),
  ]


@pytest.fixture
def faked(monkeypatch):
  """(names of runs as they are trained, and as they are scored): one fails, another is stopped."""
  trained, measured = [], []

  def train(config, workdir):
    trained.append(workdir.name)
    if workdir.name == 'wide+0':
      raise FloatingPointError('step 3: loss is nan')
    if trained == ['elbo+0', 'elbo+1']:
      return 75  # preempted
    config_file.open_workdir(workdir, config)
    (workdir / 'cards').mkdir(parents=True, exist_ok=True)
    for step, loss in ((2, 5.0), (4, 3.0 + config.seed - (config.weighting.name == 'sigmoid'))):
      card = dict(step=step, value=2.0 + config.seed, training_loss=dict(value=loss))
      card |= dict(metric='bits_per_dim', bound='continuous-time ELBO', params='ema')
      card |= dict(num_images=16, whole_split=False, data=dict(split='test'), eval_seed=0)
      path = workdir / 'cards' / f'bits_per_dim_ema_continuous_step{step}.json'
      path.write_text(json.dumps(card))
      part = path.with_name(f'bits_per_dim_ema_continuous_16x1_step{step:08}.json')
      if step == 4:  # an evaluation of some of the images: another series
        part.write_text(json.dumps(card | dict(value=9.0)))
      card = dict(step=step, value=9.0 / step, metric='fd_classifier', params='ema', num_samples=9)
      card |= dict(sampler='ddim', network_evaluations=4)
      (workdir / 'cards' / f'fd_classifier_ema_step{step:08}.json').write_text(json.dumps(card))
    return 0

  def score(run, steps):
    config, workdir = run
    measured.append(workdir.name)
    result = dict(
      fd_pixels={count: 2 / count + config.seed * (count > 2) for count in steps},
      log_snr=[3.0, 0.0, -3.0],
      weight=[1.0, 1.0, 1.0],
    )
    (workdir / grids.SCORES).write_text(json.dumps(result))

  monkeypatch.setattr(ablate.loop, 'train', train)
  monkeypatch.setattr(ablate, 'read_run', lambda config, workdir: (config, workdir))
  monkeypatch.setattr(ablate, 'score', score)
  curve = {1: 3.0, 2: 2.0}
  scalars = {'train/loss': curve, 'train/diffusion_cv': curve}
  monkeypatch.setattr(grids.writers, 'read_scalars', lambda path: (scalars, []))
  ablate.flags.FLAGS.mark_as_parsed()
  return trained, measured


def test_a_grid_resumes_survives_a_failed_run_and_tabulates(tmp_path, faked):
  trained, _ = faked
  config = config_of(reference=dict(weighting='elbo'), **AXES)
  assert ablate.run(config, epath.Path(tmp_path)) == 75
  assert ablate.run(config, epath.Path(tmp_path)) == 1  # all are done but for the one that failed
  assert trained == ['elbo+0', 'elbo+1', 'elbo+1', 'wide+0', 'wide+1']
  rows = list(csv.DictReader((tmp_path / 'results.csv').read_text().splitlines()))
  assert [(r['weighting'], r['seed'], float(r['bits_per_dim'])) for r in rows] == [
    ('elbo', '0', 2.0),
    ('elbo', '1', 3.0),
    ('wide', '1', 3.0),
  ]
  # of wide+1: from 5 at step 2 to 3 at step 4, by way of elbo+1's last, 4
  assert [float(r['steps_to_reference']) for r in rows] == [4.0, 4.0, 3.0]
  table = (tmp_path / 'results.md').read_text()
  means = '2.5 ± 0.71 | 3.5 ± 0.71 | 2 ± 0 | 2.25 ± 0 | 4 ± 0 | 1 ± 0 | 1 ± 0.71'
  assert f'| elbo | 2 | {means} |' in table and '±' not in table.partition('| wide |')[2]
  assert table.endswith('\n\nWithout a result: 1 of 4 runs, wide+0.\n')
  plots = 'bits_per_dim fd_pixels fd_classifier loss diffusion_cv weight density'
  for name in plots.split():
    assert (tmp_path / f'{name}.png').stat().st_size > 1000
  other = ConfigDict(config.to_dict())
  other.base.train.num_steps = 7
  with pytest.raises(ValueError, match=r'elbo\+0.* has config.train.num_steps=.*, not 7; choose'):
    ablate.run(other.lock(), epath.Path(tmp_path))
  other = ConfigDict(config.to_dict())
  other.base.sample.num_steps += 1
  with pytest.raises(
    ValueError, match=r'elbo\+0.* has config.sample.num_steps=\d+, not \d+; choose'
  ):
    ablate.run(other.lock(), epath.Path(tmp_path))
  other = ConfigDict(config.to_dict())
  other.base.sample.batch_size *= 2  # makes no other figures
  assert ablate.run(other.lock(), epath.Path(tmp_path)) == 1  # that one failed again
  scores = tmp_path / 'elbo+1' / grids.SCORES
  scores.write_text(scores.read_text().replace('"2":', '"3":'))
  grids.write_results(epath.Path(tmp_path), ablate.expand(config), {})
  first, second, _ = csv.DictReader((tmp_path / 'results.csv').read_text().splitlines())
  two, three = (f'fd_pixels_{n}_evaluations' for n in (2, 3))
  assert (first[two], first[three]) == ('1.0', '') and (second[two], second[three]) == ('', '1.0')


@pytest.mark.parametrize(
  'labels', [{'x': ('a+b', 'a'), 'y': ('c', 'b+c')}, {'x': ('x/a',)}, {'x': ('a|b',)}]
)
def test_labels_name_each_run_and_nothing_else(labels):
  axes = {axis: {name: dict(seed=1) for name in names} for axis, names in labels.items()}
  with pytest.raises(ValueError, match=r'config.axes=.* must be of labels .*; change a label'):
    ablate.expand(config_of(**axes))


def test_other_numbers_of_steps_are_scored_anew(tmp_path, faked):
  _, measured = faked
  config = config_of(**AXES)
  assert ablate.run(config, epath.Path(tmp_path)) == 75
  assert ablate.run(config, epath.Path(tmp_path)) == 1
  measured.clear()
  other = ConfigDict(config.to_dict() | dict(evaluations=(2, 8))).lock()
  assert ablate.run(other, epath.Path(tmp_path)) == 1
  assert measured == ['elbo+0', 'elbo+1', 'wide+1']
  head = (tmp_path / 'results.csv').read_text().splitlines()[0]
  assert 'fd_pixels_8_evaluations' in head and 'fd_pixels_4_evaluations' not in head


def test_a_grid_of_which_nothing_is_done_says_so(tmp_path, faked, monkeypatch):
  monkeypatch.setattr(ablate, '_INDEX', SimpleNamespace(value=['2']))  # the run that fails
  (tmp_path / 'results.md').write_text('of runs that are no more')
  assert ablate.run(config_of(**AXES), epath.Path(tmp_path)) == 1
  left = 'Without a result: 4 of 4 runs, elbo+0, elbo+1, wide+0, wide+1.\n'
  assert (tmp_path / 'results.md').read_text() == left


def test_a_mean_over_seeds_is_of_equal_numbers_of_evaluations():
  run = dict(metric='bits_per_dim', bound={1: 1.0}, train_loss={1: 1.0}, train_cv={}, distances={})
  run |= dict(log_snr=[1.0, 0.0], weight=[1.0, 1.0])
  runs = [run | dict(fd_pixels={'4': 1.0, '8': 2.0}), run | dict(fd_pixels={'8': 5.0, '16': 9.0})]
  rows = [row for row in grids.curves_of({'a': runs}) if row[0] == 'fd_pixels']
  assert [(float(row[2]), float(row[3])) for row in rows] == [(4, 1), (8, 2)]


def test_the_error_of_the_draws_stands_beside_the_bound():
  run = dict(labels={}, metric='bits_per_dim', bound={2: 1.5}, loss={2: 1.0}, train_cv={2: 1.0})
  run |= dict(distances={}, fd_pixels={}, stderr=0.25)
  numbers = grids.numbers_of(run, [run], {})
  assert list(numbers)[:2] == ['bits_per_dim', 'bits_per_dim_stderr']
  assert numbers['bits_per_dim_stderr'] == 0.25
  assert 'bits_per_dim_stderr' not in grids.numbers_of(run | dict(stderr=None), [run], {})


def test_probabilities_and_densities_do_not_share_a_grid(tmp_path):
  axes = dict(
    data={
      'digits': dict(name='digits'),
      'fields': {k: v for k, v in gaussian_fields.get_config('debug').items() if k != 'name'},
    }
  )
  ablate.flags.FLAGS.mark_as_parsed()
  with pytest.raises(ValueError, match=r'bits_per_dim and nats_per_dim.* must be of one unit'):
    ablate.run(config_of(**axes), epath.Path(tmp_path))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_grid_of_continuous_data_is_in_nats_per_dim(tmp_path, monkeypatch):
  monkeypatch.setattr(ablate, '_WORKERS', SimpleNamespace(value=1))
  monkeypatch.setattr(ablate, '_INDEX', SimpleNamespace(value=None))
  grid = config_of(seed={'0': dict(seed=0)})
  with grid.unlocked():
    grid.base = gaussian_fields.get_config('debug')
  assert ablate.run(grid, epath.Path(tmp_path)) == 0
  table = csv.DictReader((tmp_path / 'results.csv').open())
  (row,) = table
  step = grid.base.train.num_steps
  (card,) = (tmp_path / '0/cards').glob(f'nats_per_dim_ema_*_step{step:08}.json')
  assert float(row['nats_per_dim']) == pytest.approx(json.loads(card.read_text())['value'], 1e-4)
  assert 'bits_per_dim' not in row and (tmp_path / 'nats_per_dim.png').exists()
