"""The Haar transform as a change of variables, and the data sets that it makes."""

import math

import numpy as np
import pytest
from vdm.configs import default, digits

import vdm
from benchmarks import cascade
from vdm import data
from vdm.data import gaussian_field
from vdm.data.wavelet import haar, unhaar

BLOCK = np.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)


def by_matrices(image):
  """The transform of one image [*spatial C] by Kronecker products over its blocks of two."""
  axes = image.ndim - 1
  for axis in range(axes):
    matrix = np.kron(np.eye(image.shape[axis] // 2), BLOCK)
    image = np.moveaxis(np.tensordot(matrix, image, (1, axis)), 0, axis)
  return image  # even positions hold sums, odd ones differences


@pytest.mark.parametrize('shape', [(8, 2), (4, 6, 3), (4, 2, 6, 1)])
def test_it_is_orthonormal_in_one_to_three_axes(shape):
  images = np.random.RandomState(0).standard_normal((5, *shape))
  coarse, details = haar(images)
  small, axes = tuple(n // 2 for n in shape[:-1]), len(shape) - 1
  assert coarse.shape == (5, *small, shape[-1])
  assert details.shape == (5, *small, (2**axes - 1) * shape[-1])
  np.testing.assert_allclose(unhaar(coarse, details), images, atol=1e-12)
  np.testing.assert_allclose((coarse**2).sum() + (details**2).sum(), (images**2).sum())
  other = by_matrices(images[0])
  even = (slice(0, None, 2),) * axes
  np.testing.assert_allclose(coarse[0], other[even], atol=1e-12)
  values = np.concatenate([coarse[0].ravel(), details[0].ravel()])
  np.testing.assert_allclose(np.sort(values), np.sort(other.ravel()), atol=1e-12)


def covariance_of_a_field(shape):
  field = gaussian_field.GaussianField(shape, exponent=-2.0, std=1.0)
  unit = np.eye(math.prod(shape)).reshape(-1, *shape)
  modes = np.fft.fftn(unit, axes=range(1, unit.ndim), norm='ortho') * field.power
  back = np.fft.ifftn(modes, axes=range(1, unit.ndim), norm='ortho').real
  return back.reshape(len(unit), -1)


def bound(covariance, log_snrs):
  """The bound, in nats, of a Gaussian with its exact denoiser, by quadrature over log-SNR.

  Prior KL + 1/2 int tr(S (1 + SNR S)^-1) dSNR + reconstruction, each an expectation over the data.
  """
  variances = np.linalg.eigvalsh(covariance)
  snr = np.exp(log_snrs)
  error = (variances / (1 + snr[:, None] * variances)).sum(axis=1)
  diffusion = 0.5 * np.trapezoid(error * snr, log_snrs)
  least, most = snr[0], snr[-1]
  alpha2, sigma2 = least / (1 + least), 1 / (1 + least)
  prior = 0.5 * (alpha2 * variances + sigma2 - 1 - np.log(sigma2)).sum()
  recon = 0.5 * len(variances) * (1 + math.log(2 * math.pi / most))
  return prior + diffusion + recon


@pytest.mark.parametrize('shape', [(16,), (8, 8), (8, 4, 8)])
def test_the_bounds_of_the_scales_add_up_to_that_of_the_pixels(shape):
  """Coarse twice, details given it, details given that: each a Gaussian of its own."""
  covariance, size = covariance_of_a_field(shape), math.prod(shape)
  log_snrs, scales, alone = np.linspace(-20, 24, 8001), [], []
  pixels = np.eye(size).reshape(size, *shape, 1)
  for _ in range(2):
    coarse, details = haar(pixels)
    c, d = coarse.reshape(size, -1).T, details.reshape(size, -1).T
    cc, dc, dd = c @ covariance @ c.T, d @ covariance @ c.T, d @ covariance @ d.T
    scales.append(dd - dc @ np.linalg.solve(cc, dc.T))
    alone.append(dd)
    pixels = coarse
  total = sum(bound(part, log_snrs) for part in [*scales, cc])
  np.testing.assert_allclose(total / size, bound(covariance, log_snrs) / size, atol=1e-5)
  assert bound(alone[0], log_snrs) > bound(scales[0], log_snrs) + 0.1  # without the condition


def data_of(derive, **leaves):
  config = default.get_config().data.copy_and_resolve_references().unlock()
  config.update(dict(derive=derive, num_values=0, dequantize=17, num_classes=0) | leaves)
  return config


DETAILS = dict(derive='haar_details', image_shape=(4, 4, 3), condition_shape=(4, 4, 1))
COARSE = dict(derive='haar_coarse', image_shape=(2, 2, 1), level=2)


def test_the_stages_of_a_cascade_have_the_same_noise():
  """Undone from the coarsest on, they are the pixels and a noise in [0, 1), another each visit."""
  finest = data.load(data_of(**DETAILS), 'train')
  between = data.load(
    data_of(**DETAILS | dict(image_shape=(2, 2, 3), condition_shape=(2, 2, 1), level=2)), 'train'
  )
  coarsest = data.load(data_of(**COARSE), 'train')
  pixels = data.load(default.get_config().data, 'train')
  noises = []
  for visit in (0, 3):
    index = np.array([0, 7, 1436])
    fetch = lambda source, visit=visit, index=index: source.fetch(index + visit * len(source))
    coarse = fetch(coarsest)['image']
    np.testing.assert_allclose(coarse, fetch(between)['condition'], rtol=1e-6)
    middle = unhaar(coarse, fetch(between)['image'])
    np.testing.assert_allclose(middle, fetch(finest)['condition'], rtol=1e-5)
    noises.append(unhaar(middle, fetch(finest)['image']) - pixels.fetch(index)['image'])
    assert noises[-1].min() > -1e-4 and noises[-1].max() < 1 + 1e-4
    assert abs(noises[-1].mean() - 0.5) < 0.1
  assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.3
  evaluated = data.load(data_of(**DETAILS), 'eval').fetch(np.arange(2))
  assert not np.array_equal(evaluated['image'], finest.fetch(np.arange(2))['image'])


def test_every_epoch_of_training_has_noise_of_its_own():
  source = data.load(data_of(**COARSE), 'train')
  settings = dict(batch_size=1437, seed=0, start_step=0, process_index=0, process_count=1)
  batches = data.train_batches(source, **settings)
  first, second = (np.sort(next(batches)['image'].sum(axis=(1, 2, 3))) for _ in range(2))
  assert np.abs(first - second).max() > 1e-3  # the same images in another order are not the same
  later = data.train_batches(source, **settings | dict(start_step=1))
  np.testing.assert_array_equal(np.sort(next(later)['image'].sum(axis=(1, 2, 3))), second)


def test_real_values_get_no_noise():
  leaves = dict(name='gaussian_field', dequantize=0, train_images=4, eval_images=4)
  leaves |= dict(image_shape=(8, 8, 3), condition_shape=(8, 8, 1))
  batch = data.load(data_of('haar_details', **leaves), 'eval').fetch(np.arange(4))
  plain = dict(derive='', image_shape=(16, 16, 1), condition_shape=())
  pixels = data.load(data_of(**leaves | plain), 'eval').fetch(np.arange(4))['image']
  np.testing.assert_allclose(unhaar(batch['condition'], batch['image']), pixels, atol=1e-5)


@pytest.mark.parametrize(
  ('leaves', 'message'),
  [
    (DETAILS | dict(level=0), r'config\.data\.level=0 must be at least 1'),
    (DETAILS | dict(num_values=17), r'num_values=17 must be 0, for coefficients are real'),
    (DETAILS | dict(image_shape=(4, 4, 1)), r'image_shape=\(4, 4, 1\) must be of channels that'),
    (DETAILS | dict(condition_shape=()), r'condition_shape=\(\) must be \(4, 4, 1\) with'),
    (
      COARSE | dict(level=1),
      r'level=1, of the pixels: .*shape=\(4, 4, 1\) but digits.* has \(8, 8, 1\)',
    ),
    (COARSE | dict(masked=True), r'masked=True must be False'),
    (COARSE | dict(dequantize=0), r'dequantize=0 must be their number of values'),
    (COARSE | dict(dequantize=12), r'of the pixels: .*num_values=12 but digits.* has values up to'),
  ],
)
def test_what_does_not_fit_is_refused(leaves, message):
  with pytest.raises(ValueError, match=message):
    data.load(data_of(**leaves), 'train')


@pytest.fixture
def stages():
  """Both stages of the digits, untrained."""
  made = []
  for leaves in (DETAILS, COARSE | dict(image_shape=(4, 4, 1), level=1)):
    config = digits.get_config('debug')
    with config.unlocked():
      config.data = data_of(**leaves)
      config.decoder.name = 'normal'
    exp = vdm.Experiment(config)
    made.append((exp, exp.init()))
  return made


def test_a_cascade_is_bounded_and_drawn_stage_by_stage(stages):
  ordered = cascade.in_order(stages)
  assert [exp.config.data.derive for exp, _ in ordered] == ['haar_coarse', 'haar_details']
  rows = cascade.bound(ordered, draws=2, max_images=8)
  assert [row[:2] for row in rows] == [('haar_coarse 1', 16), ('haar_details 1', 48)]
  for (exp, state), (*_, value, stderr) in zip(ordered, rows, strict=True):
    result = exp.bits_per_dim(state, draws=2, max_images=8)
    assert (value, stderr) == (result.value, result.stderr)
  images = cascade.sample(ordered, 3)
  assert images.shape == (3, 8, 8, 1) and np.isfinite(images).all()
  coarse, _ = haar(images)  # the details leave the coarse half as it is
  np.testing.assert_allclose(coarse, ordered[0][0].sample(ordered[0][1], 3), atol=1e-3)


def test_samples_of_integers_with_noise_and_of_real_values_are_bytes():
  drawn = np.array([-0.5, 0.4, 1.9, 15.2, 99.0])
  np.testing.assert_array_equal(cascade.as_bytes(drawn, 16), [0, 0, 17, 255, 255])
  np.testing.assert_array_equal(cascade.as_bytes(np.array([-2.0, 0.0, 2.0]), 0), [0, 127, 255])


def test_stages_by_class_and_without_are_no_cascade(stages):
  (exp, state), other = stages
  by_class = vdm.Experiment(exp.config, {'model.class_conditional': True, 'data.num_classes': 10})
  with pytest.raises(ValueError, match=r'alike in data\.name.* and model\.class_conditional'):
    cascade.in_order([(by_class, state), other])


def test_stages_that_are_no_cascade_are_refused(stages):
  with pytest.raises(ValueError, match=r"must be the stages .*coarse', 1.*haar_details', 1"):
    cascade.in_order(stages[:1])
