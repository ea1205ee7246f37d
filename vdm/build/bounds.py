"""Looks at every example that is read, where the decoder knows bounds of the data."""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vdm.errors import require


def within_bounds(settings: ConfigDict, source: Any) -> Any:
  """Returns a source that refuses examples beyond the bounds of config.decoder.

  Args:
    settings: config.decoder.
    source: `vdm.data.Source`; it is returned as it is, unless the decoder has bounds.

  Raises:
    ValueError: what is known of its values lies beyond them.
  """
  if settings.name != 'censored':
    return source
  low, high = map(np.float32, (settings.low, settings.high))

  def check(least, most):
    rule = f'that of all values, and there are {least:g} to {most:g}'
    remedy = 'give the bounds of the quantity itself'
    require(low <= least, 'config.decoder.low', settings.low, rule, remedy)
    require(most <= high, 'config.decoder.high', settings.high, rule, remedy)

  def fetch(indices):
    batch = source.fetch(indices)
    image = batch['image']
    if 'valid' in batch:
      image = image[np.broadcast_to(batch['valid'], image.shape)]
    check(image.min(), image.max())
    return batch

  known = source.identity
  if 'value_min' in known and not known.get('masked'):  # else zeros that do not count are in it
    check(known['value_min'], known['value_max'])
  return dataclasses.replace(source, fetch=fetch)
