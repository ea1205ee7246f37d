import json
import subprocess

import numpy as np
import pytest
from vdm.configs.ablations import recipe

from benchmarks import front
from vdm.ablate import expand
from vdm.evaluation import grids
from vdm.evaluation.curve_plots import plot_curves


def run(name, seed, curve):
  return {'labels': {'recipe': name, 'seed': str(seed)}, 'metric': 'bits_per_dim', 'bound': curve}


@pytest.fixture
def found():
  """A reference that falls by 1 in 100 steps, two seeds of one twice as fast, and a slow one."""
  falling = lambda speed, offset=0.0: {
    step: 5 + offset - speed * step / 100 for step in (100, 200, 300, 400)
  }
  return [
    run('public_1e-3', 0, falling(1)),
    run('public_2e-4', 0, falling(0.1)),
    run('muon_8e-3', 0, falling(2, 0.1)),
    run('muon_8e-3', 1, falling(2, -0.1)),
  ]


def test_chosen_runs_are_those_of_the_recipes_and_the_first_seeds():
  runs = expand(recipe.get_config())
  chosen = [runs[i][0] for i in front.indices(runs, ['muon_path', 'public_2e-4'], 2)]
  assert {labels['recipe'] for labels in chosen} == {'muon_path', 'public_2e-4'}
  assert [labels['seed'] for labels in chosen] == ['0', '1'] * 2
  with pytest.raises(ValueError, match=r"--recipes='sgd' must be one of adaptive, "):
    front.indices(runs, ['sgd'], 1)
  with pytest.raises(ValueError, match=r'--seeds=0 must be 1 or more'):
    front.indices(runs, [], 0)


def test_shares_of_the_steps_of_the_best_public_recipe(found):
  head, _, *rows = front.table(found, '')
  cells = {row.split('|')[1].strip(): [c.strip() for c in row.split('|')[2:-1]] for row in rows}
  assert list(cells) == ['muon_8e-3', '**public_1e-3**', 'public_2e-4']  # by the value at the end
  assert head.split('|')[4].strip() == '4.00 (100)'
  # at 100 steps it is at 3 already, below the level of 4: its first evaluation is all that is known
  assert cells['muon_8e-3'] == ['2', '-3.000 ± 0.141', '1.00', '0.50', '0.50', '0.50']
  assert cells['**public_1e-3**'] == ['1', '1.000', '1.00', '1.00', '1.00', '1.00']
  assert cells['public_2e-4'] == ['1', '4.600', 'never', 'never', 'never', 'never']


def test_another_reference(found):
  _, _, *rows = front.table(found, 'public_2e-4')
  assert rows[2].startswith('| **public_2e-4** |') and rows[2].count('1.00') == 4


def test_seeds_are_compared_at_steps_that_all_of_them_have(found):
  found[3]['bound'].pop(200)
  steps, mean, least, greatest = front.curves_of(found)['muon_8e-3']
  np.testing.assert_array_equal(steps, [100, 300, 400])
  np.testing.assert_allclose(mean, [3, -1, -3])
  np.testing.assert_allclose(greatest - least, 0.2)


def test_the_reference_is_the_best_of_adam_with_learned_end_points():
  curves = dict.fromkeys(['muon_8e-3', 'adaptive', 'cosine_4e-3', 'public_4e-3'])
  assert front.reference_of(curves, '') == 'cosine_4e-3'
  assert front.reference_of(curves, 'adaptive') == 'adaptive'
  assert front.reference_of(curves, 'public_2e-3') == 'cosine_4e-3'  # another data set's
  assert front.reference_of(dict.fromkeys(['muon_8e-3']), '') == ''


@pytest.fixture
def ran(tmp_path, monkeypatch):
  """(runs, data set, as_found, steps) -> as if `vdm.ablate` had left these and no others."""

  def write(runs, name, as_found=False, num_steps=50):
    at = lambda workdir, _: runs if workdir.name == name else []
    monkeypatch.setattr(grids, 'collect', at)
    config = {'data': {'as_found': as_found, 'train_images': 20_000, 'eval_images': 2000}}
    config |= {'eval': {'draws': 3, 'max_images': 0}}
    config['train'] = {'num_steps': num_steps, 'batch_size': 64}  # whatever the grid has
    for one in runs:
      path = tmp_path / name / grids.folder(one['labels'])
      path.mkdir(parents=True, exist_ok=True)
      (path / 'config.json').write_text(json.dumps(config))

  return write


def test_a_set_under_another_name_is_said(ran, found, tmp_path):
  ran(found, 'cifar10', as_found=True)
  assert front.main([f'--runs={tmp_path}', f'--page={tmp_path / "page.md"}']) == 0
  page = (tmp_path / 'page.md').read_text()
  assert '## Another set under the name cifar10\n' in page and '## CIFAR-10' not in page
  assert 'Not CIFAR-10: 20,000 pictures for training and 2,000 for testing.' in page
  assert '--seeds=2 --config.base.data.as_found=True \\\n' in page


def test_the_page_has_what_was_run_and_nothing_else(ran, found, tmp_path):
  ran(found, 'digits')
  assert front.main([f'--runs={tmp_path}']) == 0
  page = (tmp_path / 'front.md').read_text()
  assert '## Digits' in page and '50 steps of 64, by' in page and 'CIFAR-10' not in page
  picture = tmp_path / 'front_digits.png'
  drawn = picture.read_bytes()
  plot_curves(tmp_path / 'front_digits_curves.csv', tmp_path)  # as `benchmarks.pictures` does
  assert (tmp_path / 'bits_per_dim.png').read_bytes() == drawn


def test_the_page_keeps_its_runs_and_takes_others_in(ran, found, tmp_path):
  ran(found, 'digits')
  assert front.main([f'--runs={tmp_path}']) == 0
  whole = (tmp_path / 'front.md').read_text()
  page = tmp_path / 'apart' / 'front.md'
  page.parent.mkdir()
  for some in ([found[2], run('muon_8e-3', 1, {100: 9.0})], [], [found[3], found[0]], [found[1]]):
    ran(some, 'digits')
    assert front.main([f'--runs={tmp_path}', f'--page={page}']) == 0
  assert page.read_text() == whole  # the second seed of `muon_8e-3` was made anew


def test_where_a_run_failed_the_page_has_the_others(ran, found, tmp_path, monkeypatch):
  ran(found, 'digits')
  failed = lambda command, check: subprocess.CompletedProcess(command, 1)
  monkeypatch.setattr(subprocess, 'run', failed)
  assert front.main([f'--runs={tmp_path}', '--data=digits']) == 1
  assert '## Digits' in (tmp_path / 'front.md').read_text()


def test_runs_of_other_steps_are_not_set_side_by_side(found, tmp_path):
  counts = zip(found, (50, 50, 60, 50), strict=True)
  some = [run | {'settings': {'num_steps': steps}, 'changed': {}} for run, steps in counts]
  assert front.merged(tmp_path / 'none.json', some[:2]) == some[:2]
  with pytest.raises(ValueError, match=r"'num_steps': 60} must be {'num_steps': 50}, as in the"):
    front.merged(tmp_path / 'none.json', some)


def test_runs_of_another_network_do_not_join_a_page(found, tmp_path):
  some = [run | {'settings': {}, 'changed': {}} for run in found]
  (tmp_path / 'page.json').write_text(json.dumps({'runs': some[:1]}))
  wide = {'model.width': 64}
  with pytest.raises(ValueError, match=r"{'model.width': 64} must be {}, as in .*page.json"):
    front.merged(tmp_path / 'page.json', [some[1] | {'changed': wide}])


def test_runs_of_other_steps_do_not_join_a_page(ran, found, tmp_path, capsys):
  ran(found[:2], 'digits')
  assert front.main([f'--runs={tmp_path}']) == 0
  before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
  ran(found[2:], 'digits', num_steps=60)
  assert front.main([f'--runs={tmp_path}']) == 1
  error = capsys.readouterr().err
  assert "error: --runs={'as_found': False," in error and "'num_steps': 60" in error
  assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_unknown_recipe_is_one_line(tmp_path, capsys):
  assert front.main([f'--runs={tmp_path}', '--data=digits', '--recipes=sgd']) == 1
  assert capsys.readouterr().err.startswith("error: --recipes='sgd' must be one of ")
  assert front.main([f'--runs={tmp_path}', '--reference=sgd']) == 1
  assert capsys.readouterr().err.startswith("error: --reference='sgd' must be one of ")


def test_flags_of_the_base_go_on_to_the_runs_and_others_are_refused(tmp_path, monkeypatch, capsys):
  commands = []
  done = lambda command, check: commands.append(command) or subprocess.CompletedProcess(command, 3)
  monkeypatch.setattr(subprocess, 'run', done)
  flag = '--config.base.data.dir=/some/where'
  assert front.main([f'--runs={tmp_path}', '--data=cifar10', flag]) == 3
  assert commands[0][-1] == flag
  with pytest.raises(SystemExit):
    front.main([f'--runs={tmp_path}', '--data=cifar10', '--data_dir=/some/where'])
  assert 'unrecognized arguments: --data_dir=/some/where' in capsys.readouterr().err
