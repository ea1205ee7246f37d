"""The page of a run: whole in itself, true to the cards, and there whatever is missing."""

import html
import html.parser
import json
import re
import shlex
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image
from vdm.configs import default, digits

import vdm
from vdm import cards
from vdm.report import __main__ as command_line
from vdm.report import markup, run
from vdm.system import files, writers
from vdm.workdir.config_file import plain, read_config

DATA = {'full_name': 'digits/sklearn', 'split': 'test', 'num_images': 360, 'num_bits': 0}
VERSIONS = {'jax': '0.10.2', 'flax': '0.12.8'}
CARD = {
  'metric': 'bits_per_dim',
  'value': 2.26543,
  'stderr': 0.00821,
  'interval_95': [2.2487, 2.2822],
  'terms': {'recon': {'value': 0.0277}, 'prior': {'value': 0.0021}, 'diffusion': {'value': 2.2356}},
  'bound': 'continuous-time ELBO',
  'num_images': 360,
  'whole_split': True,
  'draws_per_image': 32,
  'eval_seed': 0,
  'data': DATA,
  'params': 'ema',
  'environment': {
    'device': 'cpu',
    'num_devices': 2,
    'num_hosts': 1,
    'python': '3.11.7',
    'versions': VERSIONS,
    'git_revision': '0123456789abcdef',
  },
}
DISTANCE = {
  'metric': 'fd_classifier',
  'value': 28.94,
  'stderr': 2.91,
  'num_samples': 360,
  'sampler': 'ddim',
  'network_evaluations': 50,
  'params': 'ema',
}


def write_card(workdir, card, step, name='own', **changes):
  path = workdir / 'cards' / f'{card["metric"]}_{name}_step{step:08d}.json'
  files.write(path, json.dumps(card | {'step': step} | changes))
  return path


def make_run(workdir, config=None):
  """Writes what a finished run of the digits leaves, but for checkpoints."""
  config = config or digits.get_config()
  files.write(workdir / 'config.json', json.dumps(plain(config)))
  for step, value in ((400, 2.3), (1200, CARD['value'])):
    write_card(workdir, CARD, step, value=value)
    write_card(workdir, DISTANCE, step)
  writer = writers.EventWriter(workdir / 'tensorboard')
  for step in (100, 200, 1200):
    scalars = {'bits_per_dim': 3 - step / 1200, 'loss': 2.0, 'grad_norm': 1.5}
    writer.write_scalars(step, {f'train/{name}': value for name, value in scalars.items()})
  writer.close()
  for name in ('samples/step_00001200', 'samples/progressive_00001200', 'plots/schedule'):
    path = workdir / f'{name}.png'
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
  return workdir


class Checked(html.parser.HTMLParser):
  """Checks that elements are closed, and that nothing comes from elsewhere."""

  def __init__(self):
    super().__init__()
    self.open, self.text, self.pictures, self.names = [], [], 0, set()

  def handle_starttag(self, tag, attributes):
    self.names.add(tag)
    for name, value in attributes:
      assert name not in ('href', 'action', 'srcset', 'data') or value.startswith('#'), (tag, value)
      assert not name.startswith('on'), name
      if name == 'src':
        assert value.startswith('data:image/'), value
        self.pictures += 1
    if tag not in markup.EMPTY:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    if tag not in markup.EMPTY:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not self.open or self.open[-1] != 'style':
      self.text.append(data)


def checked(*workdirs, tmp_path):
  """Returns the page's source, its text without HTML, and the number of its pictures."""
  path = vdm.report.write(workdirs, tmp_path / 'page.html')
  source, parser = path.read_text(), Checked()
  parser.feed(source)
  assert not parser.open and not parser.names & {'script', 'link', 'iframe', 'object'}
  assert "default-src 'none'" in html.unescape(source)
  assert not re.search(r'url\((?!#)|@import', source)
  for svg in re.findall(r'<svg.*?</svg>', source, re.DOTALL):
    ET.fromstring(svg.replace('xlink:href', 'href'))
  return source, ' '.join(parser.text), parser.pictures


def test_a_page_is_whole_in_itself_and_its_numbers_are_those_of_the_cards(tmp_path):
  workdir = make_run(tmp_path / 'digits_run')
  source, text, pictures = checked(workdir, tmp_path=tmp_path)
  assert pictures == 3 and len(source) < 2e6
  assert '://' not in source  # not even a name space
  assert '<title>digits_run: 2.265 ± 0.008 bits/dim</title>' in source
  for part in (
    'all 360 images of test',
    '95 % interval: 2.2487 to 2.2822',
    'recon 0.0277, prior 0.0021, diffusion 2.2356',
    'This is the best of 2 evaluations',
    '28.9 ± 2.9',  # the distance
    'fd_classifier',
    'It is no FID',  # what it is
    'python 3.11.7, jax 0.10.2, flax 0.12.8',
    '0123456789abcdef',
    'python -m vdm.main --config=configs/digits.py --workdir=runs/digits_run_again',
  ):
    assert part in text, part
  (card,) = [json.loads(part) for part in re.findall(r'\{\s+"metric".*?\n\}', text, re.DOTALL)]
  own = cards.load(workdir / 'cards' / 'bits_per_dim_own_step00001200.json')
  assert card == own
  # learning_rate of digits, and of the defaults
  assert re.search(r'optimizer\.learning_rate\s+0\.008\s+0\.0002', text)
  assert source.count('<svg') == 4  # bound, distance, loss, norm of the gradient


def test_a_page_only_reads(tmp_path):
  workdir = make_run(tmp_path / 'run')
  found = lambda: {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in workdir.rglob('*')}
  before = found()
  checked(workdir, tmp_path=tmp_path)
  assert found() == before


def test_text_of_configs_cards_and_folders_is_no_html(tmp_path):
  evil = '<script>alert("&")</script>'
  config = digits.get_config()
  with config.unlocked():
    config.name, config.data.path = evil, evil
  workdir = make_run(tmp_path / "a<b>&'c", config)
  write_card(workdir, DISTANCE, 1200, name='evil', sampler=evil)
  source, text, _ = checked(workdir, tmp_path=tmp_path)
  assert '<script' not in source and evil in text and "a<b>&'c" in text
  source, text, _ = checked(workdir, make_run(tmp_path / 'other'), tmp_path=tmp_path)
  assert '<script' not in source and evil in text and "a<b>&'c" in text


def test_what_is_missing_is_said(tmp_path):
  workdir = tmp_path / 'young'
  files.write(workdir / 'config.json', json.dumps(plain(default.get_config())))
  _, text, pictures = checked(workdir, tmp_path=tmp_path)
  assert pictures == 0
  for part in ('No evaluation yet.', 'no curves yet', 'no number card', 'No samples', 'no plots'):
    assert part in text, part
  assert 'step 0 of 1,000 so far' in text
  writer = writers.EventWriter(workdir / 'tensorboard')
  writer.write_scalars(10, {'train/bits_per_dim': 5.25})
  writer.close()
  _, text, _ = checked(workdir, tmp_path=tmp_path)
  assert 'The last step of training had 5.250.' in text and 'step 10 of 1,000 so far' in text
  _, text, _ = checked(workdir, make_run(tmp_path / 'done'), tmp_path=tmp_path)
  assert 'no evaluation yet' in text and 'There are no two numbers to compare' in text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
  workdir = make_run(tmp_path / 'run')
  (workdir / 'cards' / 'bits_per_dim_cut_step00001600.json').write_text('{"metric": "bits')
  (workdir / 'plots' / 'schedule.png').write_bytes(b'\x89PNG\r\n\x1a\nno more')
  (events,) = (workdir / 'tensorboard').iterdir()
  content = bytearray(events.read_bytes())
  content[-20] ^= 1  # in the scalars of the last step
  events.write_bytes(content)
  _, text, pictures = checked(workdir, tmp_path=tmp_path)
  for part in ('bits_per_dim_cut_step00001600.json cannot', 'schedule.png cannot', events.name):
    assert part in text, part
  assert pictures == 2 and '2.265 ± 0.008' in text
  (found,) = run.read([workdir])
  assert list(found.scalars['train/loss']) == [100, 200]
  events.write_bytes(bytes(content[:-30]))  # being written
  (found,) = run.read([workdir])
  assert list(found.scalars['train/loss']) == [100, 200] and len(found.damaged) == 1  # the card


@pytest.mark.parametrize(
  ('files_there', 'says'),
  [
    ({}, 'is no workdir, as it has no config.json; give that of a run.'),
    ({'a/config.json': '{}', 'b/config.json': '{}'}, 'it holds a, b: give '),
    ({'config.json': '{"name": '}, 'config.json cannot be read'),
    ({'config.json': '{"name": "x"}'}, 'config.json cannot be read'),
  ],
)
def test_what_is_no_workdir_is_refused_in_a_line(tmp_path, capsys, files_there, says):
  for name, text in files_there.items():
    files.write(tmp_path / 'w' / name, text)
  assert command_line.main([str(tmp_path / 'w'), f'--out={tmp_path}/page.html']) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert str(tmp_path / 'w') in line and says in line
  assert not (tmp_path / 'page.html').exists()


def test_the_command_says_where_the_page_is_and_how_large(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  make_run(tmp_path / 'mine')
  assert command_line.main(['mine']) == 0
  assert re.fullmatch(r'mine\.html: 0\.\d\d MB\n', capsys.readouterr().out)
  assert command_line.main(['mine', '--out=/proc/nothing/page.html']) == 1
  assert capsys.readouterr().err.startswith('error: /proc/nothing')


def test_side_by_side(tmp_path):
  other = digits.get_config()
  with other.unlocked():
    other.optimizer.learning_rate = 1e-3
  runs = [make_run(tmp_path / 'a' / 'run'), make_run(tmp_path / 'b' / 'run', other)]
  _, text, _ = checked(*runs, tmp_path=tmp_path)
  assert 'The likelihoods are comparable' in text
  assert all(str(workdir) in text for workdir in runs)  # which have the same name
  assert re.search(r'optimizer\.learning_rate\s+0\.008\s+0\.001', text)
  write_card(runs[1], CARD, 1200, data=DATA | {'split': 'train'}, value=1.0)
  _, text, _ = checked(*runs, tmp_path=tmp_path)
  both = [cards.load(w / 'cards' / 'bits_per_dim_own_step00001200.json') for w in runs]
  (reason,), _ = cards.compare(both)
  assert reason.startswith('not comparable, data.split') and reason in text
  assert 'comparable.' not in text.replace(reason, '')


def test_the_newest_distance_is_shown_and_other_numbers_of_samples_are_named(tmp_path):
  runs = [make_run(tmp_path / name) for name in 'ab']
  shared = dict(metric='fd_pixels', sampler='ddim', network_evaluations=9, params='ema')
  for workdir, step, count, value in (
    (runs[0], 1200, 10_000, 5.25),
    (runs[0], 400, 360, 40.75),  # a series that comes later by its name
    (runs[1], 1200, 360, 6.5),
  ):
    path = workdir / 'cards' / f'fd_pixels_{"z" if count == 360 else "a"}_step{step:08d}.json'
    card = dict(shared, step=step, num_samples=count, value=value, stderr=None)
    path.write_text(json.dumps(card))
  _, text, _ = checked(*runs, tmp_path=tmp_path)
  table = text.partition('measured on')[2].partition('comparable')[0]
  assert '5.25' in table and '6.5' in table and '40.75' not in table
  assert 'fd_pixels: not comparable, num_samples: 10000 (1); 360 (2)' in text


def test_units_that_differ_have_axes_of_their_own(tmp_path):
  make_run(tmp_path / 'bits')
  workdir = make_run(tmp_path / 'nats')
  for path in (workdir / 'cards').iterdir():
    path.unlink()
  for step in (400, 1200):
    write_card(workdir, CARD, step, metric='nats_per_dim', value=0.55 - step / 1e4)
  source, text, _ = checked(tmp_path / 'bits', workdir, tmp_path=tmp_path)
  assert 'nats/dim' in text and 'another quantity' in text
  assert source.count('>Variational bound<') == 2


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'train.num_steps': 800, 'data.eval_split': 'train[:10%]', 'ema.power_stds': (0.05, 0.1)},
    {'eval.fid': True, 'optimizer.learning_rate': 3e-5, 'decoder.name': 'normal'},
  ],
)
@pytest.mark.parametrize('preset', ['digits', 'digits:debug'])
def test_the_command_makes_the_same_config(tmp_path, monkeypatch, changes, preset):
  config = read_config(preset, changes)
  (found,) = run.read([make_run(tmp_path / 'it', config)])
  python, m, module, which, *typed, again = shlex.split(run.command(found))
  assert [python, m, module, again] == ['python', '-m', 'vdm.main', '--workdir=runs/it_again']
  assert which == f'--config=configs/{preset.replace("digits", "digits.py")}'
  monkeypatch.setattr('sys.argv', ['vdm', *typed])  # where the flags find what is overridden
  own = flags.FlagValues()
  config_flags.DEFINE_config_dict('config', read_config(preset, {}), flag_values=own)
  own(['vdm', *typed])
  assert plain(own.config) == plain(config)


def test_a_config_that_did_not_come_with_the_package_is_read_from_the_workdir(tmp_path):
  for name, change in (('mine', {}), ('digits', {'more': 1})):
    config = digits.get_config()
    with config.unlocked():
      config.name = name
      config.schedule.update(change)  # no flag adds a leaf
    (found,) = run.read([make_run(tmp_path / name, config)])
    text = run.command(found)
    load, train = f'vdm.load("{tmp_path}/{name}")[0]', f'train("runs/{name}_again")'
    assert text == f"python -c 'import vdm; {load}.{train}'"


def test_large_pictures_are_made_smaller(tmp_path):
  pixels = np.random.RandomState(0).randint(0, 255, (2000, 3000, 3), np.uint8)
  path = tmp_path / 'large.png'
  Image.fromarray(pixels).save(path)
  made = markup.picture(path, 'a "large" one')
  assert 'width="1600" height="1067"' in made and 'alt="a &quot;large&quot; one"' in made
  assert len(made) < path.stat().st_size / 4
