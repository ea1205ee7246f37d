"""What is done to a run: each kind is a function of a random generator, that raises `Broken`."""

import io
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks.campaign import runs
from benchmarks.campaign.runs import Broken
from vdm import build, cards
from vdm.data.pictures import decode
from vdm.fid import images, references, weights
from vdm.sampling.folder import read_shards
from vdm.system import files
from vdm.training import loop
from vdm.workdir import config_file, integrity
from vdm.workdir.load import read_run


def kills(rng: random.Random, base: pathlib.Path, processes: int = 1) -> str:
  """Stops a run up to three times, at any moment, and lets it end."""
  straight, seconds = runs.uninterrupted(base, processes)
  workdir, said = base / f'run_{os.getpid()}', []
  runs.shut(workdir)
  for _ in range(rng.randint(1, 3)):
    written = runs.written(workdir)
    started = runs.start(base, workdir, processes)
    chosen, plan = rng.randrange(processes), runs.storm(rng)
    time.sleep(rng.uniform(0.05, 1.1 * seconds))
    for pause, number in plan:
      time.sleep(pause)
      started[chosen].send_signal(number)
    said.append('+'.join(runs.signal.Signals(number).name for _, number in plan))
    runs.launcher(started, workdir, written)
    good = runs.GOOD if processes == 1 else runs.GOOD | {1, 134, -runs.signal.SIGABRT}
    statuses = runs.finish(started, workdir, good, quiet_since=written)
    if processes > 1 and 75 in statuses and set(statuses) != {75}:
      raise Broken(f'wrong: statuses {statuses} after {said[-1]}')
  runs.finish(runs.start(base, workdir, processes), workdir, {0})
  runs.compare(workdir, straight)
  runs.shut(workdir)
  return ', '.join(said)


def pairs(rng: random.Random, base: pathlib.Path) -> str:
  """Stops either process of a job of two, fresh or resumed."""
  return kills(rng, base, processes=2)


def damage(rng: random.Random, path: pathlib.Path) -> str:
  """Cuts, flips, empties, grows, replaces or removes a file; returns how."""
  content = path.read_bytes()
  how = rng.choice(('cut', 'flip', 'empty', 'grow', 'zero', 'gone', 'text'))
  place = rng.randrange(len(content)) if content else 0
  match how:
    case 'cut':
      content = content[:place]
    case 'flip' if content:
      flipped = bytes([content[place] ^ (1 << rng.randrange(8))])
      content = content[:place] + flipped + content[place + 1 :]
    case 'empty':
      content = b''
    case 'grow':
      content += rng.randbytes(rng.randint(1, 100))
    case 'zero':
      content = content[:place] + bytes(len(content) - place)
    case 'text':
      content = rng.choice((b'{}', b'[]', b'null', b'{"facts": 1}', b'PK\x03\x04', b'\xff\xfe'))
    case 'gone':
      path.unlink()
      return how
  path.write_bytes(content)
  return f'{how} at {place}'


def refused(read: Callable[[], object]) -> tuple[bool, object]:
  """Returns whether a reader refused in one line of ours, and else what it returned.

  Raises:
    Broken: it raised something else.
  """
  try:
    return False, read()
  except (ValueError, FloatingPointError) as error:
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if '/vdm/' in last and '\n' not in str(error):
      return True, None
    raise Broken(f'traceback: {error!r}') from error
  except Exception as error:
    raise Broken(f'traceback: {error!r}') from error


def corruption(rng: random.Random, base: pathlib.Path) -> str:
  """Damages files of checkpoints; what is restored is one of those that were saved, or nothing."""
  straight, _ = runs.uninterrupted(base)
  workdir = base / f'damaged_{os.getpid()}'
  shutil.rmtree(workdir, ignore_errors=True)
  shutil.copytree(straight, workdir)
  found = sorted(p for p in (workdir / 'checkpoints').rglob('*') if p.is_file())
  said = []
  for path in rng.sample(found, rng.randint(1, 3)):
    said.append(f'{path.relative_to(workdir)}: {damage(rng, path)}')
  no, run = refused(lambda: read_run(None, workdir))
  if not no:
    manifest = straight / 'checkpoints' / str(int(run.state.step)) / 'manifest' / 'metadata'
    saved = json.loads(manifest.read_text())['leaves']
    if [leaf[-1] for leaf in saved.values()] != integrity.checksums(run.state):
      raise Broken(f'wrong: another state was restored after {said}')
  return ('refused: ' if no else 'restored: ') + ', '.join(said)


def faults(rng: random.Random, base: pathlib.Path) -> str:
  """Puts a value that is not finite into the state after some step, behind its metrics."""
  straight, _ = runs.uninterrupted(base)
  workdir, at = base / f'fault_{os.getpid()}', rng.randint(1, runs.NUM_STEPS)
  shutil.rmtree(workdir, ignore_errors=True)
  config = config_file.read_config(runs.config_file(base), {})
  shapes = jax.eval_shape(build.init_state(config, build.model(config)))
  leaves = [i for i, leaf in enumerate(jax.tree.leaves(shapes)) if leaf.dtype == jnp.float32]
  place, value = rng.choice(leaves), rng.choice((np.nan, np.inf, -np.inf))
  original = loop.make_train_step

  def with_fault(*args):
    step = original(*args)

    def run(state, batch, axis_name=None):
      after, metrics = step(state, batch, axis_name)
      flat, structure = jax.tree.flatten(after)
      bad = flat[place].ravel().at[0].set(value).reshape(flat[place].shape)
      flat[place] = jnp.where(after.step == at, bad, flat[place])
      return jax.tree.unflatten(structure, flat), metrics

    return run

  loop.make_train_step = with_fault
  try:
    no, _ = refused(lambda: loop.train(config, workdir))
  finally:
    loop.make_train_step = original
  for path in (workdir / 'checkpoints').glob('[0-9]*'):
    if not refused(lambda path=path: read_run(None, workdir, path.name).state)[0]:
      continue
    raise Broken(f'wrong: step {path.name} was saved as good')
  if not no:
    raise Broken('wrong: it ran to its end')
  if loop.train(config, workdir):
    raise Broken('lost: it does not go on')
  runs.compare(workdir, straight)
  name = list(jax.tree_util.tree_leaves_with_path(shapes))[place][0]
  return f'{value} in {jax.tree_util.keystr(name)} at {at}'


VALUES = (
  *(0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**20, -(2**40)),
  *(0.0, -0.0, 0.5, 1.0, -1.0, 1e-30, 1e30, np.inf, -np.inf, np.nan),
  *('', 'x', 'auto', 'none', 'elbo', 'raw', 'ema', 'raw,ema', 'None', '../..', '\n', 'a' * 300),
  *((), (0,), (1, 2), ('a',), (1, 2, 3), (np.nan,), (-1, -1, -1), True, False),
)


def configs(rng: random.Random, base: pathlib.Path) -> str:
  """Gives leaves of a config other values: refused in one line, or traced to the end of a step."""
  names = ('digits', 'cifar10', 'fashion_mnist_uvit', 'imagenet64', 'digits_pp', 'digits_dit')
  config = config_file.read_config(f'{rng.choice(names)}:debug', {})
  leaves = config_file.flat(config.to_dict())
  changes = {}
  for leaf in rng.sample(sorted(leaves), rng.randint(1, 3)):
    same = [value for value in VALUES if type(value) is type(leaves[leaf])]
    changes[leaf] = rng.choice(same if same and rng.random() < 0.9 else VALUES)

  def trace():
    changed = config_file.changed(config, changes)
    model = build.model(changed)
    build.check_devices(changed, 1)
    jax.eval_shape(build.init_state(changed, model))

  no, _ = refused(trace)
  return f'{"refused" if no else "taken"}: {changes!r}'


def disks(rng: random.Random, base: pathlib.Path) -> str:
  """Trains on a file system of a few kilobytes; then where there is room."""
  mounts = subprocess.run(['unshare', '-rm', 'true'], capture_output=True, check=False)
  if mounts.returncode:
    time.sleep(1)
    return 'skipped: this user may not mount a file system of its own'
  straight, _ = runs.uninterrupted(base)
  workdir, mount = base / f'disk_{os.getpid()}', base / f'mount_{os.getpid()}'
  runs.shut(workdir)
  shutil.rmtree(mount, ignore_errors=True)
  mount.mkdir()
  size = rng.randint(16, 6000)
  inner = [sys.executable, '-m', 'vdm.main', f'--config={runs.config_file(base)}']
  inner += [f'--workdir={mount}/w', '--num_processes=1']
  script = f'mount -t tmpfs -o size={size}k none {mount} && {" ".join(inner)}; status=$?; '
  script += f'cp -r {mount}/w {workdir} 2>/dev/null; exit $status'
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
  env |= {'JAX_COMPILATION_CACHE_DIR': str(base / 'xla'), 'XDG_CACHE_HOME': str(base / 'cache')}
  done = subprocess.run(
    ['unshare', '-rm', 'sh', '-c', script],
    cwd=runs.ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  text = done.stdout + done.stderr
  if 'Traceback' in text:
    raise Broken(f'traceback: {size} kB: {text[text.index("Traceback") :][-3000:]}')
  runs.finish(runs.start(base, workdir), workdir, {0})
  runs.compare(workdir, straight)
  return f'{size} kB: status {done.returncode}: {text.strip().splitlines()[-1][:160]}'


def damaged_files(rng: random.Random, base: pathlib.Path) -> str:
  """Damages cards, configs, shards, references, weights, pictures; the reader refuses or reads."""
  straight, _ = runs.uninterrupted(base)
  folder = base / f'files_{os.getpid()}'
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  kind = rng.choice(sorted(READERS))
  make, read = READERS[kind]
  path = make(folder, straight)
  how = damage(rng, path)
  no, _ = refused(lambda: read(path))
  return f'{kind}: {how}: {"refused" if no else "read"}'


def _copy(pattern):
  def make(folder, straight):
    path = sorted(straight.glob(pattern))[0]
    (folder / path.parent.name).mkdir()
    return pathlib.Path(shutil.copy(path, folder / path.parent.name))

  return make


def _picture(image_format):
  def make(folder, _):
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    path = folder / f'picture.{image_format}'
    Image.fromarray(array).save(path)
    return path

  return make


def _npz(name, **arrays):
  def make(folder, _):
    path = folder / name
    path.write_bytes(files.content(lambda file: np.savez(file, **arrays)))
    return path

  return make


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3)).astype(np.uint8)
FACTS = np.array(json.dumps({'extractor': 'x', 'num_images': 4, 'name': 'x', 'sha256': 'x'}))
READERS = {
  'card': (_copy('cards/*.json'), lambda path: cards.series(path.parents[1])),
  'config': (_copy('config.json'), lambda path: config_file.own_config(path.parent)),
  'png': (_picture('png'), lambda path: decode(path, str(path))),
  'jpeg': (_picture('jpg'), lambda path: decode(path, str(path))),
  'webp': (_picture('webp'), lambda path: decode(path, str(path))),
  'opened': (
    _picture('png'),
    lambda path: decode(io.BytesIO(path.read_bytes() if path.exists() else b''), 'image 3'),
  ),
  'folder': (_picture('png'), lambda path: images.load(str(path.parent))),
  'shard': (_npz('00000000.npz', images=PIXELS), lambda path: list(read_shards(path.parent))),
  'images': (
    _npz('images.npz', arr_0=PIXELS),
    lambda path: images.load(str(path)).fetch(np.arange(4)),
  ),
  'reference': (
    _npz('reference.npz', facts=FACTS, mu=np.zeros(3), sigma=np.eye(3), rows_features=np.eye(3)),
    lambda path: references._arrays(path),
  ),
  'weights': (
    _npz('weights.npz', facts=FACTS, kernel=np.eye(3)),
    lambda path: weights.read(path, 'fetch it again'),
  ),
  'embeddings': (
    lambda folder, _: _saved(folder / 'e.npy'),
    lambda path: _embeddings(path),
  ),
}


def _saved(path):
  np.save(path, np.eye(3, dtype=np.float32))
  return path


def _embeddings(path):
  from vdm.sampling.labels import embeddings_of

  return embeddings_of(str(path), ConfigDict(dict(embedding_size=3)))(np.arange(2))


KINDS = {
  'kills': kills,
  'pairs': pairs,
  'corruption': corruption,
  'faults': faults,
  'configs': configs,
  'files': damaged_files,
  'disks': disks,
}
