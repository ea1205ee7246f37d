"""Makes what a plan prints: a column per step, and how its numbers came about."""

import statistics

from vdm.planning.chips import GIB
from vdm.planning.costs import Cost, Step, Target, bytes_per_device, roofline


def gib(size: float | None) -> str:
  """Returns a number of bytes in GiB; '' for what is not known."""
  return '' if size is None else f'{size / GIB:.2f} GiB'


def _duration(seconds: float) -> str:
  for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
    if seconds >= 2 * length:
      return f'{seconds / length:.3g} {unit}'
  return f'{seconds:.3g} s'


def column(
  step: Step, of: Cost, where: Target, dtype: str, measured: list[float]
) -> dict[str, str]:
  """Returns a step's part of the table: label -> cell."""
  state, chip = step.args[0], where.chip
  params = bytes_per_device(state.params if step.name == 'train' else state)
  cells = {
    'images of a call, on all devices': f'{step.images:,}',
    'parameters': gib(params),
    'optimizer, averages': gib(bytes_per_device(state) - params) if step.name == 'train' else '',
    'activations, gradients, temporaries': gib(of.temporaries),
    'memory in all': gib(of.memory),
    'FLOPs': f'{of.flops / 1e12:.4g} T',
    'HBM traffic': '' if of.traffic is None else f'{of.traffic / 1e9:.4g} GB',
  }
  if of.accessed is not None:
    cells["accessed, by XLA's count"] = f'{of.accessed / 1e9:.4g} GB'
  for kind, (number, size) in (of.collectives or {}).items():
    cells[f'{kind}: number, sent'] = f'{number}, {size / 1e6:.4g} MB'
  seconds = None
  if chip and of.traffic is not None and of.collectives is not None:
    times = roofline(chip, dtype, of)
    cells |= {f'time by {k}': f'{1e3 * v:.4g} ms' for k, v in times.items()}
    binding = max(times, key=times.get)
    seconds, cells['bound by'] = times[binding], binding
  if measured:
    seconds = statistics.median(measured)
    spread = f'{1e3 * min(measured):.4g} to {1e3 * max(measured):.4g}'
    cells['measured: median'] = f'{1e3 * seconds:.4g} ms ({spread})'
    cells['counted FLOPs a second'] = f'{of.flops / seconds / 1e12:.4g} T'
  if seconds:
    cells['images/s, all devices'] = f'{step.images / seconds / step.calls_per_batch:.4g}'
    cells['all of it'] = f'{_duration(seconds * step.calls)} for {step.calls:,} calls'
  if of.seconds is not None:
    cells['compiled in'] = f'{of.seconds:.0f} s'
  return cells


def table(columns: dict[str, dict[str, str]]) -> str:
  """Returns columns of cells by label as aligned Markdown, empty where a column lacks a label."""
  labels = list(dict.fromkeys(label for cells in columns.values() for label in cells))
  rows = [['a device and call', *columns]]
  rows += [[label, *(cells.get(label, '') for cells in columns.values())] for label in labels]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
  ]
  lines.insert(1, ' | '.join('-' * width for width in widths))
  return '\n'.join(f'| {line} |' for line in lines)


COUNTED = (
  'FLOPs are those of matrix products and convolutions in the traced program: loops times their '
  'length, what remat computes again included. '
)
COMPILED = (
  "Memory, HBM traffic and collectives are those of XLA's program for the chip, loops and all, "
  'traffic times the length of its loops; arrays without the padding of their tiles. '
)
NO_CODE = 'No code was generated: --noplan_fast does, and says how long it takes.'
ACCESSED = "XLA's own count of what is accessed takes loops once, and on-chip memory for HBM."
ESTIMATED = (
  'Nothing was compiled. Memory is the state and 1.3 times what JAX keeps for the gradient, before '
  'fusion, with the gradient; traffic that of every product and convolution, with all else fused; '
  'both are rough.'
)


def notes(where: Target, fast: bool, measured: bool) -> str:
  """Returns how the numbers of the table came about."""
  compiled = where.platform == 'tpu' and not measured
  how = COMPILED + (NO_CODE if fast else ACCESSED) if compiled else ESTIMATED
  times = (
    'Times are lower bounds, at the peak of the chip and of all its links.' if where.chip else ''
  )
  return f'{COUNTED}{how} {times}'
