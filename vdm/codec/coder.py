"""Images to bytes and back."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdm import build
from vdm.codec import chain, container
from vdm.codec.grid import Grid
from vdm.codec.message import Message
from vdm.codec.shared import DEFAULTS, Settings, Shared, require_shared, share
from vdm.errors import native, require
from vdm.system import files

Tell = Callable[[int, int], None]  # (levels done, of how many)
# (which images, level, z, x_hat): what the network was asked of a group and says, [n *shape]
Watch = Callable[[slice, int, np.ndarray, np.ndarray], None]


class Incomplete(ValueError):
  """Not all of a file can be decoded; it has the images that were, which are those of the sender.

  Attributes:
    images: [n *shape].
    index: their numbers, int [n].
  """

  def __init__(self, text: str, images: np.ndarray, index: np.ndarray):
    """Takes the sentence, and what was recovered."""
    super().__init__(text)
    self.images, self.index = images, index


def compress(
  model: build.Model,
  params: Any,
  images: np.ndarray,
  settings: Settings = DEFAULTS,
  *,
  label: int | np.ndarray | None = None,
  vector: np.ndarray | None = None,
  condition: np.ndarray | None = None,
  mask: np.ndarray | None = None,
  config_hash: str = '',
  tell: Tell | None = None,
  watch: Watch | None = None,
) -> bytes:
  """Returns a file of which `decompress` makes the images, given the same model and conditions.

  Args:
    model: with a discrete decoder.
    params: of the model, such as `build.named_params(state, 'ema')`.
    images: integers [N *spatial C], in the data's units.
    settings: of the code.
    label: classes [N], or one for all. Of these three, None is what stands for none, for a model
      that learned it (config.train.label_dropout).
    vector: conditions [N E].
    condition: fields [N *spatial' Cc].
    mask: [N *spatial 1], nonzero in the dimensions that are coded; the others come back as 0.
    config_hash: of the model's config, if it is known; the receiver's has to agree then.
    tell: is told of progress.
    watch: is shown what the network says.

  Raises:
    ValueError: images, conditions or settings are refused.
  """
  told = dict(label=label, vector=vector, condition=condition, mask=mask)
  images = native('images', images)
  both = share(model, params, settings, len(images), told, config_hash)
  model.takes.require_known(told)
  images = _values(images, both)
  done, records, initial_words, bits = 0, [], [], 0.0
  for stream, numbers in enumerate(both.streams):
    message, bases = Message(both.initial(stream)), {}
    before = message.bits
    for number in reversed(numbers):  # the first group is decoded first
      u = np.zeros((settings.group_size, *both.network.shape), np.int64)
      rows = both.rows(number)
      u[: rows.stop - rows.start] = images[rows]
      chain.encode(both.group(number), message, u, _watch(both, rows, done, tell, watch))
      done += settings.num_timesteps
      bases[number] = message.base
      message.settle()
    bits += message.bits - before
    words, deepest = message.words(), min(bases.values())
    initial_words.append(-deepest)
    end = len(words)
    for number in numbers:
      start = min(bases[number] - deepest, end)
      mark = _mark(images[both.rows(number)])
      records.append(container.Record(number, words[start:end], mark))
      end = start
  header = both.facts | {
    'settings': settings._asdict(),
    'images': {
      'count': len(images),
      'shape': list(both.network.shape),
      'dtype': both.network.dtype.name,
    },
    'groups': both.num_groups,
    'initial_words': initial_words,
    'net_bits': round(bits, 1),
  }
  return container.write(header, records)


def decompress(
  model: build.Model,
  params: Any,
  blob: bytes,
  *,
  label: int | np.ndarray | None = None,
  vector: np.ndarray | None = None,
  condition: np.ndarray | None = None,
  mask: np.ndarray | None = None,
  until_log_snr: float | None = None,
  any_environment: bool = False,
  config_hash: str = '',
  name: str = 'the file',
  tell: Tell | None = None,
) -> np.ndarray:
  """Returns the images [N *spatial C] of a file of `compress`.

  Args:
    model: the sender's.
    params: the sender's.
    blob: the file.
    label: what the sender gave.
    vector: what the sender gave.
    condition: what the sender gave.
    mask: what the sender gave.
    until_log_snr: return x_hat instead, once latents are known up to this log-SNR. It takes less
      time of the last group of each stream, and as much as the images of the others.
    any_environment: pass over versions and devices that differ. Checksums still hold.
    config_hash: as in `compress`.
    name: the file's, for errors.
    tell: is told of progress.

  Raises:
    Incomplete: part of the file is damaged, or decodes to other images; the others are there.
    ValueError: this side differs from the sender's, or the header is damaged.
  """
  file = container.read(blob, name)
  with files.reading(name):
    settings, count = Settings(**file.header['settings']), file.header['images']['count']
  told = dict(label=label, vector=vector, condition=condition, mask=mask)
  both = share(model, params, settings, count, told, config_hash)
  require_shared(file.header, both, name, any_environment)
  until = 0 if until_log_snr is None else _level(both.grid, until_log_snr)
  parts: dict[int, np.ndarray] = {}
  problems = [file.damage] if file.damage else []
  for stream, numbers in enumerate(both.streams):
    message = Message()
    for number in numbers:
      if number not in file.records:
        break
      message.put_below(file.records[number].words)
      try:
        found = _decoded(both, file.records[number], message, number == numbers[-1], until, tell)
      except (files.Damaged, FloatingPointError) as error:
        problems.append(f'group {number} of {both.num_groups} cannot be decoded here ({error})')
        break
      if until:
        found = np.asarray(model.decoder_of(params).from_model(jnp.asarray(found)))
      parts[number] = found.astype(both.network.dtype)
    ends = numbers[-1] in parts and not until
    if ends and not _is_initial(both, stream, message, file.header['initial_words'][stream]):
      problems.append(f'stream {stream} does not end in what its sender began with')
  if len(parts) < both.num_groups and not problems:
    problems.append(f'it has {len(parts)} of its {both.num_groups} groups')
  order = sorted(parts)
  none = np.zeros((0, *both.network.shape), both.network.dtype)
  images = np.concatenate([none, *(parts[i] for i in order)])
  if not problems:
    return images
  index = [np.zeros(0, np.int64), *(np.arange(count)[both.rows(i)] for i in order)]
  text = f'{name}: {problems[0]}; {len(images)} of its {count} images are recovered'
  raise Incomplete(text, images, np.concatenate(index))


def _decoded(
  both: Shared,
  record: container.Record,
  message: Message,
  is_last: bool,
  until: int,
  tell: Tell | None,
) -> np.ndarray:
  """Returns the images [n *shape] of a group, or with `until` x_hat at that level.

  Raises:
    Damaged: they are not those of the sender.
  """
  rows = both.rows(record.number)
  pictures: dict[int, np.ndarray] = {}

  def keep(rows, level, z, x_hat):
    if level == until:
      pictures[level] = x_hat

  steps = both.settings.num_timesteps
  watch = _watch(both, rows, record.number * steps, tell, keep)
  u = chain.decode(both.group(record.number), message, until if is_last else 0, watch)
  if u is None:  # the last group, down to `until` alone
    return pictures[until]
  u = u[: rows.stop - rows.start].astype(both.network.dtype)
  if _mark(u) != record.images:
    raise files.Damaged('it comes out as other images than went in')
  return pictures[until] if until else u


def _watch(
  both: Shared, rows: slice, done: int, tell: Tell | None, watch: Watch | None
) -> chain.Watch:
  """Returns what is shown each level of a group, of which `done` were before it."""
  count, steps = rows.stop - rows.start, both.settings.num_timesteps
  seen = iter(range(1, steps + 1))

  def show(level, z, x_hat):
    if watch:
      watch(rows, level, z[:count], x_hat[:count])
    if tell:
      tell(done + next(seen), both.num_groups * steps)

  return show


def _is_initial(both: Shared, stream: int, message: Message, count: int) -> bool:
  """Returns whether a message is what its sender began with."""
  words = message.words()
  return len(words) == count and np.array_equal(words[::-1], both.initial(stream)(count))


def _level(levels: Grid, log_snr: float) -> int:
  """Returns the first level in the order of decoding that has this log-SNR."""
  means = levels.log_snr.reshape(len(levels.log_snr), -1).mean(axis=1)[1:]
  remedy = 'leave it out for the images themselves'
  require(log_snr <= means[0], 'until_log_snr', log_snr, f'at most {means[0]:.3f}', remedy)
  return int(np.flatnonzero(means >= log_snr)[-1]) + 1


def _mark(images: np.ndarray) -> bytes:
  """Returns the checksum of the images of a group."""
  little = images.dtype.newbyteorder('<')
  return container.checksum(images.astype(little).tobytes(), size=4)


def _values(images: np.ndarray, both: Shared) -> np.ndarray:
  """Returns images that the decoder knows, in its dtype, with zeros where a mask leaves them out.

  Raises:
    ValueError: they are of another shape, or not its integers.
  """
  shape, most = both.network.shape, len(both.network.values) - 1
  rule, remedy = f'[N, {str(list(shape))[1:]}', 'that is the shape of the model'
  require(images.shape[1:] == shape, 'images', list(images.shape), rule, remedy)
  if 'valid' in both.conditions:
    images = np.where(both.conditions['valid'], images, 0)
  good = (images == np.round(images)).all() and images.min() >= 0 and images.max() <= most
  ends = f'{images.min():g} .. {images.max():g}'
  require(bool(good), 'images', ends, f'integers 0 .. {most}', "give the data's own values")
  return images.astype(both.network.dtype)
