"""The one sentence of every refused value."""

import contextlib
from collections.abc import Iterator
from typing import Any


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


@contextlib.contextmanager
def within(block: str) -> Iterator[None]:
  """Puts `block.` before the message of a ValueError, which names a function's argument alone."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{block}.{error}') from error
