"""Where metrics and pictures of a run go: TensorBoard's files.

The writer is clu's where TensorFlow is installed, and else one of TensorBoard alone, with the same
methods and tags.
"""

import io
import os
import time
from typing import Protocol

import numpy as np
from PIL import Image

from vdm.system import packages


class MetricWriter(Protocol):
  """Declares the part of `clu.metric_writers.MetricWriter` that is used here."""

  def write_scalars(self, step: int, scalars: dict[str, float]):
    """Writes the value of each tag at `step`."""

  def write_images(self, step: int, images: dict[str, np.ndarray]):
    """Writes the images uint8 [N H W C], C = 1 or 3, of each tag at `step`."""

  def close(self):
    """Writes what is left, and ends."""


def open_writer(directory: os.PathLike, start: int = 0, silent: bool = False) -> MetricWriter:
  """Returns a writer to TensorBoard files in `directory`; a silent one writes nothing.

  A run that goes on after step `start` writes the later ones again: what an interrupted process had
  written of them is withdrawn.
  """
  if silent:
    return SilentWriter()
  _start_session(directory, start + 1)
  if not packages.has_tensorflow():
    return EventWriter(directory)
  packages.require_tensorflow("clu's metric writer")  # it imports TensorFlow as a whole
  from clu import metric_writers

  return metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(str(directory))])


def _start_session(directory, first):
  """Tells TensorBoard that a session begins at step `first`.

  At any but the first session it drops what it has from that step on.
  """
  from tensorboard.compat.proto import event_pb2
  from tensorboard.summary.writer.event_file_writer import EventFileWriter

  log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  writer = EventFileWriter(str(directory))
  writer.add_event(event_pb2.Event(wall_time=time.time(), step=first, session_log=log))
  writer.close()


class SilentWriter:
  """Writes nothing: for all processes of a job but the first."""

  def write_scalars(self, step, scalars):
    """Writes nothing."""

  def write_images(self, step, images):
    """Writes nothing."""

  def close(self):
    """Closes nothing."""


class EventWriter:
  """Writes by TensorBoard's own writer of event files, which has a thread of its own."""

  def __init__(self, directory: os.PathLike):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    self._writer = EventFileWriter(str(directory))

  def write_scalars(self, step, scalars):
    """Writes the value of each tag at `step`."""
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    self._add(step, [scalar_pb(tag, float(value)).value[0] for tag, value in scalars.items()])

  def write_images(self, step, images):
    """Writes the images uint8 [N H W C], C = 1 or 3, of each tag at `step`."""
    self._add(step, [_image_value(tag, stack) for tag, stack in images.items()])

  def _add(self, step, values):
    from tensorboard.compat.proto import event_pb2, summary_pb2

    summary = summary_pb2.Summary(value=values)
    self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

  def close(self):
    """Writes what is left, and ends."""
    self._writer.close()


def _image_value(tag, stack):
  """Returns TensorBoard's encoding of images: width and height in digits, then each as a PNG."""
  from tensorboard.compat.proto import summary_pb2
  from tensorboard.compat.tensorflow_stub import dtypes
  from tensorboard.plugins.image import metadata
  from tensorboard.util import tensor_util

  _, height, width, channels = stack.shape
  content = [str(width).encode(), str(height).encode()]
  for image in stack:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if channels == 1 else image).save(file, 'PNG')
    content.append(file.getvalue())
  kind = metadata.create_summary_metadata(
    display_name=None, description='', converted_to_tensor=True
  )
  tensor = tensor_util.make_tensor_proto(content, dtype=dtypes.string)
  return summary_pb2.Summary.Value(tag=tag, metadata=kind, tensor=tensor)


def read_scalars(directory: os.PathLike, tag: str) -> dict[int, float]:
  """Returns {step: value} of a scalar in TensorBoard files."""
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.util.tensor_util import make_ndarray

  events = EventAccumulator(str(directory), size_guidance={'tensors': 0})
  events.Reload()
  return {e.step: float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}
