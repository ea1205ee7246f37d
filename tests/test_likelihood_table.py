"""--mode=likelihood: each example as `log_prob` has it, resumable, and two sets told apart."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from vdm.configs import digits_full

import vdm
from vdm.evaluation import likelihood_table, separation
from vdm.workdir.load import read_run

SMALL = {
  'eval.batch_size': 16,
  'eval.max_images': 24,
  'likelihood.draws': 4,
  'likelihood.maps': 3,
  'likelihood.intervals': 2,
}


@pytest.mark.parametrize('levels', [3, 1000])
def test_auroc_is_that_of_scikit_learn(levels):
  rng = np.random.default_rng(0)
  own, other = rng.integers(0, levels, 300), rng.integers(0, levels, 200) + levels // 3
  value, error = separation.auroc(own, other)
  truth = np.repeat([0, 1], [300, 200])
  assert value == pytest.approx(roc_auc_score(truth, np.concatenate([own, other])))
  again = [separation.auroc(rng.choice(own, 300), rng.choice(other, 200))[0] for _ in range(400)]
  assert error == pytest.approx(np.std(again), rel=0.15)


def run(out, settings=(), **more):
  config = digits_full.get_config()
  from_pretrained = read_run(config, 'pretrained/digits', overrides=SMALL | dict(settings) | more)
  assert likelihood_table.run(from_pretrained, out) == 0
  return out / 'likelihood'


@pytest.fixture(scope='module')
def scored(tmp_path_factory):
  return run(tmp_path_factory.mktemp('scored'))


def test_a_schedule_that_is_not_followed_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"config.eval.schedule.name='cosine' must be 'schedule'"):
    run(tmp_path, {'eval.schedule.name': 'cosine'})


def test_each_likelihood_has_its_own_parameters(tmp_path, monkeypatch):
  seen = {}

  def scorer(of, settings, how, kind):
    return lambda params, made_of: (seen.update({kind: (params, made_of)}), None)

  monkeypatch.setattr(likelihood_table, 'make_scorer', scorer)
  monkeypatch.setattr(likelihood_table, 'named_params', lambda state, name: {name: jnp.zeros(3)})
  changes = {'eval.likelihood': 'elbo,ode', 'eval.params': 'raw,ema', 'eval.ode.params': 'raw'}
  run(tmp_path, changes | {'likelihood.maps': 0})
  assert {kind: (*params, made_of['params']) for kind, (params, made_of) in seen.items()} == {
    'elbo': ('ema', 'ema'),
    'ode': ('raw', 'raw'),
  }


def columns(folder):
  rows = list(csv.DictReader((folder / 'table.csv').open()))
  return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def test_the_table_has_what_log_prob_has_of_each_example(scored):
  (folder,) = scored.glob('digits_test_ema_elbo_24x4_*')
  found = columns(folder)
  exp, state = vdm.load('pretrained/digits', overrides={'eval.batch_size': 16})
  batch = exp.source('eval').fetch(np.arange(24))
  own = exp.log_prob(state, batch['image'], draws=4)
  np.testing.assert_allclose(found['log_prob'], own.value, rtol=1e-5)
  np.testing.assert_allclose(found['log_prob_stderr'], own.stderr, rtol=1e-4)
  np.testing.assert_array_equal(found['label'], batch['label'])
  np.testing.assert_allclose(found['bits_per_dim'], -own.value / (64 * np.log(2)), rtol=1e-5)
  terms = found['recon'] + found['prior'] + found['diffusion']
  np.testing.assert_allclose(terms, found['bits_per_dim'], rtol=1e-4)
  card = json.loads((folder / 'card.json').read_text())
  assert card['value'] == pytest.approx(found['bits_per_dim'].mean(), rel=1e-5)
  assert card['metric'] == 'bits_per_dim' and card['num_images'] == 24
  maps = np.load(folder / 'maps_3x2.npz')
  total = maps['maps'].sum(axis=(1, 2, 3, 4)) / 64
  np.testing.assert_allclose(total, found['diffusion'][:3], rtol=1e-4)
  assert (folder / 'maps_3x2.png').stat().st_size > 3000


def test_what_is_scored_is_kept_and_what_is_missing_is_made_up(scored, caplog):
  (folder,) = scored.glob('digits_test_ema_elbo_24x4_*')
  before = (folder / 'table.csv').read_bytes()
  (folder / 'parts' / '00000016.npz').unlink()
  first = (folder / 'parts' / '00000000.npz').stat().st_mtime_ns
  run(scored.parent, {'likelihood.maps': 0})
  assert (folder / 'table.csv').read_bytes() == before
  assert (folder / 'parts' / '00000000.npz').stat().st_mtime_ns == first
  (folder / 'parts' / '00000000.npz').write_bytes(b'damaged')
  with pytest.raises(ValueError, match=r'00000000\.npz.* remove it to have it scored again'):
    run(scored.parent, {'likelihood.maps': 0})


def test_another_set_is_scored_beside_it(tmp_path):
  images = vdm.Experiment('digits').source('eval').fetch(np.arange(24))['image']
  np.savez(tmp_path / 'other.npz', x=images[:, np.random.default_rng(0).permutation(8)])
  against = {
    'likelihood.against.name': 'arrays',
    'likelihood.against.path': str(tmp_path / 'other.npz'),
    'likelihood.against.split': '[:]',
  }
  folder = run(tmp_path, against, **{'likelihood.maps': 0})
  (place,) = folder.glob('arrays_all_ema_elbo_24x4_*')
  found = json.loads((place / 'against.json').read_text())
  assert found['sets'] == ['digits', 'other.npz']
  (own,) = folder.glob('digits_test_*')
  pair = [columns(of)['bits_per_dim'] for of in (own, place)]
  assert found['-log p']['auroc'] == pytest.approx(separation.auroc(*pair)[0], abs=1e-3)
  assert 0.8 < found['-log p']['auroc'] and 0.5 < found['-log p less the length of a PNG']['auroc']
  assert (place / 'histograms.png').stat().st_size > 3000
  np.savez(tmp_path / 'other.npz', x=images[:, :7])
  message = (
    r"likelihood\.against\.name='arrays' must be a set of images \(8, 8, 1\), not \(7, 8, 1\)"
  )
  with pytest.raises(ValueError, match=message):
    run(tmp_path, against)


def test_conditions_of_another_set_are_refused():
  config = digits_full.get_config().copy_and_resolve_references().unlock()
  config.likelihood.against.name = 'arrays'
  with pytest.raises(ValueError, match=r"likelihood\.conditions='given' must be 'none' beside"):
    likelihood_table.other_set(config.data, config.likelihood.against, told=True)
  message = r"likelihood\.conditions='none' must be 'given' with config\.train\.label_dropout"
  with pytest.raises(ValueError, match=message):
    vdm.Experiment('digits', {'model.class_conditional': True, 'likelihood.conditions': 'none'})


def test_any_number_of_channels(tmp_path):
  images = np.random.default_rng(0).integers(0, 5, (60, 8, 8, 2), dtype=np.uint8)
  np.savez(tmp_path / 'two.npz', x=images)
  settings = {'data.path': str(tmp_path / 'two.npz'), 'decoder.name': 'discrete'}
  settings['eval.ode.dequantization'] = 'uniform'
  exp = vdm.Experiment('my_arrays:debug', settings)
  exp.save(exp.init(), tmp_path / 'run')
  settings = {f'likelihood.against.{k}': v for k, v in {'name': 'arrays', 'split': '[:20]'}.items()}
  settings |= {'likelihood.against.path': str(tmp_path / 'two.npz'), 'likelihood.draws': 2}
  with_settings = read_run(exp.config, tmp_path / 'run', overrides=settings)
  assert likelihood_table.run(with_settings, tmp_path) == 0
  (place,) = (tmp_path / 'likelihood').glob('arrays_20_*')
  assert list(json.loads((place / 'against.json').read_text())) == ['sets', '-log p']
  assert np.load(next(place.glob('maps_*.npz')))['maps'].shape[2:] == (8, 8, 2)
