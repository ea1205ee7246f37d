"""Images/s of the training data of a config, without a network: a Markdown table.

  python -m benchmarks.data --config=configs/imagenet64.py --config.data.dir=DIR
  python -m benchmarks.data --config=configs/cifar10.py --config.data.dir=DIR --seconds=10

It does what training does for its batches: records are read at random, decoded, stacked and sent
to the devices, where each is waited for. `read and decoded` keeps no image; a split that fits in
memory is kept there, and `from memory` is the speed after its first epoch. After a part that is not
counted, every figure is the median of --repeats, with the least and the greatest, of parts that
take --seconds or more. The operating system may hold the files in its own memory: a first epoch
from a slow disk is another thing. The split may have any number of images, not the config's alone.
"""

import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vdm import build, data
from vdm.data import tfds
from vdm.system import hosts, parallel


def rates(batches: Iterator, group: int, size: int, seconds: float) -> Iterator[float]:
  """Images/s of one part after another: whole groups of batches, `seconds` or more of them."""
  while True:
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < seconds:
      for _ in range(group):
        jax.block_until_ready(next(batches))
      count += group
    yield count * size / (time.perf_counter() - start)


def measure(config: ConfigDict, repeats: int, seconds: float, warm: bool) -> str:
  """Images/s: median (least to greatest). `warm` goes through the split once before."""
  source = data.load(config.data, 'train')
  for start in range(0, len(source) if warm else 0, 512):
    source.fetch(np.arange(start, min(start + 512, len(source))))
  mesh, size = parallel.make_mesh(config.parallel.fsdp), config.train.batch_size
  batches = data.train_batches(
    source, batch_size=size, seed=config.seed, start_step=0, process_index=0, process_count=1
  )
  batches = parallel.prefetch(batches, lambda batch: parallel.to_devices(mesh, batch))
  # Every thread makes a batch of its own: as many as there are threads come at about one time.
  parts = rates(batches, max(1, source.num_threads), size, seconds)
  next(parts)
  found = [next(parts) for _ in range(repeats)]
  return f'{statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f})'


def main(_):
  """Prints what was measured, and on what."""
  values = flags.FLAGS
  config = values.config
  if config is None:
    sys.exit('--config is missing; give a file, such as configs/digits.py.')
  hosts.use_cores(functools.partial(build.works_on, config))
  build.check_devices(config, jax.device_count())
  with config.unlocked():
    config.data.train_images = count = data.num_images(config.data, 'train')
  kinds = [] if config.data.name == 'digits' else ['read and decoded']
  if count * math.prod(config.data.image_shape) <= tfds.CACHE_BYTES:
    kinds.append('from memory')
  devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores'
  print(f'{config.name}: {count:,} images, to {devices}\n')
  print('| images | image | batch size | images/s |\n|---|---|---|---|')
  shape, size = 'x'.join(map(str, config.data.image_shape)), config.train.batch_size
  cache_bytes = tfds.CACHE_BYTES
  for kind in kinds:
    warm = kind == 'from memory'
    tfds.CACHE_BYTES = cache_bytes if warm else 0
    speed = measure(config, values.repeats, values.seconds, warm)
    print(f'| {kind} | {shape} | {size} | {speed} |', flush=True)


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'Whose data and train.batch_size.')
  flags.DEFINE_integer('repeats', 5, 'Timed parts.', lower_bound=1)
  flags.DEFINE_float('seconds', 3.0, 'The least that a part takes.')
  app.run(main)
