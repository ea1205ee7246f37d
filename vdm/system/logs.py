"""Writes what a person reads while a command runs: one line per event."""

import os
import time

from absl import logging
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

console = Console(stderr=True)
# the whole folder: a checkout called vdm may hold an environment with every other package
_OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), '')


def _ours_or_serious(record) -> bool:
  """Returns whether to show a message; of other packages, only warnings are shown.

  Orbax alone has some thirty lines per save.
  """
  if record.name == 'asyncio' and 'never retrieved' in record.getMessage():
    return False  # tasks of Orbax, of which it raises the first one's error
  serious = record.levelno >= logging.converter.STANDARD_WARNING
  return serious or record.pathname.startswith(_OURS)


class _PlainFormatter(logging.PythonFormatter):
  def format(self, record):
    level = '' if record.levelname == 'INFO' else f'{record.levelname} '
    return f'{time.strftime("%H:%M:%S")} {level}{record.getMessage()}'


def set_up_logging():
  """Logs time and message, one line each; on a terminal they scroll above the progress line."""
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  logger, handler = logging.get_absl_logger(), logging.get_absl_handler()
  if console.is_terminal:
    handler = RichHandler(
      console=console,
      show_path=False,
      show_level=False,
      log_time_format='%H:%M:%S',
      highlighter=NullHighlighter(),
    )
    logger.handlers, logger.propagate = [handler], False
  else:
    handler.setFormatter(_PlainFormatter())
  handler.addFilter(_ours_or_serious)
