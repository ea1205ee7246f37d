"""Seconds and GB/s to save and restore the train state of a config: a Markdown table.

  python -m benchmarks.checkpoint --config=configs/cifar10.py
  python -m benchmarks.checkpoint --config=configs/imagenet64.py --dir=/mnt/disk

`vdm.workdir.checkpoint` writes and reads, as training does, with the checksums of all arrays, which
hold random numbers: nothing compresses. `save, blocking` is what training waits for; `save, whole`
ends when all is written. Every round has a new temporary directory in --dir; after one that is not
counted, every figure is the median of --repeats, with the least and the greatest. A restore finds
the files where the operating system keeps what was just written, often in memory.
"""

import functools
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vdm import build
from vdm.system import hosts, parallel
from vdm.workdir import checkpoint


def random_state(abstract: Any, seed: int = 0) -> Any:
  """Arrays of these shapes and shardings: random numbers, but zeros where they are integers."""
  rng = np.random.default_rng(seed)

  def fill(leaf):
    floats = np.issubdtype(leaf.dtype, np.floating)
    values = rng.standard_normal(leaf.shape, np.float32) if floats else np.zeros(leaf.shape)
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

  return jax.tree.map(fill, abstract)


def timed_round(state: Any, abstract: Any, folder: pathlib.Path) -> tuple[dict[str, float], int]:
  """Seconds of one save and one restore, and the bytes of the files."""
  with checkpoint.manager(folder, keep=1) as manager:
    start = time.perf_counter()
    checkpoint.save(manager, 1, state)
    blocking = time.perf_counter() - start
    manager.wait_until_finished()
    seconds = {'save, blocking': blocking, 'save, whole': time.perf_counter() - start}
  with checkpoint.manager(folder) as manager:
    start = time.perf_counter()
    jax.block_until_ready(checkpoint.restore(manager, abstract, 1))
    seconds['restore'] = time.perf_counter() - start
  return seconds, sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def measure(config: ConfigDict, repeats: int, directory: str | None = None) -> str:
  """The table, after a line that says how many bytes."""
  build.check_devices(config, jax.device_count())
  mesh = parallel.make_mesh(config.parallel.fsdp)
  abstract = parallel.abstract_state(mesh, build.init_state(config, build.model(config)))
  state, rounds = random_state(abstract), []
  for _ in range(1 + repeats):
    with tempfile.TemporaryDirectory(dir=directory) as folder:
      seconds, written = timed_round(state, abstract, pathlib.Path(folder))
      rounds.append(seconds)
  leaves = jax.tree.leaves(state)
  size = sum(leaf.nbytes for leaf in leaves)
  lines = [
    f'{config.name}: {size / 1e9:.4g} GB in {len(leaves)} arrays, {written / 1e9:.4g} GB of files, '
    f'{jax.device_count()} x {jax.devices()[0].device_kind}\n',
    '| part | seconds | GB/s |\n|---|---|---|',
  ]
  for name in rounds[0]:
    found = [seconds[name] for seconds in rounds[1:]]
    middle = statistics.median(found)
    span = f'{middle:.3g} ({min(found):.3g} to {max(found):.3g})'
    lines.append(f'| {name} | {span} | {size / middle / 1e9:.3g} |')
  return '\n'.join(lines)


def main(_):
  """Prints the table."""
  values = flags.FLAGS
  if values.config is None:
    sys.exit('--config is missing; give a file, such as configs/digits.py.')
  hosts.use_cores(functools.partial(build.works_on, values.config))
  print(measure(values.config, values.repeats, values.dir))


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'Whose train state.')
  flags.DEFINE_integer('repeats', 3, 'Timed rounds.', lower_bound=1)
  flags.DEFINE_string('dir', None, 'Parent of the temporary directories; default: $TMPDIR.')
  app.run(main)
