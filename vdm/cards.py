"""Number cards: a reported value as JSON, with all that makes it comparable."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

import vdm


def environment() -> dict[str, Any]:
  """Device, versions and git revision of the running program."""
  device = jax.devices()[0]
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return {
    'device': device.device_kind,
    'platform': device.platform,
    'num_devices': jax.device_count(),
    'num_hosts': jax.process_count(),
    'python': platform.python_version(),
    'versions': {'vdm': vdm.__version__} | {p: importlib.metadata.version(p) for p in packages},
    'git_revision': git_revision(),
  }


def git_revision() -> str:
  """The checkout's commit, with '+changes' where files differ from it; '' outside a checkout."""
  folder = pathlib.Path(__file__).parent

  def git(*args):
    run = subprocess.run(['git', *args], cwd=folder, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else ''

  try:
    # A wheel inside somebody else's repository is not that repository's revision.
    if git('ls-files', pathlib.Path(__file__).name):
      return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain', '-uno') else '')
  except FileNotFoundError:  # no git on this machine
    pass
  return ''


def write(path: pathlib.Path, card: dict[str, Any]):
  """Writes the card atomically; only the first process of a job does."""
  if jax.process_index():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix('.part')
  part.write_text(json.dumps(card | {'environment': environment()}, indent=2) + '\n')
  os.replace(part, path)


def last_result(workdir: pathlib.Path) -> str:
  """The newest bits/dim of the averaged parameters, in a sentence; '' where there is none."""
  paths = sorted(
    (workdir / 'cards').glob('bits_per_dim_ema_*.json'), key=lambda path: path.stat().st_mtime
  )
  if not paths:
    return ''
  card = json.loads(paths[-1].read_text())
  split, stderr = card['data']['split'], card['stderr']
  return (
    f'{split}: {card["value"]:.4f} +- {stderr:.4f} bits/dim at step {card["step"]} ({paths[-1]}).'
  )
