"""The one sentence of every refused value, and arrays that are no numbers."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import numpy as np


def require(ok: bool, name: str, value: Any, rule: str, remedy: str):
  """Raises ValueError `name=value must be rule; remedy.` unless `ok`.

  Args:
    ok: whether the value is good.
    name: the value's, as the user typed it: 'config.eval.draws', '--step', or an argument.
    value: as it is shown to the user.
    rule: what it must be.
    remedy: what to do about it.
  """
  if not ok:
    raise ValueError(f'{name}={value!r} must be {rule}; {remedy}.')


def confirm(ok: bool, name: str, value: Any, fact: str, remedy: str):
  """Raises ValueError `name=value fact; remedy` unless `ok`: what was found contradicts the value.

  There is no full stop: the remedy often ends in something to type.

  Args:
    ok: whether it agrees.
    name: as in `require`.
    value: as in `require`.
    fact: what was found, such as 'but cifar10 has 10'.
    remedy: as in `require`.
  """
  if not ok:
    raise ValueError(f'{name}={value!r} {fact}; {remedy}')


def native(name: str, value: Any) -> 'np.ndarray':
  """Returns an array of numbers in this machine's byte order; other kinds are refused by `name`."""
  import numpy as np  # here: `import vdm` is to be light

  array = np.asarray(value)
  if array.dtype.name == 'bfloat16':
    return array.astype(np.float32)
  require(array.dtype.kind in 'biuf', name, array.dtype, 'of integers or floats', 'convert it')
  return array.astype(array.dtype.newbyteorder('='), copy=False)


@contextlib.contextmanager
def within(block: str) -> Iterator[None]:
  """Puts `block.` before the message of a ValueError, which names a function's argument alone."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{block}.{error}') from error
