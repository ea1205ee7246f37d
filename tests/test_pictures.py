from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from vdm.diffusion.decoders import discrete
from vdm.diffusion.heads import to_prediction
from vdm.diffusion.schedules import SCHEDULES
from vdm.evaluation.pictures import NUM_LEVELS, make_denoise, make_path, picture_of
from vdm.system import parallel


def test_columns_go_from_data_to_noise():
  """An oracle that knows x = 0.5: z tends to the data on the left, x_hat is right everywhere."""
  schedule = SCHEDULES['linear'](log_snr_min=-8.0, log_snr_max=12.0)
  level = 2 * (96 + 0.5) / 128 - 1  # of the value 96 of 128

  def denoise(z, log_snr):
    return to_prediction('x', jnp.full_like(z, level), z, log_snr)

  model = SimpleNamespace(
    schedule=lambda *_: schedule,
    denoiser=lambda params, given: denoise,
    image_shape=(4, 6, 1),
    multivariate=False,
    decoder=discrete(128),
  )
  images = np.full((3, 4, 6, 1), 96, np.uint8)
  compute = make_denoise(model, parallel.make_mesh())
  levels, z, x_hat = map(np.asarray, compute({}, {'image': images, 'label': np.zeros(3, np.int32)}))
  np.testing.assert_allclose(levels, np.linspace(12, -8, NUM_LEVELS), rtol=1e-5)
  np.testing.assert_allclose(z[0], level, atol=0.02)
  np.testing.assert_allclose(z[-1].std(), 1, atol=0.2)
  picture = picture_of(z, x_hat, discrete(128))
  assert picture.shape == (3 * 2 * NUM_LEVELS, 4, 6, 1)
  rows = picture.reshape(3, 2, NUM_LEVELS, 4, 6, 1)
  assert np.all(rows[:, 1] == 96)  # x_hat, at every level, under ...
  assert np.all(np.abs(rows[:, 0, 0] - 96) <= 2) and rows[:, 0, -1].std() > 20  # ... z


@pytest.mark.parametrize('multivariate', [False, True])
def test_the_path_is_the_training_schedule(multivariate):
  """A schedule [B 2] that each example has one of is shown as the mean over the examples."""

  def training_schedule(params, adaptive, conditions):
    slope = 1.0 + conditions['label'][:, None] * jnp.array([[1.0, 3.0]])  # [B 2]
    if multivariate:
      return lambda t: params - adaptive * slope * t[:, None]
    return lambda t: params - adaptive * t

  model = SimpleNamespace(training_schedule=training_schedule, multivariate=multivariate)
  batch = {'image': np.zeros((2, 2), np.uint8), 'label': np.array([0, 1], np.int32)}
  path = make_path(model, parallel.make_mesh())(jnp.float32(8), jnp.float32(2), batch)
  t = np.linspace(0, 1, 101)
  expected = 8 - 2 * t[:, None] * np.array([1.5, 2.5]) if multivariate else 8 - 2 * t
  np.testing.assert_allclose(path, expected, atol=1e-5)
