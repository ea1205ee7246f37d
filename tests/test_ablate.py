import csv
import json

import numpy as np
import pytest
import scipy.linalg
from ml_collections import ConfigDict
from vdm.configs import digits
from vdm.configs.ablations import weightings

from vdm import ablate, build


def config_of(**axes):
  base = digits.get_config('debug')
  return ConfigDict(dict(base=base, axes=axes, evaluations=(2, 4))).lock()


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
  assert [ablate.folder(labels) for labels, _ in runs] == ['elbo+0', 'elbo+1', 'wide+0', 'wide+1']
  labels, config = runs[3]
  assert labels == dict(weighting='wide', seed='1')
  assert config.weighting.to_dict() == dict(name='sigmoid', bias=3.0)
  assert config.seed == 1 and config.name == 'wide+1' and config.is_locked
  assert runs[0][1].schedule.name == 'learned_endpoints'  # the base's


def test_the_shipped_grid_builds():
  runs = ablate.expand(weightings.get_config())
  assert len(runs) == 36
  for _, config in runs[::3]:
    build.model(config)


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


def test_frechet_distance_is_that_of_two_gaussians():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
  b = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
  cov_a, cov_b = np.cov(a.T), np.cov(b.T)
  root = scipy.linalg.sqrtm(cov_a @ cov_b).real
  want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
  np.testing.assert_allclose(ablate.frechet_distance(a, b), want, rtol=1e-6)
  assert abs(ablate.frechet_distance(a, a)) < 1e-6


def test_a_grid_resumes_survives_a_failed_run_and_tabulates(tmp_path, monkeypatch):
  trained = []

  def train(config, workdir):
    trained.append(workdir.name)
    if workdir.name == 'wide+0':
      raise FloatingPointError('step 3: loss is nan')
    if trained == ['elbo+0', 'elbo+1']:
      return 75  # preempted
    (workdir / 'cards').mkdir(parents=True)
    card = dict(step=4, value=2.0 + config.seed)
    (workdir / 'cards' / 'bits_per_dim_ema_continuous_step4.json').write_text(json.dumps(card))
    return 0

  def score(config, workdir, steps):
    result = dict(
      fd_pixels={2: 1.0, 4: 0.5 + config.seed}, log_snr=[3.0, 0.0, -3.0], weight=[1.0, 1.0, 1.0]
    )
    (workdir / ablate.SCORES).write_text(json.dumps(result))

  monkeypatch.setattr(ablate.train, 'train', train)
  monkeypatch.setattr(ablate, 'score', score)
  monkeypatch.setattr(ablate.report, 'read_scalars', lambda path, tag: {1: 3.0, 2: 2.0})
  ablate.flags.FLAGS.mark_as_parsed()
  config = config_of(**AXES)
  assert ablate.run(config, tmp_path) == 75
  assert ablate.run(config, tmp_path) == 0
  assert trained == ['elbo+0', 'elbo+1', 'elbo+1', 'wide+0', 'wide+1']
  rows = list(csv.DictReader((tmp_path / 'results.csv').read_text().splitlines()))
  assert [(r['weighting'], r['seed'], float(r['bits_per_dim'])) for r in rows] == [
    ('elbo', '0', 2.0),
    ('elbo', '1', 3.0),
    ('wide', '1', 3.0),
  ]
  table = (tmp_path / 'results.md').read_text()
  assert '| elbo | 2 | 2.500 ± 0.500 | 1.000 ± 0.000 | 1.000 ± 0.500 |' in table
  for name in ('bits_per_dim', 'fd_pixels', 'loss', 'weight', 'density'):
    assert (tmp_path / f'{name}.png').stat().st_size > 1000
