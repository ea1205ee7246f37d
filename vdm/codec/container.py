"""The file: what the receiver must share, and a record per group, each with its checksums.

  magic [8]  format u16  length u32  header, JSON  checksum [8]
  then for each group:  number u32  words u32  images [4]  checksum [4]  words, u32 each

All is little-endian; checksums are the first bytes of SHA-256. That of the header is over all
before it; a record's is over the header's and all of the record, so that no record of another file
or in another place passes. `images` is over the images of the group, once they are decoded.

Records are in the order of decoding. A stream's message is a stack that is read from its top, and
a record has the words that its group needs beyond those of the records before: none of them waits
for a later one. So what comes before damage is whole, at no cost in bits.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from vdm.errors import require
from vdm.system import files

MAGIC = b'\x89VDM\r\n\x1a\n'  # as PNG has it: what changes line ends or the high bit shows at once
FORMAT = 1
START = struct.Struct('<8sHI')
RECORD = struct.Struct('<II4s4s')
AGAIN = 'copy it again'


class Record(NamedTuple):
  """Holds what a file has of a group."""

  number: int
  words: np.ndarray  # uint32, from the deepest up
  images: bytes  # checksum of the images


class Container(NamedTuple):
  """Holds a file that was read, up to what is damaged.

  Attributes:
    header: what the receiver must share.
    records: of the groups, by number, as far as they are intact.
    damage: what is wrong, in words, '' if nothing is.
  """

  header: dict[str, Any]
  records: dict[int, Record]
  damage: str


def checksum(*parts: bytes, size: int) -> bytes:
  """Returns the first bytes of the SHA-256 of all parts."""
  return hashlib.sha256(b''.join(parts)).digest()[:size]


def write(header: dict[str, Any], records: Iterable[Record]) -> bytes:
  """Returns the file."""
  text = files.json_text(header, indent=None).encode()
  start = START.pack(MAGIC, FORMAT, len(text)) + text
  mark = checksum(start, size=8)
  parts = [start, mark]
  for record in records:
    words = record.words.astype('<u4').tobytes()
    parts += [_head(mark, record.number, words, record.images), words]
  return b''.join(parts)


def _head(mark: bytes, number: int, words: bytes, images: bytes) -> bytes:
  count = len(words) // 4
  own = struct.pack('<II', number, count)
  return RECORD.pack(number, count, images, checksum(mark, own, images, words, size=4))


def read(blob: bytes, name: str) -> Container:
  """Returns what is intact of a file.

  Args:
    blob: its bytes.
    name: its own, for errors.

  Raises:
    Damaged: its header is not; it is no such file, or one of another format.
  """
  if len(blob) < START.size or not blob.startswith(MAGIC):
    raise files.Damaged(f'{name} is no file of this codec; give one that compress wrote.')
  _, version, length = START.unpack_from(blob)
  end = START.size + length
  mark = blob[end : end + 8]
  if mark != checksum(blob[:end], size=8):
    raise files.Damaged(f'{name}: the header is damaged (its checksum differs); {AGAIN}.')
  require(version == FORMAT, f'{name}: format', version, str(FORMAT), 'use the vdm that wrote it')
  with files.reading(name):
    header = json.loads(blob[START.size : end])
    total = header['groups']
  records: dict[int, Record] = {}
  damage, place = '', end + 8
  for turn in range(total):
    if len(blob) < place + RECORD.size:
      damage = damage or f'it ends before group {turn} of {total}'
      break
    number, count, images, own = RECORD.unpack_from(blob, place)
    words = blob[place + RECORD.size : place + RECORD.size + 4 * count]
    if number != turn or RECORD.pack(number, count, images, own) != _head(
      mark, turn, words, images
    ):
      damage = damage or f'group {turn} of {total} is damaged or cut off (its checksum differs)'
      if number != turn or len(words) < 4 * count:
        break  # where the next one begins is not known
    else:
      records[turn] = Record(turn, np.frombuffer(words, '<u4').astype(np.uint32), images)
    place += RECORD.size + 4 * count
  if not damage and place != len(blob):
    damage = f'{len(blob) - place} bytes follow its last group'
  return Container(header, records, damage)
