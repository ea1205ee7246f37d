import logging
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

import vdm
from vdm import cards, style
from vdm.diffusion.noisy_elbo import Augmented
from vdm.evaluation import plots
from vdm.system import logs
from vdm.system.progress import duration
from vdm.training import meter as meter_lib
from vdm.training.meter import Meter
from vdm.training.step import StepMetrics


class Writer:
  """Keeps what a clu writer would write."""

  def __init__(self):
    self.scalars = {}

  def write_scalars(self, step, scalars):
    self.scalars[step] = scalars


def moments(value):
  return np.array([value, 2 * value**2, 5 * value**2])


def metrics(value, **changes):
  names = ('recon_bpd', 'prior_bpd', 'diffusion_bpd', 'loss', 'grad_norm', 'bits_per_dim')
  bins = {'spent': np.array([value, 0.0]), 'width': np.array([1.0, 0.0])}
  return StepMetrics(dict.fromkeys(names, value) | changes, moments(value), bins)


def test_meter_writes_means_over_its_interval():
  writer = Writer()
  meter = Meter(writer, every=2, batch_size=8, start=0, total=4)
  for step in range(1, 5):
    meter.push(step, metrics(float(step)), fetch=lambda m: m)
  with meter.pause():
    pass
  meter.close()
  assert sorted(writer.scalars) == [2, 4]
  assert writer.scalars[2]['train/loss'] == 1.5 and writer.scalars[4]['train/loss'] == 3.5
  assert writer.scalars[4]['train/images_per_second'] > 0
  means = np.mean([moments(3.0), moments(4.0)], axis=0)
  cv = (writer.scalars[4]['train/diffusion_cv'], writer.scalars[4]['train/diffusion_cv_linear'])
  np.testing.assert_allclose(cv, (means[1:] / means[0] ** 2 - 1) ** 0.5)
  bins = meter.take_bins()
  assert bins[0] == 2.5 and np.isnan(bins[1])


def test_the_first_step_which_compiles_has_no_speed():
  writer = Writer()
  meter = Meter(writer, every=1, batch_size=8, start=4, total=6)
  for step in (5, 6):
    meter.push(step, metrics(1.0), fetch=lambda m: m)
  meter.drain()
  meter.close()
  assert 'train/images_per_second' not in writer.scalars[5]
  assert 0 < writer.scalars[6]['train/images_per_second'] < 1e7


def test_compiling_is_said_before_and_timed_after(monkeypatch, caplog):
  now = [5.0]
  monkeypatch.setattr(meter_lib, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))
  meter = Meter(Writer(), every=2, batch_size=8, start=6, total=8)
  with caplog.at_level('INFO'):
    now[0] += 50  # an evaluation that was owed
    next(meter.waits_for(iter([0])))
    assert [record.getMessage() for record in caplog.records] == ['compiling the train step']
    now[0] += 21.6
    for step in (7, 8):
      meter.push(step, metrics(2.0), fetch=lambda m: m)
      now[0] += 0.5
    meter.drain()
  meter.close()
  *_, compiled, step = [record.getMessage() for record in caplog.records]
  assert compiled == 'compiled: step 7 is done after 22 s'
  assert step == 'step 8: 2.000 bits/dim in training, 16 images/s, 0:00 left'


def test_what_the_first_evaluation_took_to_compile_is_not_expected_again(monkeypatch, caplog):
  """A step takes a second, an evaluation 4 and the first 24; they are after steps 3, 5 and 7."""
  now = [0.0]
  monkeypatch.setattr(meter_lib, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))
  meter = Meter(Writer(), every=1, batch_size=8, start=0, total=9)
  with caplog.at_level('INFO'):
    for step in range(1, 8):
      meter.push(step, metrics(2.0), fetch=lambda m: m)
      now[0] += 1.0
      if step in (3, 5, 7):
        with meter.pause():
          now[0] += 24.0 if step == 3 else 4.0
  meter.close()
  left = [r.getMessage().split(', ')[-1] for r in caplog.records if 'images/s' in r.getMessage()]
  # at step 6: steps 2 to 6 took 5 s, and the two evaluations between them count as 4 s each
  assert left[4] == f'{duration((5 + 4 + 4) / 5 * 3)} left'


def test_a_save_before_any_step_has_counted():
  meter = Meter(Writer(), every=2, batch_size=8, start=0, total=4, most_skipped=9)
  meter.push(1, metrics(np.nan), fetch=lambda m: m)
  with meter.pause():
    pass
  meter.push(2, metrics(1.0), fetch=lambda m: m)
  meter.drain()
  meter.close()


@pytest.mark.parametrize('seconds', [0.0, 3.0])
def test_data_wait_is_the_share_of_time_that_a_slow_source_takes(seconds, monkeypatch):
  """Steps take one second each by the test's own clock; the first and a pause do not count."""
  now = [0.0]
  monkeypatch.setattr(meter_lib, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))

  def takes(duration, value=None):
    now[0] += duration
    return value

  writer = Writer()
  meter = Meter(writer, every=2, batch_size=8, start=0, total=6)
  batches = meter.waits_for(takes(100 if step == 1 else seconds, step) for step in range(1, 7))
  for step in range(1, 7):
    assert next(batches) == step
    meter.push(step, metrics(1.0), fetch=lambda m: takes(1.0, m))
    if step == 3:
      with meter.pause():
        takes(50)
  meter.drain()
  meter.close()
  # In the last two seconds nothing but the batch of step 6 was waited for.
  for step, steps, waits in ((2, 1, 1), (4, 2, 2), (6, 2, 1)):
    scalars, waited = writer.scalars[step], waits * seconds
    assert scalars['train/data_wait'] == pytest.approx(waited / (waited + steps))
    assert scalars['train/images_per_second'] == pytest.approx(8 * steps / (waited + steps))


def test_meter_reads_a_step_only_after_the_next_one_was_dispatched():
  fetched = []
  meter = Meter(Writer(), every=100, batch_size=8, start=0, total=4)
  for step in (1, 2, 3):
    meter.push(step, metrics(float(step)), fetch=lambda m: fetched.append(m.scalars['loss']) or m)
    assert fetched == [float(s) for s in range(1, step)]
  meter.close()


@pytest.mark.parametrize('name', ['recon_bpd', 'diffusion_bpd', 'grad_norm'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_meter_stops_at_the_first_value_that_is_not_finite(name, value):
  meter = Meter(Writer(), every=100, batch_size=8, start=0, total=4)
  meter.push(7, metrics(1.0, **{name: value}), fetch=lambda m: m)
  with pytest.raises(FloatingPointError, match=f'step 7: {name} is {value}'):
    meter.drain()
  meter.close()


def test_only_warnings_of_other_packages_are_shown():
  def record(level, path):
    return logging.LogRecord('absl', level, path, 1, 'text', (), None)

  ours, checkout = plots.__file__, pathlib.Path(vdm.__file__).parents[1]
  # that may be called vdm too, and have an environment with every package in it
  for above in ('/lib', '/home/me/vdm/.venv/lib', checkout / '.venv'):
    orbax = f'{above}/site-packages/orbax/checkpoint/x.py'
    assert not logs._ours_or_serious(record(logging.INFO, orbax))
    assert logs._ours_or_serious(record(logging.WARNING, orbax))
  assert logs._ours_or_serious(record(logging.INFO, ours))


def test_plots_are_pictures(tmp_path):
  bins = {'ema': (np.array([0.1, np.nan, 0.4]), (8.0, -5.0))}
  picture = plots.plot_bins(bins, tmp_path / 'plots' / 'bins.png', 'bits/dim')
  assert picture.dtype == np.uint8 and picture.std() > 5
  with Image.open(tmp_path / 'plots' / 'bins.png') as image:
    assert image.size == picture.shape[1::-1]


CARD = {
  'metric': 'bits_per_dim',
  'bound': 'continuous-time ELBO',
  'value': 2.0,
  'stderr': 0.1,
  'params': 'ema',
  'step': 4,
  'num_images': 360,
  'whole_split': True,
  'draws_per_image': 4,
  'eval_seed': 0,
  'data': {'split': 'test'},
  'diffusion_cv': 1.0,
  'diffusion_cv_linear': 2.0,
}


def curves(monkeypatch, draw):
  """Label -> (x, y) of the curves with points that `draw` puts into its figure, and its title."""
  found, titles = {}, []

  def keep(figure, path):
    for axes in figure.axes:
      titles.append(axes.get_title('left').replace('\n', ' '))
      for bars in axes.containers:
        found[bars.get_label()] = tuple(map(list, bars[0].get_data()))

  monkeypatch.setattr(style, 'save', keep)
  draw()
  return found, titles


def test_the_history_mixes_no_two_numbers_and_says_what_they_are(tmp_path, monkeypatch):
  """Another count, draws, seed, bound or split is another curve, whatever is written later."""
  changes = {
    'part': dict(num_images=64, whole_split=False, value=9.0),
    'one': dict(draws_per_image=1, stderr=None),
    'seed': dict(eval_seed=1),
    'T': dict(bound='discrete-time ELBO, T = 10'),
    'split': dict(data={'split': 'train'}),
    'raw': dict(params='raw'),
    'ode': dict(bound='probability-flow ODE, uniform dequantisation'),
  }
  for step in (4, 2):
    for name, change in ({'own': {}} | changes).items():
      path = cards.path_of(tmp_path, ['bits_per_dim'], {'name': name}, step)
      cards.write(path, CARD | {'step': step, 'value': 2.0 + step / 10} | change)
  found, (title,) = curves(
    monkeypatch, lambda: plots.plot_history(cards.series(tmp_path), tmp_path / 'x.png')
  )
  assert len(found) == 1 + len(changes) and title == ''
  whole = found['ema parameters, continuous-time ELBO, all 360 images of test, 4 draws, seed 0']
  assert whole == ([2, 4], [2.2, 2.4])
  part = found['ema parameters, continuous-time ELBO, first 64 images of test, 4 draws, seed 0']
  assert part == ([2, 4], [9.0, 9.0])
  plots.plot_history(cards.series(tmp_path), tmp_path / 'x.png')  # has room for all the names


def test_two_series_that_read_alike_end_in_their_hashes_and_the_rest_is_said_once(monkeypatch):
  found = {f'a_{name}': [CARD] for name in ('11', '22')} | {'b_33': [CARD | {'params': 'raw'}]}
  found, (title,) = curves(monkeypatch, lambda: plots.plot_history(found, None))
  assert title == 'continuous-time ELBO, all 360 images of test, 4 draws, seed 0'
  assert set(found) == {'ema parameters 11', 'ema parameters 22', 'raw parameters'}


def test_a_single_series_beside_several_of_long_names_has_no_legend(monkeypatch):
  seen = []
  monkeypatch.setattr(style, 'save', lambda figure, path: seen.append(figure))
  part = CARD | {'num_images': 64, 'whole_split': False, 'draws_per_image': 8}
  drawn = {'sampler': 'dpmpp_2m', 'network_evaluations': 25, 'num_samples': 500}
  distance = CARD | {'metric': 'fd_classifier'} | drawn
  plots.plot_history({'a_11': [CARD], 'a_22': [part], 'd_33': [distance]}, None)
  bounds, distances = seen[0].axes
  assert len(bounds.get_legend().get_texts()) == 2 and distances.get_legend() is None


def test_importing_the_package_leaves_the_backend_of_a_notebook_alone():
  code = (
    "import matplotlib; matplotlib.use('svg')\n"
    'import vdm.ablate, vdm.training.loop\n'
    'import sys\n'
    "print(matplotlib.get_backend(), 'matplotlib.pyplot' in sys.modules)"
  )
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout.split() == ['svg', 'False']


def test_the_progressive_picture_says_what_its_rows_and_columns_are(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(style, 'save', lambda figure, path: seen.append(figure))
  blocks = {f'image {n}': np.zeros((2 * 10, 2 * 10, 1), np.uint8) for n in (1, 2, 3)}
  plots.plot_progressive(blocks, np.array([7.25, -5.0]), tmp_path / 'p.png')
  _, *words = [text.get_text() for text in seen[0].texts]
  assert words == ['7.2', '−5.0'] + [w for n in blocks for w in (n, '$z$', r'$\hat{x}$')]


def test_a_bound_has_no_panel_of_weights_and_a_mixture_has(monkeypatch):
  """The loss of the bound itself is no mixture: its weights are rounding, and no picture."""
  seen = []
  monkeypatch.setattr(style, 'save', lambda figure, path: seen.append(figure))
  edges = np.linspace(-5, 8, 4)
  for mass in (np.full(3, 1e-17), np.full(3, 0.2)):
    whole = dict(atom=1 - mass.sum(), total=np.float32(1), weighted=np.float32(2))
    table = Augmented(losses=np.arange(4.0), mass=mass, parts=mass, **whole)
    plots.plot_augmented(edges, table, 'name', None, 'bits/dim')
  assert [len(figure.axes) for figure in seen] == [1, 2]
  assert 'all of the weight is on the data' in seen[0].axes[0].get_title('left')
  assert 'data as they are: 0.4' in seen[1].axes[0].get_title('left')


def test_the_schedule_has_no_empty_panel_and_shows_constant_densities_whole(monkeypatch):
  seen, log_snr = [], np.linspace(8, -5, 11)
  monkeypatch.setattr(style, 'save', lambda figure, path: seen.append(figure))
  plots.plot_schedule({}, log_snr, None)
  plots.plot_schedule({'a': [CARD]}, log_snr, None)
  unknown = CARD | {'diffusion_cv_linear': None}  # a negative square, by importance of few draws
  plots.plot_schedule({'a': [unknown, CARD | {'step': 5}]}, log_snr, None)
  plots.plot_schedule({'a': [unknown]}, log_snr, None)
  assert [len(figure.axes) for figure in seen] == [2, 3, 3, 2]
  assert seen[0].axes[1].get_ylim()[1] > 1.05 / 13


def test_errors_and_stars_of_a_history_are_explained(monkeypatch):
  seen = []
  monkeypatch.setattr(style, 'save', lambda figure, path: seen.append(figure))
  plots.plot_history({'a_1': [CARD]}, None)
  assert seen[0].get_supxlabel() == 'bars: one standard error either way; star: the best'
