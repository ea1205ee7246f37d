"""Images/s of every sampler and of FID's features, beside torch-fidelity's: two Markdown tables.

  python -m benchmarks.throughput --config=configs/fashion_mnist_uvit.py
  python -m benchmarks.throughput --config=configs/fashion_mnist_uvit.py --features_images=16
  python -m benchmarks.throughput --config=configs/digits.py --samplers= --features_images=16

Samplers run on random parameters, --num_steps steps, one batch after another on all devices, as
--mode=sample does. Features are Inception's with random weights, of the same uint8 images on the
same devices; torch-fidelity's column is empty without `pip install -e '.[parity]'`. After one call
that compiles, every figure is the median of --repeats, with the least and the greatest.
"""

import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from benchmarks import fid_parity
from vdm import build
from vdm.diffusion.samplers import SAMPLERS, num_evaluations
from vdm.fid import weights
from vdm.sampling.draw import make_sampler
from vdm.system import hosts, parallel

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Whose network and sample batch.')
_SAMPLERS = flags.DEFINE_list('samplers', list(SAMPLERS), 'Of the first table; empty: no table.')
_NUM_STEPS = flags.DEFINE_integer('num_steps', 8, 'Of every sampler.')
_REPEATS = flags.DEFINE_integer('repeats', 3, 'Timed calls.')
_FEATURES_IMAGES = flags.DEFINE_integer('features_images', 0, 'A batch for features; 0: no table.')
SIZES = ((32, 32), (64, 64), (299, 299))


def rate(call: Callable[[], object], count: int, repeats: int) -> str:
  """Images/s of a call that makes `count`: median (least to greatest)."""
  call()
  rates = []
  for _ in range(repeats):
    start = time.perf_counter()
    call()
    rates.append(count / (time.perf_counter() - start))
  median, low, high = (f'{r:.0f}' if r >= 1000 else f'{r:.3g}' for r in _span(rates))
  return f'{median} ({low} to {high})'


def _span(values: list[float]) -> tuple[float, float, float]:
  return statistics.median(values), min(values), max(values)


def samplers(config: ConfigDict, names: list[str], num_steps: int, repeats: int):
  """Prints the table of samplers."""
  print('| sampler | steps | evaluations an image | images/s |\n|---|---|---|---|')
  mesh, count = parallel.make_mesh(), config.sample.batch_size
  for name in names:
    with config.unlocked():
      config.sample.sampler = ConfigDict(dict(name=name))
      config.sample.update(num_steps=num_steps, denoise_last=False)
    model = build.model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    run = make_sampler(config, model, mesh)
    speed = rate(lambda run=run, params=params: list(run(params, count)), count, repeats)
    evaluations = num_evaluations(build.sampler(config.sample.sampler), num_steps, False)
    print(f'| {name} | {num_steps} | {evaluations} | {speed} |', flush=True)


def features(count: int, repeats: int):
  """Prints the table of Inception's features."""
  print('| size | features, images/s | torch-fidelity |\n|---|---|---|')
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'random.pth'
    run_theirs = torch_fidelity(path)
    if run_theirs is None:
      random = np.random.default_rng(0)
      values = {n: random.normal(0, 0.02, s).astype('f') for n, s in weights.shapes().items()}
      weights.write(path.with_suffix('.npz'), values, {'name': 'random'})
    for height, width in SIZES:
      images = fid_parity.smooth_noise(0, count, (height, width), 20)
      ours = fid_parity.extractor(path, (height, width))
      calls = [ours] if run_theirs is None else [ours, run_theirs]
      speeds = [rate(lambda f=f, images=images: f(images), count, repeats) for f in calls]
      print(f'| {height}x{width} | {" | ".join([*speeds, ""][:2])} |', flush=True)


def torch_fidelity(path: pathlib.Path) -> Callable[[np.ndarray], list[np.ndarray]] | None:
  """torch-fidelity's network, with random weights that it writes to `path`; None without it."""
  try:
    torch, _ = fid_parity.import_torch_fidelity()
  except ModuleNotFoundError:
    return None
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  fid_parity.random_weights(path, torch)
  device = 'cuda' if torch.cuda.is_available() and jax.default_backend() == 'gpu' else 'cpu'
  network = FeatureExtractorInceptionV3('theirs', ['2048', 'logits_unbiased'], str(path))
  network = network.to(device)

  def run(images):
    with torch.no_grad():
      tensor = torch.tensor(images).permute(0, 3, 1, 2).to(device)
      return [part.cpu().numpy() for part in network(tensor)]

  return run


def main(_):
  """Prints what was measured, and on what."""
  if _CONFIG.value is None:
    sys.exit('--config is missing; give a file, such as configs/digits.py.')
  hosts.use_cores(functools.partial(build.works_on, _CONFIG.value))
  device = jax.devices()[0].device_kind
  print(f'{jax.device_count()} x {device}, jax {jax.__version__}, numpy {np.__version__}\n')
  if _SAMPLERS.value:
    samplers(_CONFIG.value, _SAMPLERS.value, _NUM_STEPS.value, _REPEATS.value)
    print()
  if _FEATURES_IMAGES.value:
    features(_FEATURES_IMAGES.value, _REPEATS.value)


if __name__ == '__main__':
  app.run(main)
