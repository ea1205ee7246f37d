"""This module makes a page in Markdown of the results of an accelerator."""

import json
import re
import signal
from typing import Any

from benchmarks.accelerator.parts import EXIT_SAVED


def step_row(name: str, r: dict[str, Any]) -> str:
  """Returns a line of the table of steps."""
  ms, share, memory = r['step_ms'], r['flop_utilisation'], r['memory_bytes_per_device']
  cells = (
    name.removeprefix('step '),
    r['batch_size'],
    f'{ms["median"]:.1f} ({ms["q25"]:.1f} to {ms["q75"]:.1f})',
    f'{r["images_per_s"]:.0f}',
    f'{r["matmul_flops"] / r["devices"] / ms["median"] / 1e9:.0f}',
    f'{share:.0%}' if share else '',
    f'{memory["total"] / 1e9:.1f}',
    f'{r["trace_and_lower_s"]:.1f} + {r["compile_s"]:.1f}',
  )
  return f'| {" | ".join(map(str, cells))} |'


def kernel_table(steps: dict[str, Any]) -> str:
  """Returns a table of ms per step by class of kernel; empty where no trace has any."""
  columns = {k.removeprefix('step '): v['kernels']['ms'] for k, v in steps.items()}
  columns = {name: ms for name, ms in columns.items() if ms}
  classes = sorted({c for ms in columns.values() for c in ms}, key=lambda c: c == 'rest')
  rows = [['kernels, ms per step', *columns], ['---'] * (1 + len(columns))]
  rows += [[c, *(f'{ms[c]:.2f}' if c in ms else '' for ms in columns.values())] for c in classes]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows) if columns else ''


def markdown(results: dict[str, Any]) -> str:
  """Returns the results as a page."""
  parts = results['parts'].items()
  steps = {k: v['result'] for k, v in parts if k.startswith('step ') and v['status'] == 0}
  head = '| config, precision | batch | step, ms (quartiles) | images/s | TFLOP/s | of peak '
  head += '| memory, GB | trace + compile, s |\n|---|---|---|---|---|---|---|---|'
  one = next(iter(steps.values()), None)
  on = f'{one["devices"]} x {one["device_kind"]}, jax {one["jax"]}, ' if one else ''
  texts = ['# Results of `python -m benchmarks.accelerator`', f'{on}{results["written"]}.']
  if steps:
    texts += ['\n'.join([head, *(step_row(*item) for item in steps.items())])]
    texts += [table] if (table := kernel_table(steps)) else []
  commands = [
    f'| {name} | `{part["command"]}` | {status_of(part)} | {part["seconds"]} |'
    for name, part in parts
  ]
  texts += ['\n'.join(['| part | command | | seconds |\n|---|---|---|---|', *commands])]
  for name, part in parts:
    result = part['result'] or said(part)
    if not name.startswith('step ') and result:
      text = result if isinstance(result, str) else f'```json\n{json.dumps(result, indent=1)}\n```'
      texts += [f'## {name.capitalize()}\n\n{text}']
  return '\n\n'.join(texts) + '\n'


def said(part: dict[str, Any]) -> str:
  """Returns what the log of a run says of its results; '' if it has none."""
  lines = part['log'].splitlines()
  return '\n'.join(f'    {line}' for line in lines if re.search(r'bits/dim|FD-|images/s', line))


def failed(part: dict[str, Any]) -> bool:
  """Returns whether a part broke, or did not end in time."""
  return part['status'] not in (0, EXIT_SAVED)


def status_of(part: dict[str, Any]) -> str:
  """Returns how a part ended, in a word or two."""
  if part['status'] == -signal.SIGTERM:
    return 'stopped at its limit'
  if part['status'] == EXIT_SAVED:
    return 'stopped and saved'
  return 'done' if part['status'] == 0 else f'failed, status {part["status"]}'
