"""Number cards side by side: what may be compared, and what is refused with its reason."""

import copy
import json
import os

import pytest

from vdm import cards
from vdm.cards import __main__ as command

CARD = {
  'metric': 'bits_per_dim',
  'value': 2.65,
  'stderr': 0.004,
  'bound': 'continuous-time ELBO',
  'num_images': 10_000,
  'draws_per_image': 4,
  'data': {
    'name': 'imagenet_resized/32x32',
    'full_name': 'imagenet_resized/32x32/0.1.0',
    'split': 'validation',
    'num_bits': 0,
    'resize': False,
    'image_shape': [32, 32, 3],
    'num_values': 256,
    'sha256_first_64': '0123',
  },
  'params': 'ema',
  'step': 100,
  'dtype': 'float32',
  'config': {
    'model': {'class_conditional': True},
    'schedule': {'name': 'learned_net'},
    'eval': {
      'num_timesteps': 0,
      'schedule': {'name': 'schedule'},
      'ode': {'dequantization': 'uniform', 'importance_samples': 1},
    },
  },
  'environment': {'git_revision': '0123456789abcdef+changes', 'device': 'cpu'},
}
FID = {
  'metric': 'fid',
  'value': 3.0,
  'data': CARD['data'],
  'extractor': 'inception',
  'extractor_sha256': 'aa',
  'reference': {'num_images': 50_000, 'data': {'split': 'train'}},
  'num_samples': 50_000,
  'flips': False,
  'params': 'ema',
}


def changed(card, path, value):
  card = copy.deepcopy(card)
  *blocks, leaf = path.split('.')
  inner = card
  for block in blocks:
    inner = inner[block]
  inner[leaf] = value
  return card


@pytest.mark.parametrize(
  ('card', 'path', 'value', 'reason'),
  [
    (CARD, 'metric', 'nats', 'metric: bits_per_dim (1, 3); nats (2): another quantity'),
    (
      CARD,
      'data.full_name',
      'downsampled_imagenet/32x32/2.0.0',
      'data.full_name: imagenet_resized/32x32/0.1.0 (1, 3); downsampled_imagenet/32x32/2.0.0 (2): '
      'another data set or version, with other pixels',
    ),
    (CARD, 'conditions', 'none', 'conditions: class (1, 3); none (2): log p(x | y), or log p(x)'),
    (CARD, 'data.split', 'train', 'data.split: validation (1, 3); train (2): other images'),
    (CARD, 'num_images', 500, 'num_images: 10000 (1, 3); 500 (2): other images'),
    (CARD, 'data.num_values', 32, 'data.num_values: 256 (1, 3); 32 (2): another vocabulary'),
    (CARD, 'data.num_bits', 5, 'data.num_bits: 0 (1, 3); 5 (2): other bits'),
    (CARD, 'data.level', 2, 'data.level: 0 (1, 3); 2 (2): another scale'),
    (CARD, 'data.dequantize', 256, 'data.dequantize: 0 (1, 3); 256 (2): other integers'),
    (CARD, 'data.resize', True, 'data.resize: false (1, 3); true (2): pixels scaled'),
    (CARD, 'data.image_shape', [32], 'data.image_shape: [32, 32, 3] (1, 3); [32] (2): images of'),
    (CARD, 'data.sha256_first_64', 'ff', 'data.sha256_first_64: 0123 (1, 3); ff (2): other pixels'),
    (
      CARD,
      'config.eval.num_timesteps',
      1000,
      'estimate: ELBO, continuous (1, 3); ELBO, T = 1000 (2): bounds differ',
    ),
    (
      CARD,
      'bound',
      'probability-flow ODE, uniform dequantisation',
      'estimate: ELBO, continuous (1, 3); ODE, uniform dequantisation, K = 1 (2): bounds differ',
    ),
    (FID, 'extractor', 'dino', 'extractor: inception (1, 3); dino (2): features of another'),
    (FID, 'extractor_sha256', 'bb', 'extractor_sha256: aa (1, 3); bb (2): features of another'),
    (FID, 'num_samples', 2000, 'num_samples: 50000 (1, 3); 2000 (2): the fewer samples'),
    (FID, 'flips', True, 'flips: false (1, 3); true (2): real images flipped'),
    (FID, 'reference.data.split', 'test', 'reference: {"data": {"split": "train"}, "num_images"'),
    (FID, 'extractor', None, 'extractor: inception (1, 3); not said (2): features of another'),
  ],
)
def test_what_is_not_comparable_is_one_reason(card, path, value, reason):
  reasons, _ = cards.compare([card, changed(card, path, value), card])
  (line,) = reasons
  assert line.startswith(f'not comparable, {reason}'), line


@pytest.mark.parametrize(
  ('path', 'value', 'note'),
  [
    ('params', 'raw', 'params: ema (1); raw (2)'),
    ('step', 200, 'step: 100 (1); 200 (2)'),
    ('draws_per_image', 8, 'draws_per_image: 4 (1); 8 (2)'),
    ('config.eval.schedule.name', 'cosine', 'schedule: learned_net (1); cosine (2)'),
    ('environment.git_revision', 'abc', 'revision: 012345678+changes (1); abc (2)'),
  ],
)
def test_what_one_may_want_to_compare_is_a_note(path, value, note):
  assert cards.compare([CARD, changed(CARD, path, value)]) == ([], [f'note, {note}'])


def test_equal_cards_and_older_ones_are_comparable():
  older = copy.deepcopy(CARD)
  del older['data']['num_bits'], older['data']['resize'], older['config']['eval']['schedule']
  assert cards.compare([CARD, CARD, older]) == ([], [])


def test_likelihoods_are_compared_by_what_the_model_was_told():
  """A card of an evaluation does not say it: the model takes it, and the data has it."""
  by_class, alone = CARD, changed(CARD, 'config.model.class_conditional', False)
  vector = changed(changed(alone, 'data.vector_size', 3), 'data.sha256_conditions_first_64', 'aa')
  reason = 'not comparable, conditions: class (1); none (2): log p(x | y), or log p(x)'
  assert cards.compare([by_class, alone])[0] == [reason]
  assert 'conditions: none (1); vector of 3 (2)' in cards.compare([alone, vector])[0][0]
  others = changed(vector, 'data.sha256_conditions_first_64', 'bb')
  (line,) = cards.compare([vector, others])[0]
  assert line.endswith('aa (1); bb (2): other conditions, or another mask')
  # --mode=likelihood without conditions, beside an evaluation of a model that takes none
  for card in (by_class, vector, alone):
    assert cards.compare([changed(card, 'conditions', 'none'), alone]) == ([], [])
  masked = changed(changed(alone, 'data.masked', True), 'data.sha256_conditions_first_64', 'aa')
  (line,) = cards.compare([masked, changed(masked, 'data.sha256_conditions_first_64', 'bb')])[0]
  assert line.endswith('another mask')


def test_both_errors_of_an_exact_likelihood_are_named():
  ode = changed(CARD, 'bound', 'probability-flow ODE, uniform dequantisation')
  other = changed(ode, 'config.eval.ode.importance_samples', 8)
  (reason,), _ = cards.compare([ode, other])
  assert 'K = 1 (1); ODE, uniform dequantisation, K = 8 (2)' in reason
  _, notes = cards.compare([CARD, ode])
  assert 'note, stderr_over: draws (1); images (2)' in notes
  of_draws = changed(ode, 'stderr_over', 'draws')  # of --mode=likelihood
  assert cards.compare([ode, of_draws])[1] == ['note, stderr_over: images (1); draws (2)']


def write(folder, name, content):
  path = folder / name
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return str(path)


def test_the_command_prints_an_aligned_table_and_says_what_may_be_compared(tmp_path, capsys):
  one = write(tmp_path, 'one.json', CARD)
  two = write(tmp_path, 'two.json', changed(changed(CARD, 'value', 2.5), 'stderr', float('nan')))
  assert command.main([one, two]) == 0
  header, rule, first, second, *rest = capsys.readouterr().out.splitlines()
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in (header, first, second)]
  assert len({len(line) for line in (header, rule, first, second)}) == 1
  columns = dict(zip(cells[0], zip(*cells[1:], strict=True), strict=True))
  assert columns['value'] == ('2.6500 ± 0.0040', '2.5000') and columns['file'] == (one, two)
  assert columns['revision'][0] == '012345678+changes' and columns['schedule'][0] == 'learned_net'
  assert 'extractor' not in columns  # no card has one
  assert rest[-1] == 'The values are comparable.'
  three = write(tmp_path, 'three.json', changed(CARD, 'data.split', 'train'))
  assert command.main([one, three]) == 1
  out = capsys.readouterr().out
  assert 'not comparable, data.split' in out and 'are comparable' not in out


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'cannot be read (No such file or directory); give a number card.'),
    ('# vdm', 'cannot be read (Expecting value: line 1 column 1 (char 0)); give a number card.'),
    ('[1, 2]', 'cannot be read (it holds a list, no object); give a number card.'),
    ({'metric': 'fid'}, "is not a number card: it has no value; see a run's cards folder."),
    ({'metric': 'fid', 'value': 'low'}, 'is not a number card: it has no value'),
  ],
)
def test_a_file_that_is_no_card_is_refused_in_one_line(content, message, tmp_path, capsys):
  good = write(tmp_path, 'good.json', CARD)
  bad = str(tmp_path / 'bad.json') if content is None else write(tmp_path, 'bad.json', content)
  assert command.main([good, bad]) == 1
  captured = capsys.readouterr()
  assert captured.err.startswith(f'error: {bad} {message}') and captured.err.count('\n') == 1
  assert not captured.out


def test_help_helps(capsys):
  with pytest.raises(SystemExit) as stop:
    command.main(['--help'])
  assert stop.value.code == 0
  assert 'CARD.json' in capsys.readouterr().out


RESULT = CARD | {'whole_split': True, 'eval_seed': 0, 'num_images': 10_000}


def write_result(workdir, name, **changes):
  card = RESULT | changes
  path = cards.path_of(workdir, ['bits_per_dim'], {'name': name}, card['step'])
  cards.write(path, card)
  return path


def test_the_last_result_is_that_of_the_newest_step_and_the_whole_split(tmp_path, caplog):
  """Whatever was written last, and whatever time a copy gave the files."""
  assert cards.last_result(tmp_path) == ''
  write_result(tmp_path, 'own', step=100)
  newest = write_result(tmp_path, 'own', step=200, value=2.66)
  write_result(tmp_path, 'part', step=200, value=9.0, num_images=64, whole_split=False)
  write_result(tmp_path, 'raw', step=200, value=9.0, params='raw')
  # of an older step, though of more images and draws
  write_result(tmp_path, 'old', step=150, value=9.0, num_images=20_000, draws_per_image=64)
  write_result(tmp_path, 'ode', step=200, value=9.0, bound='probability-flow ODE, uniform')
  for i, path in enumerate(sorted((tmp_path / 'cards').iterdir(), key=lambda p: p == newest)):
    os.utime(path, (10**9 - 1000 * i,) * 2)  # the newest step is the oldest file
  (tmp_path / 'cards' / 'bits_per_dim_cut_step00000300.json').write_text('{"metric": "bits')
  with caplog.at_level('WARNING'):
    text = cards.last_result(tmp_path)
  assert text == (
    'ema parameters, continuous-time ELBO, all 10,000 images of validation, 4 draws, seed 0: '
    '2.660 +- 0.004 bits/dim at step 200, the best is 2.650 +- 0.004 at 100 of 2 '
    f'({newest}).'
  )
  assert 'bits_per_dim_cut_step00000300.json cannot be read' in caplog.text
  alone = tmp_path / 'alone'
  write_result(alone, 'one', stderr=None, draws_per_image=1)
  assert ', 1 draw, seed 0: 2.6500 bits/dim at step 100, the best of 1 (' in cards.last_result(
    alone
  )


@pytest.mark.parametrize(
  ('stderr', 'text'),
  [
    (0.0083, '2.717 +- 0.008'),
    (0.0123, '2.717 +- 0.012'),
    (0.02999, '2.717 +- 0.030'),
    (0.03, '2.72 +- 0.03'),
    (12.0, '3 +- 12'),
    (None, '2.7172'),
    (0.0, '2.7172'),
  ],
)
def test_a_value_has_the_digits_that_its_error_lets_one_say(stderr, text):
  assert cards.plus_minus(2.71723, stderr) == text


def test_a_card_without_an_error_is_strict_json_and_its_row_has_none(tmp_path, capsys):
  fields = cards.error_fields(2.5, None, 0)
  assert fields == {'stderr': None, 'stderr_dof': 0, 'interval_95': None}
  path = write_result(tmp_path, 'one', **fields)
  strict = lambda name: pytest.fail(f'{name} is no JSON')
  assert json.loads(path.read_text(), parse_constant=strict)['stderr'] is None
  command.main([str(path)])
  assert '| 2.6500 |' in capsys.readouterr().out
  with pytest.raises(ValueError, match=r'^terms\.recon\.1=nan must be a finite number'):
    write_result(tmp_path, 'two', terms={'recon': [1.0, float('nan')]})


def test_an_interval_is_students(tmp_path):
  low, high = cards.error_fields(1.0, 0.1, 1)['interval_95']
  assert (low, high) == pytest.approx((1 - 1.27062, 1 + 1.27062), abs=1e-4)  # tables: 12.7062
  low, high = cards.error_fields(1.0, 0.1, 1e6)['interval_95']
  assert (low, high) == pytest.approx((1 - 0.19600, 1 + 0.19600), abs=1e-4)
