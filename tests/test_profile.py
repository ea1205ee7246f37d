"""config.profile: which steps are traced, and what is refused."""

import jax
import jax.numpy as jnp
import pytest
from vdm.configs import digits

from vdm.system import profile


def profile_steps(config):
  return profile.steps(config.profile, config.train.num_steps)


def config_of(first_step, num_steps):
  config = digits.get_config('debug')  # of 4 steps
  config.profile.update(first_step=first_step, num_steps=num_steps)
  return config


@pytest.mark.parametrize(
  'first, number, message',
  [
    (1, -1, 'config.profile.num_steps=-1 must be at least 0'),
    (0, 2, 'config.profile.first_step=0 must be at least 1'),
    (4, 2, 'config.profile.first_step=4 must be at most 3, for 2 steps up to config.train.num_st'),
  ],
)
def test_steps_that_the_run_does_not_have_are_refused(first, number, message):
  with pytest.raises(ValueError, match=message):
    profile_steps(config_of(first, number))


def test_no_steps_is_the_default_whatever_the_first():
  assert not profile_steps(digits.get_config('debug'))
  assert list(profile_steps(config_of(2, 3))) == [2, 3, 4]


def run(chosen, start, stop, workdir):
  """Steps start + 1 .. stop of a counter; returns what they gave."""
  step = profile.traced(
    jax.jit(lambda state, batch: (state + batch, state)), chosen, start, workdir
  )
  state = jnp.float32(0)
  for number in range(start + 1, stop + 1):
    state, before = step(state, jnp.float32(number))
  return float(state), float(before)


def test_the_chosen_steps_and_no_others_are_in_the_trace(tmp_path):
  assert run(range(3, 5), 1, 6, tmp_path) == (2 + 3 + 4 + 5 + 6, 2 + 3 + 4 + 5)
  (file,) = tmp_path.glob('profile/plugins/profile/*/*.xplane.pb')
  assert file.parent.name == 'steps_3_to_4'
  data = jax.profiler.ProfileData.from_file(str(file))
  events = [event for plane in data.planes for line in plane.lines for event in line.events]
  found = {dict(event.stats)['step_num'] for event in events if event.name == 'train'}
  assert found == {3, 4}


def test_steps_before_the_start_of_this_run_are_said_to_be_missed(tmp_path, caplog):
  run(range(3, 5), 3, 6, tmp_path)
  assert 'config.profile.first_step=3 is not traced: the run goes on at 4' in caplog.text
  assert not (tmp_path / 'profile').exists()
