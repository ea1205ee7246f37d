"""Where metrics and pictures of a run go: TensorBoard's files.

The writer is clu's where TensorFlow is installed, and else one of TensorBoard alone, with the same
methods and tags.
"""

import io
import itertools
import os
import socket
import struct
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath
from PIL import Image

from vdm.system import files, packages

LONGEST_SCALARS = 2**16  # bytes of a record of scalars, at most


class MetricWriter(Protocol):
  """Declares the part of `clu.metric_writers.MetricWriter` that is used here."""

  def write_scalars(self, step: int, scalars: dict[str, float]):
    """Writes the value of each tag at `step`."""

  def write_images(self, step: int, images: dict[str, np.ndarray]):
    """Writes the images uint8 [N H W C], C = 1 or 3, of each tag at `step`."""

  def close(self):
    """Writes what is left, and ends."""


def open_writer(
  directory: os.PathLike,
  start: int = 0,
  silent: bool = False,
  describe: Callable[[str], str] = lambda tag: '',
  texts: Mapping[str, str] = types.MappingProxyType({}),
  hparams: Mapping[str, Any] = types.MappingProxyType({}),
) -> MetricWriter:
  """Returns a writer to TensorBoard files in `directory`.

  A run that goes on after step `start` writes the later ones again: what an interrupted process had
  written of them is withdrawn.

  Args:
    directory: of the files.
    start: the newest step that the run has.
    silent: whether to write nothing.
    describe: returns what a scalar is, by its tag.
    texts: Markdown about the run, by tag.
    hparams: the run's hyperparameters, plain values, by which TensorBoard compares it with others.
  """
  if silent:
    return SilentWriter()
  _start_session(directory, start, texts, hparams)
  if not packages.has_tensorflow():
    return EventWriter(directory, describe)
  return CluWriter(directory, describe)


def _start_session(directory, start, texts, hparams):
  """Tells TensorBoard that a session begins after step `start`, and what its run is.

  At any but the first session it drops what it has of later steps. The file is written as a whole:
  what follows TensorBoard's writers, as W&B does, would take a second one for another source.
  """
  from tensorboard.compat.proto import event_pb2
  from tensorboard.plugins.hparams.summary_v2 import hparams_pb
  from tensorboard.plugins.text.summary_v2 import text_pb
  from tensorboard.summary.writer.record_writer import RecordWriter

  now, log = time.time(), event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  summaries = [*(text_pb(tag, text) for tag, text in texts.items()), hparams_pb(dict(hparams))]
  events = [dict(file_version='brain.Event:2'), dict(step=start + 1, session_log=log)]
  events += [dict(step=start, summary=summary) for summary in summaries]
  file = io.BytesIO()
  for event in events:
    RecordWriter(file).write(event_pb2.Event(wall_time=now, **event).SerializeToString())
  # in the order of names it comes before the writers' own, which go on behind the process
  name = f'events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}'
  files.write(epath.Path(directory) / name, file.getvalue())


class SilentWriter:
  """Writes nothing: for all processes of a job but the first."""

  def write_scalars(self, step, scalars):
    """Writes nothing."""

  def write_images(self, step, images):
    """Writes nothing."""

  def close(self):
    """Closes nothing."""


class CluWriter:
  """Writes by clu's writer, which imports TensorFlow as a whole, and has a thread of its own."""

  def __init__(self, directory: os.PathLike, describe: Callable[[str], str] = lambda tag: ''):
    packages.require_tensorflow("clu's metric writer")
    from clu import metric_writers

    writer = metric_writers.SummaryWriter(str(directory))
    self._writer, self._describe = metric_writers.AsyncMultiWriter([writer]), describe

  def write_scalars(self, step, scalars):
    """Writes the value of each tag at `step`, with what the tag is."""
    from tensorboard.plugins.scalar.metadata import create_summary_metadata

    # clu's write_scalars has no descriptions
    values = {tag: np.float32(value) for tag, value in scalars.items()}
    kinds = {tag: create_summary_metadata(None, self._describe(tag)) for tag in scalars}
    self._writer.write_summaries(step, values, kinds)

  def write_images(self, step, images):
    """Writes the images uint8 [N H W C], C = 1 or 3, of each tag at `step`."""
    self._writer.write_images(step, images)

  def close(self):
    """Writes what is left, and ends."""
    self._writer.close()


class EventWriter:
  """Writes by TensorBoard's own writer of event files, which has a thread of its own."""

  def __init__(self, directory: os.PathLike, describe: Callable[[str], str] = lambda tag: ''):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    self._writer, self._describe = EventFileWriter(str(directory)), describe

  def write_scalars(self, step, scalars):
    """Writes the value of each tag at `step`, with what the tag is."""
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    described = ((tag, float(value), self._describe(tag)) for tag, value in scalars.items())
    self._add(step, [scalar_pb(*facts).value[0] for facts in described])

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


def read_scalars(directory: os.PathLike | str) -> tuple[dict[str, dict[int, float]], list[str]]:
  """Returns {tag: {step: value}} of the scalars in TensorBoard files, and a line per damaged file.

  As TensorBoard does, it drops what an interrupted process had written of steps that another took
  again, and of a damaged file reads what lies before the damage. It imports no TensorFlow.
  """
  found: dict[str, dict[int, float]] = {}
  damaged = []
  for path in sorted(epath.Path(directory).glob('*tfevents*')):
    try:
      with files.reading(path, 'its curves end there'):
        _collect(path, found)
    except files.Damaged as error:
      damaged.append(str(error))
  return {tag: dict(sorted(values.items())) for tag, values in found.items() if values}, damaged


def _collect(path, found):
  """Adds the scalars of a file to {tag: {step: value}}."""
  from tensorboard.compat.proto import event_pb2, types_pb2
  from tensorboard.util.tensor_util import make_ndarray

  for record in _records(path):
    event = event_pb2.Event.FromString(record)
    if event.session_log.status == event_pb2.SessionLog.START:
      for values in found.values():
        for step in [step for step in values if step >= event.step]:
          del values[step]
    for value in event.summary.value:
      tensor = value.tensor
      if tensor.dtype == types_pb2.DT_FLOAT and not tensor.tensor_shape.dim:
        found.setdefault(value.tag, {})[event.step] = float(make_ndarray(tensor))


def _records(path) -> Iterator[bytes]:
  """Yields the records of a TFRecord file but for long ones, which are pictures, and are not read.

  The end may be half of one: it is being written. Raises ValueError at one that is not as written.
  """
  from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

  def checked(part, check, number):
    if struct.pack('<I', masked_crc32c(part)) != check:
      raise ValueError(f'damaged after {number} records')
    return part

  with epath.Path(path).open('rb') as file:
    for number in itertools.count():
      head = file.read(12)  # the length, and its check
      if len(head) < 12:
        return
      (length,) = struct.unpack('<Q', checked(head[:8], head[8:], number))
      if length > LONGEST_SCALARS:
        file.seek(length + 4, os.SEEK_CUR)
        continue
      record = file.read(length + 4)
      if len(record) < length + 4:
        return
      yield checked(record[:length], record[length:], number)
