"""Our Inception metrics beside torch-fidelity's, with the same random weights: a Markdown table.

  pip install -e '.[parity]' && python -m benchmarks.fid_parity --num_images=24

The published weights are not needed: both networks get the same random ones, whose batch
normalisation is set by a batch of images, so that activations vary. Two sets of images of every
size, of smooth noise with other means and contrasts, go through both from the uint8 pixels on.
"""

import argparse
import pathlib
import sys
import tempfile
import types
from collections.abc import Iterator

import numpy as np
from vdm.configs import default

from vdm import fid
from vdm.fid import metrics, statistics, weights
from vdm.system import parallel

SIZES = ((32, 32), (64, 64), (299, 299), (40, 56))
NAMES = {  # ours: theirs
  'fid': 'frechet_inception_distance',
  'inception_score': 'inception_score_mean',
  'kid': 'kernel_inception_distance_mean',
  'precision': 'precision',
  'recall': 'recall',
}
# torchvision's wheel registers kernels for operators that a CPU build of torch has no schema of;
# torch-fidelity imports it and calls none of them.
_BOX_OPERATORS = {
  'nms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
  'qnms': '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
  'roi_align': '(Tensor input, Tensor rois) -> Tensor',
  'roi_pool': '(Tensor input, Tensor rois) -> (Tensor, Tensor)',
  'ps_roi_align': '(Tensor input, Tensor rois) -> (Tensor, Tensor)',
  'ps_roi_pool': '(Tensor input, Tensor rois) -> (Tensor, Tensor)',
  'deform_conv2d': '(Tensor input) -> Tensor',
}


def import_torch_fidelity() -> tuple[types.ModuleType, types.ModuleType]:
  """torch and torch_fidelity, on builds of torch without torchvision's operators as well."""
  import torch

  try:
    import torchvision  # noqa: F401
  except RuntimeError:  # operator torchvision::nms does not exist
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
      del sys.modules[name]
    import_torch_fidelity.library = torch.library.Library('torchvision', 'FRAGMENT')
    for name, schema in _BOX_OPERATORS.items():
      for full in (name, f'_{name}_backward'):
        import_torch_fidelity.library.define(full + schema)
  import torch_fidelity

  return torch, torch_fidelity


def smooth_noise(seed: int, count: int, shape: tuple[int, int], contrast: float) -> np.ndarray:
  """Images uint8 [N, H, W, 3]: noise at four scales about a colour of its own."""
  random = np.random.default_rng(seed)
  x = random.normal(0, 30, (count, 1, 1, 3)) + 120
  for cells in (2, 4, 8, 16):
    rows, columns = (np.arange(side) * cells // side for side in shape)
    coarse = random.normal(0, contrast, (count, cells, cells, 3))
    x = x + coarse[:, rows][:, :, columns]
  return np.clip(x, 0, 255).astype(np.uint8)


def random_weights(path: pathlib.Path, torch, seed: int = 0) -> None:
  """Writes a torch-fidelity weights file of random numbers, with activations that vary."""
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  random = np.random.default_rng(seed)
  state, theirs = {}, weights.torch_names()
  for name, shape in weights.shapes().items():
    conv, _, part = name.rpartition('/')
    if part == 'kernel':
      height, width, inputs, outputs = shape
      values = random.normal(0, np.sqrt(2 / (height * width * inputs)), shape)
      norm = f'{theirs[conv]}.bn'
      state[f'{theirs[conv]}.conv.weight'] = values.transpose(3, 2, 0, 1)
      state[f'{norm}.weight'] = random.uniform(0.8, 1.2, outputs)
      state[f'{norm}.bias'] = random.normal(0, 0.3, outputs)
      state[f'{norm}.running_mean'] = np.zeros(outputs)
      state[f'{norm}.running_var'] = np.ones(outputs)
  state['fc.weight'] = random.normal(0, 0.1, (1008, 2048))
  state['fc.bias'] = random.normal(0, 1, 1008)
  state = {name: torch.tensor(np.float32(value)) for name, value in state.items()}
  torch.save(state, path)
  network = FeatureExtractorInceptionV3('random', ['logits'], str(path))
  for module in network.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      module.momentum = 1.0  # the statistics of the one batch
  network.train()
  network(torch.tensor(smooth_noise(seed, 4, (64, 64), 20)).permute(0, 3, 1, 2))
  torch.save(network.state_dict(), path)


def extractor(path: pathlib.Path, shape: tuple[int, int]) -> fid.Extractor:
  """Ours, with the weights of a torch file; they are converted on the way."""
  converted = path.with_suffix('.npz')
  if not converted.exists():
    weights.convert(str(path), str(converted), allow_unknown=True)
  config = default.get_config()
  config.data.num_values = 256
  config.fid.update(features='inception', weights=str(converted), allow_few=True)
  return fid.make(config.fid, config.data, parallel.make_mesh(), (*shape, 3))


def collect(images: np.ndarray, ours: fid.Extractor, batch_size: int) -> fid.Collected:
  """Our statistics and features of images."""
  return fid.collect(ours, fid.batches_of([images], ours, batch_size), keep=len(images))


def their_features(images: np.ndarray, path: pathlib.Path, torch) -> dict[str, np.ndarray]:
  """torch-fidelity's features and logits; the spatial ones from within its network."""
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  network = FeatureExtractorInceptionV3('theirs', ['2048', 'logits_unbiased'], str(path))
  caught = []
  network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: caught.append(call[2]))
  with torch.no_grad():
    features, logits = network(torch.tensor(images).permute(0, 3, 1, 2))
  spatial = caught[0][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)
  parts = {'features': features, 'spatial': spatial, 'logits': logits}
  return {name: value.numpy() for name, value in parts.items()}


def their_metrics(
  samples, real, path: pathlib.Path, torch, torch_fidelity, with_fid: bool
) -> dict[str, float]:
  """torch-fidelity's metrics by its front door, under our names; its FID takes 25 s of CPU."""

  class Images(torch.utils.data.Dataset):
    def __init__(self, images):
      self.images = torch.tensor(images).permute(0, 3, 1, 2)

    def __len__(self):
      return len(self.images)

    def __getitem__(self, index):
      return self.images[index]

  found = torch_fidelity.calculate_metrics(
    input1=Images(samples),
    input2=Images(real),
    feature_extractor='inception-v3-compat',  # its own default for precision and recall is VGG
    feature_extractor_weights_path=str(path),
    cuda=False,
    isc=True,
    isc_splits=len(samples) // 4,
    fid=with_fid,
    kid=True,
    prc=True,
    kid_subset_size=len(samples) // 2,
    kid_subsets=10,
    cache=False,
    verbose=False,
    save_cpu_ram=True,  # no worker processes
  )
  return {name: found[other] for name, other in NAMES.items() if other in found}


def our_metrics(samples: fid.Collected, real: fid.Collected, with_fid: bool) -> dict[str, float]:
  """Ours, of features already there; splits and subsets as `their_metrics` asks for."""
  x, y = samples.rows['features'], real.rows['features']
  pairs = [metrics.distances(*pair) for pair in ((x, x), (y, y), (x, y))]
  precision, recall = metrics.precision_recall(*pairs)
  found = {
    'inception_score': metrics.inception_score(samples.rows['logits'], splits=len(x) // 4)[0],
    'kid': metrics.kid(x, y, subsets=10, subset_size=len(x) // 2)[0],
    'precision': precision,
    'recall': recall,
  }
  if with_fid:
    fitted = [statistics.finish(part.statistics['features']) for part in (samples, real)]
    found['fid'] = fid.frechet_distance(*fitted)
  return found


def rows(
  num_images: int, sizes=SIZES, fid_sizes=SIZES
) -> Iterator[tuple[tuple[int, int], str, float, float]]:
  """(size, name, ours, theirs) for every metric; for features, the greatest relative difference."""
  torch, torch_fidelity = import_torch_fidelity()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'random.pth'
    random_weights(path, torch)
    for size in sizes:
      samples = smooth_noise(1, num_images, size, 20)
      real = smooth_noise(2, num_images, size, 24)
      ours = extractor(path, size)
      found = [collect(images, ours, num_images) for images in (samples, real)]
      theirs = their_features(samples[:2], path, torch)
      for name, value in theirs.items():
        error = np.abs(found[0].rows[name][:2] - value).max() / np.abs(value).max()
        yield size, name, float(error), 0.0
      with_fid = size in fid_sizes
      want = their_metrics(samples, real, path, torch, torch_fidelity, with_fid)
      for name, value in our_metrics(*found, with_fid).items():
        yield size, name, value, want[name]


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num_images', type=int, default=24)
  num_images = parser.parse_args().num_images
  print(
    f'| size | quantity ({num_images} + {num_images} images) | ours | torch-fidelity | relative |'
  )
  print('|---|---|---|---|---|')
  for (height, width), name, ours, theirs in rows(num_images):
    if name in NAMES:
      relative = abs(ours - theirs) / max(abs(theirs), 1e-30)
      cells = [f'{ours:.7g}', f'{theirs:.7g}', f'{relative:.1e}']
    else:
      cells = ['', '', f'{ours:.1e}']
    print(f'| {height}x{width} | {" | ".join([name, *cells])} |', flush=True)


if __name__ == '__main__':
  main()
