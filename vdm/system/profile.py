"""A trace of some training steps, to be looked at with XProf or TensorBoard."""

import itertools
import os
from collections.abc import Callable

import jax
from absl import logging
from ml_collections import ConfigDict

from vdm.errors import require

FOLDER = 'profile'


def steps(settings: ConfigDict, num_steps: int) -> range:
  """Returns the steps that are to be traced.

  Args:
    settings: config.profile.
    num_steps: config.train.num_steps.

  Raises:
    ValueError: the run does not have these steps.
  """
  first, number = settings.first_step, settings.num_steps
  require(number >= 0, 'config.profile.num_steps', number, 'at least 0', 'try 5, or 0 for no trace')
  require(first >= 1, 'config.profile.first_step', first, 'at least 1', 'try 10')
  last = num_steps - number + 1
  require(
    not number or first <= last,
    'config.profile.first_step',
    first,
    f'at most {last}, for {number} steps up to config.train.num_steps={num_steps}',
    'choose an earlier one, or fewer steps',
  )
  return range(first, first + number)


def traced(step: Callable, chosen: range, start: int, workdir: os.PathLike) -> Callable:
  """Returns `step`, whose calls are the steps from start + 1 on, with the chosen ones traced.

  Every process writes its own trace into `workdir`/profile, all under one name. The devices are
  idle when it begins and when it ends, so that it holds these steps whole, and no other.
  """
  if not chosen:
    return step
  if chosen[0] <= start:
    logging.warning(
      'config.profile.first_step=%d is not traced: the run goes on at %d.', chosen[0], start + 1
    )
    return step
  numbers = itertools.count(start + 1)

  def traced_step(train_state, batch):
    number = next(numbers)
    if number == chosen[0]:
      jax.block_until_ready(train_state)
      options = jax.profiler.ProfileOptions()
      options.session_id = f'steps_{chosen[0]}_to_{chosen[-1]}'
      jax.profiler.start_trace(workdir / FOLDER, profiler_options=options)
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      result = step(train_state, batch)
    if number == chosen[-1]:
      jax.block_until_ready(result)
      jax.profiler.stop_trace()
      logging.info('steps %d to %d are traced: %s', chosen[0], number, workdir / FOLDER)
    return result

  return traced_step
