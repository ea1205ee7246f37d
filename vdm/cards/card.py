"""Writes cards, reads those of a workdir, and says in words what they are."""

import importlib.metadata
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from scipy import special

import vdm
from vdm.system import files

ODE = 'probability-flow ODE'  # the bound of a card that is no bound begins with it
UNITS = {'bits_per_dim': 'bits/dim', 'nats_per_dim': 'nats/dim'}  # of likelihoods, by metric


def environment() -> dict[str, Any]:
  """Returns the device, versions and git revision of the running program."""
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
  """Returns the checkout's commit, with '+changes' if files differ from it; '' if there is none."""
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


def stderr_of(values: np.ndarray) -> float | None:
  """Returns the standard error of the mean of independent values [N]; None for a single one."""
  return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def error_fields(value: float, stderr: float | None, dof: float) -> dict[str, Any]:
  """Returns what a card says of an error: it and its degrees of freedom, and the 95 % interval.

  The interval is Student's, so it holds for few degrees of freedom too; None if there is no error.
  """
  half = None if stderr is None else float(special.stdtrit(dof, 0.975)) * stderr
  interval = None if half is None else [value - half, value + half]
  return {'stderr': stderr, 'stderr_dof': dof, 'interval_95': interval}


def plus_minus(value: float, stderr: float | None) -> str:
  """Returns 'value +- standard error', or the value alone if there is no error.

  Both end at the error's first digit, or at its second if the first is 1 or 2.
  """
  if not stderr:
    return f'{value:.4f}'
  exponent = math.floor(math.log10(stderr))
  places = max(0, (stderr < 3 * 10**exponent) - exponent)
  return f'{value:.{places}f} +- {stderr:.{places}f}'


def write(path: pathlib.Path, card: dict[str, Any]):
  """Writes the card atomically; only the first process of a job does."""
  if jax.process_index():
    return
  files.write(path, files.json_text(card | {'environment': environment()}))


def path_of(
  workdir: pathlib.Path, parts: Iterable[Any], settings: dict[str, Any], step: int
) -> pathlib.Path:
  """Returns where a card goes, cards/<parts>_<hash of settings>_step<step>.json.

  `settings` hold all that makes it another number, so that no card takes another one's place; the
  name without its step is that of a series, of the numbers that may share a curve.
  """
  name = '_'.join([*map(str, parts), files.short_hash(settings)])
  return workdir / 'cards' / f'{name}_step{step:08d}.json'


def series(*workdirs: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Returns the cards of the workdirs by series (`path_of`), in the order of their steps.

  Each has its 'path' as well. A file that is no card is passed over, with a warning.
  """
  found, damaged = read(*workdirs)
  for line in damaged:
    logging.warning('%s', line)
  return found


def read(*workdirs: pathlib.Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
  """Returns the cards of the workdirs as `series` does, and a line per file that is no card."""
  found, damaged = {}, []
  for workdir in dict.fromkeys(map(epath.Path, workdirs)):
    for path in sorted((workdir / 'cards').glob('*_step*.json')):
      try:
        card = load(path)
        with files.reading(path, 'remove it, or copy it again'):
          description(card), int(card['step'])  # what a series is sorted and named by
      except ValueError as error:
        damaged.append(str(error))
        continue
      name = path.name.rpartition('_step')[0]
      found.setdefault(name, []).append(card | {'path': str(path)})
  found = {name: sorted(cards, key=lambda card: card['step']) for name, cards in found.items()}
  return found, damaged


def is_bound(card: dict[str, Any]) -> bool:
  """Returns whether the card is of a variational bound."""
  return is_likelihood(card) and not card['bound'].startswith(ODE)


def is_likelihood(card: dict[str, Any]) -> bool:
  """Returns whether the card is of a likelihood: of probabilities, or of densities."""
  return card['metric'] in UNITS


def is_distance(card: dict[str, Any]) -> bool:
  """Returns whether the card is of a Fréchet distance."""
  return card['metric'] == 'fid' or card['metric'].startswith('fd_')


def best(cards: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the card of the lowest value in a series, the newest of equals."""
  return min(cards, key=lambda card: (card['value'], -card['step']))


def images_of(card: dict[str, Any]) -> str:
  """Returns which images the card is about: all of a split, or its first ones."""
  count, split = card['num_images'], card['data']['split']
  return f'{"all" if card["whole_split"] else "first"} {count:,} images of {split}'


def description(card: dict[str, Any]) -> list[str]:
  """Returns what the number is, but for the step, in as many parts for every card of a kind."""
  if not is_likelihood(card):
    drawn = f'{card["sampler"]}, {card["network_evaluations"]} evaluations'
    return [card['metric'], f'{card["params"]} parameters', f'{card["num_samples"]} samples', drawn]
  draws = at(card, 'draws_per_image') or 1
  times = f'{draws} draw{"s" if draws > 1 else ""}, seed {card["eval_seed"]}'
  return [f'{card["params"]} parameters', card['bound'], images_of(card), times]


def headline(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
  """Returns the series of the likelihood that a run is known by, at its newest step; [] if none.

  Of several at that step the first of these decides: averaged parameters, the bound, the whole
  split, the number of images, and of draws.
  """

  def rank(cards):
    card = cards[-1]
    own = card['params'] == 'ema', is_bound(card), card['whole_split'], card['num_images']
    return card['step'], *own, at(card, 'draws_per_image') or 1

  return max((cards for cards in found.values() if is_likelihood(cards[0])), key=rank, default=[])


def last_result(workdir: pathlib.Path) -> str:
  """Returns the likelihood of the newest step (`headline`) in a sentence; '' if there is none."""
  cards = headline(series(workdir))
  if not cards:
    return ''
  card, lowest = cards[-1], best(cards)
  value, least = (plus_minus(c['value'], c['stderr']) for c in (card, lowest))
  whose = 'the best' if lowest is card else f'the best is {least} at {lowest["step"]}'
  return (
    f'{", ".join(description(card))}: {value} {UNITS[card["metric"]]} at step {card["step"]}, '
    f'{whose} of {len(cards)} ({card["path"]}).'
  )


def load(path: os.PathLike | str) -> dict[str, Any]:
  """Reads the card in a file.

  Raises:
    ValueError: there is none.
  """
  # what is no JSON number, in cards of before, is as good as none
  card = files.read_json(path, 'give a number card', parse_constant=lambda _: None)
  for field, kinds in (('metric', str), ('value', (int, float))):
    if not isinstance(at(card, field), kinds):
      raise ValueError(f"{path} is not a number card: it has no {field}; see a run's cards folder.")
  return card


def at(tree: Any, path: str) -> Any:
  """Returns `tree['a']['b']` of the path 'a.b'; None if there is none."""
  for name in path.split('.'):
    tree = tree[name] if isinstance(tree, dict) and name in tree else None
  return tree
