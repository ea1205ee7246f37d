"""Samples are scored in training and after it, and the cards say how."""

import json

import jax
import numpy as np
import pytest
from vdm.configs import default, digits

from vdm import build, cards, data
from vdm.evaluation import evaluate
from vdm.evaluation.distances import make_scorer
from vdm.evaluation.study import Study
from vdm.sampling.draw import make_sampler
from vdm.system import parallel, writers
from vdm.training import loop
from vdm.workdir.load import read_run


def config_of(**settings):
  config = digits.get_config('debug')
  config.fid.update(settings)
  return config


@pytest.mark.slow
def test_the_data_itself_is_at_distance_zero(tmp_path):
  """1,437 of them: the sampler gives whole batches, of which the last is cut."""
  config = config_of(batch_size=100, halves=0)
  model, mesh = build.model(config), parallel.make_mesh()
  images = data.load(config.data, 'train').fetch(np.arange(1437))['image'].astype(np.int32)
  of = Study(model, mesh, data.load(config.data, 'eval'), tmp_path, config.to_dict())
  scorer = make_scorer(of, config.fid, config.sample, config.data, 1437)
  batches = [images[:1000], np.concatenate([images[1000:], images[:63]])]
  found = scorer(7, iter(batches))
  assert abs(found['fd_classifier']['value']) < 1e-6 * found['score_classifier']['value']
  assert found['precision_classifier']['value'] == found['recall_classifier']['value'] == 1
  (path,) = tmp_path.glob('cards/fd_classifier_ema_*_1437_*_step00000007.json')
  card = json.loads(path.read_text())
  assert card['metric'] == 'fd_classifier' and card['num_samples'] == 1437
  assert card['reference']['num_images'] == 1437 and card['flips'] is False
  assert card['reference']['data']['split'] == 'train'
  worse = [np.roll(batch, 2, axis=2) for batch in batches]
  assert scorer(8, worse)['fd_classifier']['value'] > 10


@pytest.mark.slow
def test_training_and_eval_score_the_same_samples(tmp_path):
  config = config_of(train_every_steps=4, train_images=12, num_images=12)
  assert loop.train(config, tmp_path) == 0
  scalars = writers.read_scalars(tmp_path / 'tensorboard')[0]['eval/fd_classifier']
  assert list(scalars) == [4]
  (path,) = tmp_path.glob('cards/fd_classifier_ema_*_12_*_step00000004.json')
  in_training = json.loads(path.read_text())
  assert in_training['value'] == pytest.approx(scalars[4])
  assert in_training['network_evaluations'] == config.sample.num_steps
  (curve,) = (s for s in cards.series(tmp_path).values() if s[0]['metric'] == 'fd_classifier')
  assert [card['value'] for card in curve] == [in_training['value']]
  path.unlink()
  config.eval.fid = True
  assert evaluate.run(read_run(config, tmp_path)) == 0
  assert json.loads(path.read_text())['value'] == pytest.approx(in_training['value'], rel=1e-6)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(train_every_steps=3), r'fid.train_every_steps=3 must be a multiple of .*=2, or 0; try 2'),
    (dict(train_images=0), r'fid.train_images=0 must be positive'),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    build.check_config(config_of(**settings))


@pytest.mark.slow
def test_too_few_samples_are_refused_before_any_is_drawn(tmp_path):
  config = config_of(allow_few=False)
  model, mesh = build.model(config), parallel.make_mesh()
  of = Study(model, mesh, data.load(config.data, 'eval'), tmp_path, config.to_dict())
  with pytest.raises(ValueError, match=r'fid.num_images=8 must be 65 or more'):
    make_scorer(of, config.fid, config.sample, config.data, 8)


@pytest.mark.slow
def test_a_sampler_draws_as_many_as_it_is_asked_for():
  config = default.get_config('debug')
  model, mesh = build.model(config), parallel.make_mesh()
  run, params = make_sampler(config, model, mesh), model.init(jax.random.key(0))
  many = np.concatenate(list(run(params, 13)))
  assert len(many) == 13
  np.testing.assert_array_equal(np.concatenate(list(run(params))), many[:8])
  np.testing.assert_array_equal(np.concatenate(list(run(params, 13, starts=[8]))), many[8:])
