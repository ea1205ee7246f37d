"""What TensorBoard is told of a scalar."""

import pytest

from vdm.training.tags import describe


@pytest.mark.parametrize(
  ('tag', 'says'),
  [
    ('train/bits_per_dim', 'variational bound in bits'),
    ('eval/halflife_5e+06_nats_per_dim', 'Of halflife_5e+06 parameters.'),
    ('eval/std_0.1_ode_bits_per_dim', 'probability-flow ODE'),
    ('eval/ema_recon_npd', 'least noisy'),
    ('eval/kd_classifier', 'As KID, of features of the network that is named'),
    ('eval/fd_classifier', 'It is no FID.'),
    ('eval/fd_spatial_mine', 'where things are'),
    ('eval/precision', 'are they real?'),
    ('eval/coverage_modes_95', 'holds the truth'),
  ],
)
def test_a_scalar_is_described(tag, says):
  assert says in describe(tag)


@pytest.mark.parametrize('tag', ['loss', 'train/mine', 'eval/ema_', 'eval/coverage_modes_x'])
def test_what_is_not_ours_is_not(tag):
  assert describe(tag) == ''
