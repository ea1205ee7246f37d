"""Counts what a program costs: FLOPs of a jaxpr; traffic and collectives of a compiled program.

XLA's own cost analysis counts the body of a loop once. Both counts here multiply it by its length.
"""

import functools
import math
import re
from typing import NamedTuple

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# These have no traffic of their own: names for parts of other arrays, control flow, the ends of
# transfers.
_FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'iota'),
  *('while', 'conditional', 'call', 'partition-id', 'replica-id', 'opt-barrier', 'domain'),
}
_ITEM_BITS = {'pred': 8, 'bf16': 16, 'token': 0, 'opaque': 0}


class Instruction(NamedTuple):
  """Holds a line of a program's text."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


class Traffic(NamedTuple):
  """Holds the traffic of one run of a compiled program, on one device."""

  bytes: float  # read from and written to HBM
  collectives: dict[str, tuple[int, float]]  # kind -> (how many, bytes that this device sends)


def shape_bytes(shape: str) -> int:
  """Returns the bytes in HBM of a shape in HLO's text, 'f32[8,128]{1,0:T(8,128)}', or of a tuple.

  The padding of tiles is left out. What has a memory space, 'S(1)' in its layout, is on the chip.
  """
  total = 0
  for kind, dims, layout in re.findall(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?', shape):
    if 'S(' not in layout:
      bits = _ITEM_BITS.get(kind) or int((re.findall(r'\d+', kind) or [0])[0])
      total += math.prod(int(n) for n in dims.split(',') if n) * bits // 8
  return total


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns HLO's text as computations by name, and the name of the entry."""
  computations, entry, body, shapes = {}, '', [], {}
  for line in text.splitlines():
    if head := re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line):
      body, shapes = computations.setdefault(head[2], []), {}
      entry = head[2] if head[1] else entry
    elif line.startswith(' ') and (instruction := _instruction(line)):
      for part in (name for name in instruction.operands if '#' in name and name not in shapes):
        whole, _, index = part.rpartition('#')  # '%loop#1' stands for get-tuple-element of %loop
        shapes[part] = _parts(shapes[whole])[int(index)]
        body.append(Instruction(part, shapes[part], 'get-tuple-element', (whole,), '', False))
      shapes[instruction.name] = instruction.shape
      body.append(instruction)
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  head = re.match(r'\s+(ROOT )?%?([\w.-]+) = ', line)
  if not head:
    return None
  # a shape may be a tuple, of tuples, with comments, before the opcode and its parenthesis
  shape, rest = _balanced(line[head.end() :])
  opcode = re.match(r'\s*([\w-]+)', rest)[1]
  operands, attributes = _balanced(rest[rest.index('(') :])
  names = tuple(re.findall(r'%([\w.#-]+)', operands)) or tuple(operands.strip('()').split())
  return Instruction(head[2], shape, opcode, names, attributes, bool(head[1]))


def _balanced(text: str) -> tuple[str, str]:
  """Splits text after its first parenthesis, with all it holds, or its first word."""
  if not text.startswith('('):
    word, _, rest = text.partition(' ')
    return word, rest
  depth = 0
  for i, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return text[: i + 1], text[i + 1 :]
  return text, ''


def runs(computations: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
  """Returns how often each computation runs, for one run of the entry.

  The body of a loop runs as often as its length, which its condition compares with; every branch of
  a choice is taken to run.
  """
  times = dict.fromkeys(computations, 0)

  def visit(name, count):
    times[name] += count
    for instruction in computations[name]:
      if instruction.opcode in ('while', 'call', 'conditional', 'fusion', 'async-start'):
        for called in _called(instruction):
          visit(called, count * _length(instruction, computations))

  visit(entry, 1)
  return times


def _length(instruction: Instruction, computations: dict[str, list[Instruction]]) -> int:
  """Returns how often an instruction runs what it calls; 1 for a loop of unknown length."""
  if instruction.opcode != 'while':
    return 1
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes):
    return int(known[1])
  condition = computations[re.search(r'condition=%?([\w.-]+)', instruction.attributes)[1]]
  limits = [int(i.operands[0]) for i in condition if i.opcode == 'constant' and i.shape[0] in 'su']
  return max(limits, default=1)


def _called(instruction: Instruction) -> list[str]:
  """Returns the computations that run where this instruction does, but no condition of a loop."""
  found = re.findall(r'(?:body|calls|to_apply|\w+_computation)=%?([\w.-]+)', instruction.attributes)
  branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.attributes)
  return found + (re.findall(r'[\w.-]+', branches[1]) if branches else [])


def traffic(text: str, num_devices: int) -> Traffic:
  """Returns a program's traffic by its text: what instructions read and write, times their runs.

  An instruction that takes or replaces a slice of an array moves the slice alone.
  """
  computations, entry = parse(text)
  fused = {
    name
    for body in computations.values()
    for instruction in body
    if instruction.opcode == 'fusion'
    for name in _called(instruction)
  }
  total, collectives, channels = 0.0, {}, set()
  for name, times in runs(computations, entry).items():
    if not times:
      continue
    by_name = {instruction.name: instruction for instruction in computations[name]}
    for instruction in computations[name]:
      if name not in fused:
        total += times * _moved(instruction, by_name, computations)
      kind = instruction.opcode.removesuffix('-start')
      channel = re.search(r'channel_id=\d+', instruction.attributes)
      if kind not in COLLECTIVES or (channel and channel[0] in channels):
        continue  # the start and the end of one may both be fused with other work
      channels.add(channel and channel[0])
      shape = instruction.shape
      if instruction.opcode in ('all-gather-start', 'collective-permute-start'):
        shape = shape[len(shape) // 2 :] if shape.startswith('((') else _elements(shape)[1]
      group = group_size(instruction.attributes, num_devices)
      count, sent = collectives.get(kind, (0, 0.0))
      collectives[kind] = count + times, sent + times * sent_bytes(kind, shape, group)
  return Traffic(total, collectives)


def _moved(instruction: Instruction, by_name: dict, computations: dict) -> float:
  """Returns the bytes that an instruction reads from and writes to HBM."""
  opcode = instruction.opcode
  free = opcode in _FREE or opcode.endswith('-done') or opcode == 'async-start'
  if free or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
    return 0
  if opcode == 'fusion':
    return _moved_by_fusion(instruction, by_name, computations)
  operands = [shape_bytes(by_name[name].shape) for name in instruction.operands]
  if opcode in ('dynamic-update-slice', 'scatter'):
    return 2 * sum(operands[1:])
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    size = shape_bytes(instruction.shape.replace('S(', ''))
    return size * bool(operands[0]) + shape_bytes(instruction.shape)
  if opcode == 'slice-start':  # ((the array), the slice, a flag)
    size = shape_bytes(_elements(instruction.shape)[1].replace('S(', ''))
    return size * bool(operands[0]) + shape_bytes(_elements(instruction.shape)[1])
  if opcode.endswith('-start'):  # its result repeats its operands
    return max(shape_bytes(instruction.shape), sum(operands))
  return shape_bytes(instruction.shape) + sum(operands)


def _moved_by_fusion(fusion: Instruction, by_name: dict, computations: dict) -> float:
  """Returns the bytes of what a fusion takes and makes: whole arrays, or the slices it is about.

  What it only passes on is not moved. The start of an asynchronous collective is counted for all of
  it.
  """
  body = computations[_called(fusion)[0]]
  inside = {each.name: each for each in body}
  root = next(each for each in body if each.is_root)
  if 'custom_call_target="AsyncCollectiveStart"' in root.attributes:  # repeats its operand
    return shape_bytes(fusion.shape)
  if 'custom_call_target="AsyncCollectiveDone"' in root.attributes:
    return 0
  total = 0
  for each in body:
    if each.opcode == 'parameter':
      operand = by_name[fusion.operands[int(each.operands[0])]]
      total += min(shape_bytes(operand.shape), _read(each.name, body, computations))
  results = [inside[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  for each, shape in zip(results, _elements(fusion.shape), strict=True):
    total += min(shape_bytes(shape), _written(each, inside, computations))
  return total


def _read(name: str, body: list[Instruction], computations: dict) -> float:
  """Returns the bytes of an array that its users in a fusion read; infinite unless all slice it."""
  total = 0.0
  for user in body:
    if name not in user.operands or user.opcode == 'tuple':
      continue
    if user.opcode == 'bitcast':
      total += _read(user.name, body, computations)
    elif user.opcode == 'fusion':  # within the fusion
      inner = computations[_called(user)[0]]
      for each in inner:
        if each.opcode == 'parameter' and user.operands[int(each.operands[0])] == name:
          total += _read(each.name, inner, computations)
    elif user.opcode in ('dynamic-slice', 'slice'):
      total += shape_bytes(user.shape)
    elif user.opcode != 'dynamic-update-slice' or user.operands[0] != name:
      return math.inf
  return total


def _written(result: Instruction, inside: dict[str, Instruction], computations: dict) -> float:
  """Returns the bytes of a fusion's result that are new; infinite if all of them may be."""
  if result.opcode == 'parameter':
    return 0
  if result.opcode == 'bitcast':
    return _written(inside[result.operands[0]], inside, computations)
  if result.opcode == 'fusion':  # within the fusion
    inner = {each.name: each for each in computations[_called(result)[0]]}
    return _written(next(each for each in inner.values() if each.is_root), inner, computations)
  if result.opcode == 'dynamic-update-slice':
    return shape_bytes(inside[result.operands[1]].shape)
  return math.inf


@functools.lru_cache
def _parts(shape: str) -> tuple[str, ...]:
  """Returns the shapes, which may be tuples, that a tuple's shape is made of.

  A tuple of thousands is asked for once per part: it is split once.
  """
  parts, depth = [''], 0
  for character in re.sub(r'/\*.*?\*/', '', shape)[1:-1]:
    depth += (character in '([{') - (character in ')]}')
    if character == ',' and not depth:
      parts.append('')
    else:
      parts[-1] += character
  return tuple(parts)


def _elements(shape: str) -> list[str]:
  """Returns the arrays in a tuple's shape, or the shape."""
  return re.findall(r'[a-z]\w*\[[^\]]*\](?:\{[^}]*\})?', shape)


def sent_bytes(kind: str, shape: str, group: int) -> float:
  """Returns the bytes each device of a group sends in a collective, by the best known algorithm.

  Args:
    kind: one of COLLECTIVES.
    shape: of the result; of `all-reduce` the same as that of the operand.
    group: devices that take part in one.
  """
  size = shape_bytes(shape.replace('S(', ''))
  share = (group - 1) / group
  if kind == 'reduce-scatter':
    return size * (group - 1)  # the operand is `group` times as large
  if kind in ('collective-permute', 'collective-broadcast'):
    return size
  return size * share * (2 if kind == 'all-reduce' else 1)


def group_size(attributes: str, num_devices: int) -> int:
  """Returns the number of devices in each group of a collective.

  Its attributes say it in one of three ways: {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}.
  """
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return len(listed[1].split(','))
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]', attributes):
    return int(iota[1])
  if named := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
  return num_devices
