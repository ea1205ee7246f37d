"""Files of the codec: damage, other models, other environments, conditions, the command line."""

import dataclasses
import functools
import json
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('constriction')

import vdm
from vdm import build, codec
from vdm.build.conditioning import Takes
from vdm.codec import coder, container, curve, message, report, rivals, shared
from vdm.codec.__main__ import main
from vdm.codec.inputs import Inputs
from vdm.data.gaussian_field import GaussianField
from vdm.diffusion import continuous, decoders, gaussian, schedules

FIELD = GaussianField((4, 4), exponent=-2.0, std=0.5)
NUM_VALUES = 17
COUNT = 30
SETTINGS = codec.Settings(6, group_size=4, streams=2)


def model_of(field=FIELD, **changes):
  made = build.Model(
    init=None,
    schedule=lambda *_: schedules.linear(-5.0, 8.0),
    denoiser=lambda params, conditions=None, **_: field.denoiser(0.0, 1.0),
    weighting=None,
    image_shape=(4, 4, 1),
    decoder=decoders.discrete(NUM_VALUES),
  )
  return made._replace(**changes)


@functools.cache
def images(count=COUNT):
  drawn, _ = FIELD.draw(np.random.RandomState(0), count)
  return np.asarray(decoders.from_grid(drawn, NUM_VALUES), np.uint8)


@functools.cache
def blob(settings=SETTINGS):
  return codec.compress(model_of(), {}, images(), settings)


@pytest.fixture
def compiled_once(monkeypatch):
  """What is shared is a function of the settings here, and takes half a second to compile."""
  share, known = coder.share, {}

  def remembered(model, params, settings, *rest):
    if settings not in known:
      known[settings] = share(model, params, settings, *rest)
    return known[settings]

  monkeypatch.setattr(coder, 'share', remembered)


def signed(change, data=None):
  """Returns the file with another header, whose checksum is right, as one who forges it would."""
  data = blob() if data is None else data
  length = container.START.unpack_from(data)[2]
  end = container.START.size + length
  header = json.loads(data[container.START.size : end])
  change(header)
  text = json.dumps(header).encode()
  start = container.START.pack(container.MAGIC, container.FORMAT, len(text)) + text
  return start + container.checksum(start, size=8) + data[end + 8 :]


def places(data):
  """Returns where each record begins and ends."""
  found, place = [], container.START.size + container.START.unpack_from(data)[2] + 8
  while place < len(data):
    end = place + container.RECORD.size + 4 * struct.unpack_from('<I', data, place + 4)[0]
    found.append((place, end))
    place = end
  return found


def flipped(data, rng):
  place = rng.randint(len(data))
  return data[:place] + bytes([data[place] ^ 1 << rng.randint(8)]) + data[place + 1 :]


def swapped(data, rng):
  parts = [data[a:b] for a, b in places(data)]
  one, two = rng.choice(len(parts), 2, replace=False)
  parts[one], parts[two] = parts[two], parts[one]
  return data[: places(data)[0][0]] + b''.join(parts)


def forged(data, rng):
  """Flips a bit of a record's words, and makes its checksum right again."""
  numbers = [i for i, (a, b) in enumerate(places(data)) if b - a > container.RECORD.size]
  place, end = places(data)[rng.choice(numbers)]
  mark = data[places(data)[0][0] - 8 : places(data)[0][0]]
  number, _, marks, _ = container.RECORD.unpack_from(data, place)
  words = flipped(data[place + container.RECORD.size : end], rng)
  record = container._head(mark, number, words, marks) + words
  return data[:place] + record + data[end:]


def regrouped(data, rng):
  return signed(lambda header: header['settings'].update(group_size=int(rng.randint(5, 15))), data)


def of_another_version(data, rng):
  name = rng.choice(['vdm', 'jax', 'jaxlib', 'constriction', 'device'])
  return signed(lambda header: header['environment'].update({name: '9.9.9'}), data)


def of_another_checkpoint(data, rng):
  value = f'{rng.randint(2**31):016x}'
  return signed(lambda header: header['model'].update(params=value), data)


DAMAGE = {
  flipped: 70,
  lambda data, rng: data[: rng.randint(len(data))]: 40,
  swapped: 25,
  forged: 35,
  of_another_checkpoint: 10,
  regrouped: 10,
  of_another_version: 10,
}


def test_no_damage_makes_a_wrong_picture_without_an_error(compiled_once):
  rng, recovered = np.random.RandomState(0), []
  assert sum(DAMAGE.values()) == 200
  for damage, times in DAMAGE.items():
    for _ in range(times):
      bad = damage(blob(), rng)
      assert bad != blob()
      with pytest.raises(ValueError) as caught:
        codec.decompress(model_of(), {}, bad, name='it.vdm')
      assert '\n' not in str(caught.value) and 'it.vdm' in str(caught.value)
      if isinstance(caught.value, codec.Incomplete):
        assert np.array_equal(caught.value.images, images()[caught.value.index])
        recovered.append(len(caught.value.images))
  assert np.array_equal(codec.decompress(model_of(), {}, blob()), images())
  assert len(recovered) > 100 and np.mean(recovered) > 10


def test_damage_to_a_stream_leaves_the_others(compiled_once):
  place, _ = places(blob())[1]
  bad = bytearray(blob())
  bad[place + container.RECORD.size] ^= 1
  with pytest.raises(codec.Incomplete, match=r'group 1 of 8 .* 18 of its 30 images') as caught:
    codec.decompress(model_of(), {}, bytes(bad))
  assert caught.value.index.tolist() == [0, 1, 2, 3, *range(16, 30)]


def refused(match, model=None, params=None, data=None, **kwargs):
  with pytest.raises(ValueError, match=match):
    codec.decompress(model or model_of(), params or {}, data or blob(), name='a.vdm', **kwargs)


def test_what_differs_is_named():
  refused(r'a\.vdm: its model\.params is', params={'w': jnp.ones(3)})
  refused(
    r'its schedule\.log_snr_max is 8\.0, and here it is 7',
    model_of(schedule=lambda *_: schedules.linear(-5.0, 7.0)),
  )
  other = GaussianField((4, 4), exponent=-2.1, std=0.5)
  refused(r'its outputs\.sha256 is .*other bits here', model_of(other))
  jax_9 = signed(lambda header: header['environment'].update(jax='9.9'))
  refused(r"its environment\.jax is '9\.9', and here it is '.*any environment", data=jax_9)
  with pytest.raises(ValueError, match='0 of its 30 images are recovered'):  # it is another header
    codec.decompress(model_of(), {}, jax_9, any_environment=True)
  refused(
    r"its model\.config is 'abc', and here it is 'def'",
    config_hash='def',
    data=signed(lambda header: header['model'].update(config='abc')),
  )
  refused('no file of this codec', data=b'PNG')
  newer = bytearray(blob())
  newer[8] = 2
  end = container.START.size + container.START.unpack_from(blob())[2]
  newer[end : end + 8] = container.checksum(bytes(newer[:end]), size=8)
  refused('format=2 must be 1', data=bytes(newer))
  refused('cannot be read', data=signed(lambda header: header.pop('settings')))
  refused('cannot be read', data=signed(lambda header: header.pop('grid')))
  refused(r'8 bytes follow its last group; 30 of its 30', data=blob() + bytes(8))


def test_a_network_that_differs_later_is_found_out(monkeypatch):
  """What no probe sees the images' checksums do."""
  monkeypatch.setattr('vdm.codec.shared._outputs', lambda *of: 'same')
  written = codec.compress(model_of(), {}, images(), SETTINGS)
  other = GaussianField((4, 4), exponent=-2.001, std=0.5)
  refused('cannot be decoded here', model_of(other), data=written)


def resigned(change, records=slice(None)):
  """Returns the file with another header and some of its records, and all checksums right."""
  bad = signed(change)
  mark = bad[places(bad)[0][0] - 8 : places(bad)[0][0]]
  parts = [bad[: places(bad)[0][0]]]
  for a, b in places(bad)[records]:
    number, _, marks, _ = container.RECORD.unpack_from(bad, a)
    words = bad[a + container.RECORD.size : b]
    parts += [container._head(mark, number, words, marks), words]
  return b''.join(parts)


def test_a_message_ends_in_a_word_that_is_not_zero(monkeypatch):
  """Even if the keystream begins with one: the coder takes it for the end."""
  monkeypatch.setattr(shared, 'keystream', lambda *key, count: np.zeros(count, np.uint32))
  both = shared.share(model_of(), {}, SETTINGS, COUNT, {})
  assert both.initial(0)(3).tolist() == [2**31, 0, 0]


def test_headers_that_contradict_the_rest_are_found_out():
  words = resigned(lambda header: header.update(initial_words=[1, 1]))
  refused('stream 0 does not end in what its sender began with; 30 of', data=words)
  fewer = resigned(lambda header: header.update(groups=6), slice(6))
  refused('it has 6 of its 8 groups; 24 of its 30 images', data=fewer)
  seed = resigned(lambda header: header['settings'].update(seed=1))
  refused(r'its outputs\.sha256 is', data=seed)
  timesteps = resigned(lambda header: header['settings'].update(num_timesteps=7))
  refused(r'its grid\.sha256 is', data=timesteps)


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    (dict(num_timesteps=0), 'num_timesteps=0 must be an integer from 1'),
    (dict(num_timesteps=2.5), 'num_timesteps=2.5 must be an integer'),
    (dict(streams=9), 'streams=9 must be an integer from 1 to 8; there are 8 groups'),
    (dict(group_size=0), 'group_size=0 must be'),
    (dict(seed=-1), 'seed=-1 must be'),
    (dict(cells=0.5), 'cells=0.5 must be from 1 to 1024'),
  ],
)
def test_settings_are_refused_by_name(changes, match):
  with pytest.raises(ValueError, match=match):
    codec.compress(model_of(), {}, images(), SETTINGS._replace(**changes))


def test_a_schedule_that_stands_still_is_refused():
  flat = lambda params: lambda t: 8 - 13 * jnp.maximum(t - 0.5, 0)
  with pytest.raises(ValueError, match='num_timesteps=6 must be few enough that log_snr falls'):
    codec.compress(model_of(schedule=flat), {}, images(), SETTINGS)


def test_images_are_refused():
  for match, u in (
    (r'images=\[30, 4, 4\] must be \[N, 4, 4, 1\]', images()[..., 0]),
    (
      r"images='0 .. 17' must be integers 0 .. 16",
      images() * 0 + np.arange(30)[:, None, None, None] // 29 * 17,
    ),
    (r'must be integers 0 .. 16', images() + 0.5),
    ('images=0 must be one or more', images()[:0]),
  ):
    with pytest.raises(ValueError, match=match):
      codec.compress(model_of(), {}, u, SETTINGS)
  normal = continuous.normal(shift=(0.0,), scale=(1.0,), log_snr_max=8.0)
  with pytest.raises(ValueError, match='only discrete values can be coded'):
    codec.compress(model_of(decoder=normal), {}, images(), SETTINGS)


TAKES = Takes(num_classes=10, vector_size=2, condition_shape=(4, 4, 1), masked=True)


def told_denoiser(params, conditions=None):
  """Uses all that it is told, so that other conditions are other pictures."""

  def denoise(z, log_snr):
    shift = conditions['label'] / 20 + conditions['vector'].sum(axis=1)
    shift = jnp.where(jnp.isnan(shift), 0, shift).reshape(-1, 1, 1, 1)
    field = jnp.where(jnp.isnan(conditions['condition']), 0, conditions['condition'])
    x = jnp.where(conditions['valid'], 0.2 * z + shift + field, 0)
    return gaussian.Prediction(x, z)

  return denoise


def conditions(count=7):
  rng = np.random.RandomState(3)
  return {
    'label': rng.randint(10, size=count),
    'vector': rng.randn(count, 2) / 9,
    'condition': rng.randn(count, 4, 4, 1).astype(np.float32) / 9,
    'mask': np.arange(count * 16).reshape(count, 4, 4, 1) % 3 > 0,
  }


def test_conditions_are_given_to_both_sides():
  model, told = model_of(denoiser=told_denoiser, takes=TAKES), conditions()
  u, settings = images()[:7], codec.Settings(6, group_size=3)
  data = codec.compress(model, {}, u, settings, **told)
  decoded = codec.decompress(model, {}, data, **told)
  assert np.array_equal(decoded, np.where(told['mask'], u, 0))
  for name, value in told.items():
    changed = value.copy()
    changed[6:] = changed[6:] == 0 if name == 'mask' else changed[6:] * 0 + 1
    with pytest.raises(ValueError, match=rf'its conditions\.{name} is .*that the sender gave'):
      codec.decompress(model, {}, data, **told | {name: changed})
    with pytest.raises(ValueError, match=rf"its conditions\.{name} is .* here it is 'none'"):
      codec.decompress(model, {}, data, **told | {name: None})
  for name in ('label', 'vector', 'condition'):
    with pytest.raises(ValueError, match=f'{name}=None must be given for each image: in training'):
      codec.compress(model, {}, u, settings, **told | {name: None})
  second = shared.share(model, {}, settings, 7, told).group(1)
  assert second.conditions['label'].tolist() == told['label'][3:6].tolist()
  last = shared.share(model, {}, settings, 7, told).group(2)
  assert last.conditions['label'].tolist() == [told['label'][6]] * 3
  assert not last.kept[1:].any() and np.array_equal(last.kept[0], told['mask'][6])
  learned = model._replace(takes=TAKES._replace(lack_learned=True))
  nothing = codec.compress(learned, {}, u, settings)
  for receiver in (learned, model):  # a file that was written without conditions is read
    assert np.array_equal(codec.decompress(receiver, {}, nothing), u)
  with pytest.raises(ValueError, match='label'):
    codec.compress(model_of(), {}, u, settings, label=3)


def test_what_a_mask_leaves_out_costs_nothing():
  model = model_of(denoiser=told_denoiser, takes=Takes(masked=True))
  told = dict(label=jnp.zeros(4), vector=jnp.zeros((4, 1)), condition=jnp.zeros((4, 1, 1, 1)))
  model = model._replace(
    denoiser=lambda params, given=None: told_denoiser(params, told | (given or {}))
  )
  net = lambda mask: container.read(
    codec.compress(model, {}, images(), codec.Settings(20, group_size=4), mask=mask), 'it'
  ).header['net_bits']
  half = np.zeros((COUNT, 4, 4, 1), bool)
  half[:, :2] = True
  assert net(half) + net(~half) == pytest.approx(net(None), rel=0.1)


def test_pictures_of_a_prefix():
  """x_hat at a level of the chain: nearer to the images the further it went."""
  model, seen = model_of(), {}
  watch = lambda rows, level, z, x_hat: seen.setdefault(level, []).append((rows.start, x_hat))
  settings = codec.Settings(13, group_size=8, streams=4)
  data = codec.compress(model, {}, images(), settings, watch=watch)
  errors = []
  for log_snr, level in ((-9.0, 13), (-0.5, 8), (6.9, 1)):
    pictures = codec.decompress(model, {}, data, until_log_snr=log_snr)
    x_hat = np.concatenate([part for _, part in sorted(seen[level], key=lambda part: part[0])])
    assert np.array_equal(pictures, model.decoder.from_model(x_hat))
    errors.append(((pictures.astype(float) - images()) ** 2).mean())
  assert errors[0] > 1.3 * errors[1] > 10 * errors[2]
  asked = []
  codec.decompress(model, {}, data, until_log_snr=-9.0, tell=lambda *at: asked.append(at))
  assert len(asked) == 4  # a level of each stream's only group
  with pytest.raises(ValueError, match=r'until_log_snr=7\.5 must be at most 7\.000'):
    codec.decompress(model, {}, data, until_log_snr=7.5)


def test_rate_along_the_chain_adds_up_to_the_net_length():
  """All levels' shares, and what p(u | z_0) costs, are the length of the message."""
  model, settings = model_of(), codec.Settings(60, group_size=30)
  along = curve.Along(images(), model.decoder)
  header = container.read(codec.compress(model, {}, images(), settings, watch=along), 'it').header
  log_snr = np.asarray(schedules.linear(-5.0, 8.0)(jnp.arange(61) / 60), np.float64)
  points = np.array(along.points(log_snr))
  assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) > 0).all()
  net = header['net_bits'] / images().size
  deviation = np.sqrt(2 * net * np.log(2) / images().size) / np.log(2)
  assert points[-1, 1] == pytest.approx(net, abs=4 * deviation)
  assert points[-1, 2] > points[0, 2] + 10


def test_the_extra_is_named_where_it_is_missing(monkeypatch, capsys):
  monkeypatch.setattr(message.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"needs constriction; pip install 'vdm-jax\[codec\]'"):
    codec.compress(model_of(), {}, images(), SETTINGS)
  assert main(['compress', '--workdir=pretrained/digits', '--split=test', '--out=a.vdm']) == 1
  assert capsys.readouterr().err.count('\n') == 1


def test_other_codecs_are_shorter_together():
  volumes = np.zeros((3, 4, 4, 4, 1), np.uint8)
  assert set(rivals.lossless(volumes)) == {'zlib'} and rivals.lossy(volumes, NUM_VALUES) == {}
  found = rivals.lossless(images())
  assert {'PNG', 'WebP', 'zlib'} <= set(found)
  for each, together in found.values():
    assert 0 < together < each
  whole = rivals.mosaic(images())
  assert np.array_equal(whole[:4, 4:8], images()[1])
  for points in rivals.lossy(images(), NUM_VALUES).values():
    _, bits, decibels = np.array(points).T
    assert (np.diff(bits) >= 0).all() and decibels[-1] > decibels[0]


@pytest.fixture(scope='module')
def by_class(tmp_path_factory):
  """A workdir of an untrained model of digits by class."""
  changes = {'model.class_conditional': True, 'model.width': 8, 'model.num_blocks': 1}
  exp = vdm.Experiment('digits', changes | {'model.norm_groups': 2, 'train.label_dropout': 0.1})
  folder = tmp_path_factory.mktemp('by_class')
  state = exp.init()
  bump = lambda leaf: leaf + 0.05 * jnp.arange(leaf.size).reshape(leaf.shape) / leaf.size
  params = {**state.params, 'network': jax.tree.map(bump, state.params['network'])}
  averages = dict.fromkeys(state.averages, params)
  exp.save(dataclasses.replace(state, params=params, averages=averages), folder)
  return str(folder), exp.source('eval').fetch(np.arange(7))


@pytest.fixture
def run(capsys):
  def of(*argv):
    status = main(list(map(str, argv)))
    printed = capsys.readouterr()
    return status, (printed.out if status == 0 else printed.err.splitlines()[-1])

  return of


@pytest.mark.slow
def test_the_command_line_by_class(by_class, run, tmp_path):
  folder, batch = by_class
  model, file, out = f'--workdir={folder}', tmp_path / 'it.vdm', tmp_path / 'it.npy'
  sender = ('--num_timesteps=4', '--group_size=3')
  written = run('compress', model, '--split=test', '--num=7', f'--out={file}', *sender)
  assert written[0] == 0 and f'{file}: 7 images in {file.stat().st_size:,} bytes' in written[1]
  assert run('decompress', file, model, '--split=test', f'--out={out}')[0] == 0
  assert np.array_equal(np.load(out), batch['image'])
  status, line = run('decompress', file, model)
  assert status == 1 and 'its conditions.label is' in line and "here it is 'none'" in line
  # the same from files, which give the same bytes
  np.savez(tmp_path / 'all.npz', images=batch['image'], label=batch['label'])
  np.save(tmp_path / 'images.npy', batch['image'])
  np.savez(tmp_path / 'labels.npz', label=batch['label'])
  again = tmp_path / 'again.vdm'
  both = f'--images={tmp_path}/images.npy', f'--conditions={tmp_path}/labels.npz'
  for source in ((f'--images={tmp_path}/all.npz',), both):
    assert run('compress', model, *source, f'--out={again}', *sender)[0] == 0
    assert again.read_bytes() == file.read_bytes()
  labels = f'--conditions={tmp_path}/labels.npz'
  status, line = run('decompress', again, model, labels, '--until_log_snr=0')
  assert status == 0 and np.load(tmp_path / 'again.npz')['images'].shape == (7, 8, 8, 1)
  # damage
  cut = tmp_path / 'cut.vdm'
  cut.write_bytes(file.read_bytes()[:-30])
  status, line = run('decompress', cut, model, labels)
  assert status == 1 and 'are recovered, in' in line
  recovered = np.load(tmp_path / 'cut_recovered.npz')
  assert np.array_equal(recovered['images'], batch['image'][recovered['index']])
  assert not (tmp_path / 'cut.npz').exists()


@pytest.mark.parametrize(
  ('argv', 'match'),
  [
    (['compress', '--out=a.vdm'], "--images='' must be given, or else --split"),
    (['compress', '--out=a.vdm', '--split=x'], "--split='x' must be one of 'train', 'test'"),
    (['compress', '--out=a.vdm', '--split=test', '--num=999'], 'at most the 360 images'),
    (['compress', '--out=a.vdm', '--images=no.npy'], 'no.npy cannot be read'),
    (['compress', '--out=a.vdm', '--split=test', '--params=x'], "--params='x' must be one of"),
    (['compress', '--out=a.vdm', '--split=test', '--config.no=1'], 'config.no=1 is refused'),
    (['compress', '--out=a.vdm', '--split=test', '--conditions=a.npz'], 'left out with --split'),
    (['decompress', 'no.vdm', '--split=test', '--conditions=a.npz'], 'left out with --split'),
    (['decompress', 'no.vdm'], 'no.vdm cannot be read'),
    (['decompress', 'no.vdm', '--out=a.png'], "--out='a.png' must be a file *.npz or *.npy"),
  ],
)
def test_the_command_line_refuses_in_one_line(argv, match, run):
  status, line = run(*argv, '--workdir=pretrained/digits')
  assert status == 1 and match in line


@pytest.mark.slow
def test_a_report_under_a_mask_is_of_what_counts(run, tmp_path):
  changes = {'data.derive': 'inpainting', 'data.masked': True, 'data.condition_shape': (8, 8, 1)}
  changes |= {'model.width': 8, 'model.num_blocks': 1, 'model.norm_groups': 2}
  exp = vdm.Experiment('digits', changes)
  exp.save(exp.init(), tmp_path / 'run')
  status, table = run(
    *('report', f'--workdir={tmp_path}/run', '--split=test', '--num=6', f'--out={tmp_path}/report'),
    *('--num_timesteps=40', '--draws=8', '--rate_distortion', '--verify', '--group_size=6'),
  )
  assert status == 0 and 'PNG' not in table
  (length,) = json.loads((tmp_path / 'report' / 'report.json').read_text())['lengths']
  counted = 6 * 4 * 4
  header = container.read((tmp_path / 'report' / 'T40.vdm').read_bytes(), 'it').header
  assert length['net'] * counted == pytest.approx(header['net_bits'])
  assert f'{8 * length["size"] / counted:.4f}' in table
  bound = length['bound']['value']
  assert length['net'] == pytest.approx(bound, abs=4 * length['deviation'] + 0.02 * bound)
  lines = (tmp_path / 'report' / 'rate_distortion.csv').read_text().splitlines()
  bits = float(lines[-1].split(',')[-2])
  assert 0.7 * bound < bits < bound  # the last level is not among them
  written = run(
    *('compress', f'--workdir={tmp_path}/run', '--split=test', '--num=6', '--num_timesteps=40'),
    *('--group_size=6', f'--out={tmp_path}/it.vdm'),
  )
  assert f'net {length["net"]:.4f} bits/dim' in written[1]


@pytest.mark.slow
def test_images_of_few_dimensions_that_count_weigh_little_in_a_report(run, tmp_path):
  """What they take for each dimension is far more; images of integers of any type are the same."""
  changes = {'data.masked': True, 'model.width': 8, 'model.num_blocks': 1, 'model.norm_groups': 2}
  exp = vdm.Experiment('digits', changes)
  exp.save(exp.init(), tmp_path / 'run')
  images, mask = np.full((32, 8, 8, 1), 8), np.ones((32, 8, 8, 1))
  images[16:] = np.random.default_rng(0).integers(0, 2, (16, 8, 8, 1)) * 16
  mask[16:, 2:], mask[16:, :, 2:] = 0, 0
  np.savez(tmp_path / 'it.npz', images=images, mask=mask)
  status, _ = run(
    *('report', f'--workdir={tmp_path}/run', f'--images={tmp_path}/it.npz', '--num_timesteps=20'),
    *('--draws=16', '--group_size=32', f'--out={tmp_path}/report'),
  )
  assert status == 0
  (length,) = json.loads((tmp_path / 'report' / 'report.json').read_text())['lengths']
  assert length['net'] == pytest.approx(length['bound']['value'], rel=0.1)


def test_other_codecs_take_images_as_they_were_coded(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(report, 'rows_of', lambda lengths, inputs: seen.append(inputs.images) or [])
  decoder = types.SimpleNamespace(dtype=np.dtype(np.uint8))
  made = types.SimpleNamespace(model=types.SimpleNamespace(decoder=decoder))
  for kind in (np.int64, np.float32):
    report.write(tmp_path, made, [], [], Inputs(np.full((2, 8, 8, 1), 9, kind), {}), 'ema')
  assert [images.dtype for images in seen] == [np.uint8] * 2


@pytest.mark.slow
def test_the_bound_of_a_report_is_of_the_same_class_and_levels(by_class, run, tmp_path):
  """Images without labels have none, and an evaluation's own schedule is not the codec's."""
  folder, batch = by_class
  np.save(tmp_path / 'images.npy', batch['image'])
  np.savez(tmp_path / 'none.npz', label=np.full(7, -1))
  argv = ('report', f'--workdir={folder}', f'--images={tmp_path}/images.npy', '--num_timesteps=3')
  argv = (*argv, '--draws=2', '--group_size=7')
  found = []
  for name, more in (
    ('a', ()),
    ('b', (f'--conditions={tmp_path}/none.npz',)),
    ('c', ('--config.eval.schedule.name=cosine',)),
  ):
    assert run(*argv, *more, f'--out={tmp_path}/{name}')[0] == 0
    report = json.loads((tmp_path / name / 'report.json').read_text())
    found.append(report['lengths'][0]['bound']['value'])
  assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_a_report(run, tmp_path):
  status, table = run(
    *('report', '--workdir=pretrained/digits', '--split=test', '--num=6', f'--out={tmp_path}'),
    *('--num_timesteps=3,5', '--draws=2', '--rate_distortion', '--verify', '--group_size=6'),
  )
  assert status == 0
  for name in ('vdm, T = 3', 'bound, T = 5', 'PNG', 'WebP', 'zlib'):
    assert f'| {name} ' in table
  found = json.loads((tmp_path / 'report.json').read_text())
  for length, steps in zip(found['lengths'], (3, 5), strict=True):
    size = (tmp_path / f'T{steps}.vdm').stat().st_size
    assert length['size'] == size and len(length['seconds']) == 2
    header = container.read((tmp_path / f'T{steps}.vdm').read_bytes(), 'it').header
    assert length['initial'] * 6 * 64 == 32 * sum(header['initial_words'])
    assert length['net'] * 6 * 64 == pytest.approx(header['net_bits'])
    assert length['net'] == pytest.approx(length['bound']['value'], rel=0.3)
  lines = (tmp_path / 'rate_distortion.csv').read_text().splitlines()
  assert len([line for line in lines if line.startswith('"vdm, T = 5"')]) == 5
  assert (tmp_path / 'rate_distortion.png').exists()
