from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from vdm.diffusion.decoders import discrete
from vdm.diffusion.heads import to_prediction
from vdm.diffusion.schedules import SCHEDULES
from vdm.evaluation.pictures import NUM_LEVELS, make_denoise, picture_of
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
