"""The campaign breaks the same things again, and tells what was broken from what held."""

import importlib
import json
import pathlib
import random

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def campaign(monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  return lambda name: importlib.import_module(f'benchmarks.campaign.{name}')


def test_damage_is_a_function_of_the_generator(campaign, tmp_path):
  cases = campaign('cases')
  contents = []
  for _ in range(2):
    path = tmp_path / 'file'
    found = []
    for number in range(40):
      path.write_bytes(b'0123456789')
      found.append(cases.damage(random.Random(number), path))
      found.append(path.read_bytes() if path.exists() else None)
    contents.append(found)
  assert contents[0] == contents[1] and len(set(contents[0][::2])) > 10


def test_what_a_library_raises_is_no_refusal(campaign):
  cases, runs = campaign('cases'), campaign('runs')
  from vdm.system import files

  assert cases.refused(lambda: files.read_json('/nowhere')) == (True, None)
  assert cases.refused(lambda: 3) == (False, 3)
  for broken in (lambda: {}['x'], lambda: json.loads('{')):
    with pytest.raises(runs.Broken, match=r'^traceback: '):
      cases.refused(broken)


def test_runs_that_differ_are_told_apart(campaign, monkeypatch, tmp_path):
  runs = campaign('runs')
  kept = {'leaves': {'w': [1, 2]}, 'cards': {'a': 1.0}, 'curves': {'train/loss': [[1, 2.0]]}}
  found = {tmp_path / 'a': kept, tmp_path / 'b': kept}
  monkeypatch.setattr(runs, 'kept_of', lambda workdir: found[workdir])
  runs.compare(tmp_path / 'a', tmp_path / 'b')
  for kind, other, verdict in (
    ('leaves', {'w': [1, 3]}, 'wrong'),
    ('cards', {}, 'lost'),
    ('curves', {'train/loss': [[1, 2.0], [1, 2.0]]}, 'lost'),
  ):
    found[tmp_path / 'a'] = kept | {kind: other}
    with pytest.raises(runs.Broken, match=f'^{verdict}: '):
      runs.compare(tmp_path / 'a', tmp_path / 'b')


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['configs', 'files'])
def test_cases_hold_and_are_reported(kind, campaign, tmp_path, monkeypatch):
  main, cases = campaign('__main__'), campaign('cases')
  monkeypatch.setitem(cases.READERS, 'card', cases.READERS['png'])  # which needs a finished run
  monkeypatch.setitem(cases.READERS, 'config', cases.READERS['png'])
  monkeypatch.setattr(cases.runs, 'uninterrupted', lambda base: (tmp_path, 0.0))
  found = {str(n): main.run_case(kind, 5, n, tmp_path) for n in range(30)}
  assert {case['verdict'] for case in found.values()} == {'held'}, found
  found['30'] = {'verdict': 'lost', 'note': 'a step', 'seconds': 1.0}
  (tmp_path / f'{kind}_5.json').write_text(json.dumps(found))
  text, good = main.report(tmp_path, 5)
  assert not good and f'| {kind} | 31 | 30 | 1 | 0 | 0 |' in text
  assert f'--kinds={kind} --seed=5 --only=30' in text
