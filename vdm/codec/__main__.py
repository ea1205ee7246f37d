"""Compresses images without loss by a trained model, and makes them of the file again.

  python -m vdm.codec compress --workdir=RUN --images=FILE.npy --out=FILE.vdm
  python -m vdm.codec compress --workdir=RUN --split=test --num=100 --out=FILE.vdm
  python -m vdm.codec decompress FILE.vdm --workdir=RUN --out=FILE.npz
  python -m vdm.codec report --workdir=RUN --split=test --num_timesteps=200,1000 --out=FOLDER

RUN is a workdir or a released model, such as pretrained/digits, and --config.data.dir=DIR and the
like change leaves of its config. A model by class, vector or field needs them on both sides: they
are arrays label, vector, condition and mask beside the images in an NPZ file, or in one of
--conditions; or those of the split. The file has their checksum, not them.
"""

import argparse
import ast
import os
import pathlib
import re
import sys
from typing import Any

import numpy as np

from vdm.build.state import named_params
from vdm.codec import coder, container, inputs, report
from vdm.codec.message import require_coder
from vdm.codec.shared import DEFAULTS, Settings
from vdm.data.settle import FOUND, STATISTICS
from vdm.errors import require
from vdm.system import files
from vdm.system.logs import set_up_logging
from vdm.system.progress import Progress, duration
from vdm.workdir import config_file
from vdm.workdir.load import Run, read_run

OVERRIDE = re.compile(r'--config\.([\w.]+)=(.*)', re.DOTALL)
# XLA may choose among kernels by how fast they were, which is another one in another process
GPU_FLAGS = '--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0'
BLOCKS = ('model', 'schedule', 'decoder')  # of a config: what a model is made of
COUNTS = ('train_images', 'eval_images')
DATA_LEAVES = (
  *(leaf for leaf in FOUND if leaf not in COUNTS),
  *STATISTICS['vector'],
  *STATISTICS['condition'],
)


def compress(typed: argparse.Namespace, run: Run) -> int:
  """Runs `compress`; returns the exit status."""
  _check_folder(typed.out)
  source, progress = _inputs(typed, run), Progress('compress', 'levels')
  blob = coder.compress(
    run.model,
    named_params(run.state, typed.params),
    source.images,
    _settings(typed, typed.num_timesteps),
    **source.told,
    config_hash=_hash(run),
    tell=progress,
  )
  files.write(files.path_of(typed.out), blob)
  header = container.read(blob, typed.out).header
  initial, net = 4 * sum(header['initial_words']), header['net_bits'] / source.num_dims
  print(
    f'{typed.out}: {len(source.images):,} images in {len(blob):,} bytes, {initial:,} of them '
    f'initial bits; net {net:.4f} bits/dim; it took {duration(progress.seconds)}'
  )
  return 0


def decompress(typed: argparse.Namespace, run: Run) -> int:
  """Runs `decompress`; returns the exit status."""
  stem = os.path.splitext(typed.out or typed.file)[0]
  out = typed.out or f'{stem}.npz'
  inputs.check_name(out)
  _check_folder(out)
  with files.reading(typed.file, 'name a file that compress wrote'):
    blob = files.path_of(typed.file).read_bytes()
  progress = Progress('decompress', 'levels')
  try:
    images = coder.decompress(
      run.model,
      named_params(run.state, typed.params),
      blob,
      **_conditions(typed, run, blob),
      until_log_snr=typed.until_log_snr,
      any_environment=typed.any_environment,
      config_hash=_hash(run),
      name=typed.file,
      tell=progress,
    )
  except coder.Incomplete as error:
    if not len(error.images):
      raise
    recovered = f'{stem}_recovered.npz'
    inputs.write(recovered, error.images, error.index)
    raise ValueError(f'{error}, in {recovered} with their numbers') from error
  inputs.write(out, images)
  print(f'{out}: {len(images):,} images; it took {duration(progress.seconds)}')
  return 0


def write_report(typed: argparse.Namespace, run: Run) -> int:
  """Runs `report`; returns the exit status."""
  shared = not (typed.rate_distortion and run.model.conditional_schedule)
  rule = "left out under 'learned_conditional', whose levels differ by image"
  require(shared, '--rate_distortion', typed.rate_distortion, rule, 'report the table alone')
  folder, source = pathlib.Path(files.path_of(typed.out)), _inputs(typed, run)
  config_file.check_writable(folder, '--out', 'choose another')
  measured = [
    report.measure(
      run, typed.params, source, _settings(typed, steps), folder, typed.draws, typed.verify
    )
    for steps in typed.num_timesteps
  ]
  lengths, alongs = zip(*measured, strict=True)
  kept = alongs if typed.rate_distortion else ()
  print(report.write(folder, run, lengths, kept, source, typed.params))
  for length in lengths:
    taken = ' and '.join(map(duration, length.seconds))
    print(f'T = {length.settings.num_timesteps} took {taken}')
  return 0


def _check_folder(path: str):
  """Refuses a file whose folder cannot be written, before the work is done."""
  config_file.check_writable(files.path_of(path).parent, '--out', 'choose another')


def _inputs(typed: argparse.Namespace, run: Run) -> inputs.Inputs:
  takes = run.model.takes
  if typed.images:
    return inputs.of_file(typed.images, takes, typed.conditions)
  return inputs.of_split(run.config.data, typed.split, typed.num, takes)


def _conditions(typed: argparse.Namespace, run: Run, blob: bytes) -> dict[str, np.ndarray]:
  """Returns what a receiver is told of the images."""
  takes = run.model.takes
  if typed.conditions:
    return inputs.conditions_of(typed.conditions, takes)
  if not typed.split:
    return {}
  count = container.read(blob, typed.file).header['images']['count']
  return inputs.of_split(run.config.data, typed.split, count, takes).told


def _settings(typed: argparse.Namespace, num_timesteps: int) -> Settings:
  names = ('group_size', 'streams', 'cells', 'seed')
  return Settings(num_timesteps, *(getattr(typed, name) for name in names))


def _hash(run: Run) -> str:
  """Returns the hash of what the model of a run is made of."""
  plain = config_file.plain(run.config)
  leaves = {leaf: plain['data'][leaf] for leaf in DATA_LEAVES}
  return files.short_hash({name: plain[name] for name in BLOCKS} | {'data': leaves})


def _steps(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(','))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m vdm.codec', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  commands = parser.add_subparsers(dest='command', required=True)
  model = argparse.ArgumentParser(add_help=False)
  model.add_argument('--workdir', required=True, metavar='RUN', help='a run, or a released model')
  model.add_argument('--step', default='newest', help='of its checkpoints: newest, best, a number')
  model.add_argument('--params', default='ema', help="'raw', 'ema' or another average")
  model.add_argument('--conditions', default='', metavar='FILE.npz', help='label, vector, ...')
  model.add_argument('--split', default='', help="of the config's data, such as test")
  sender = argparse.ArgumentParser(add_help=False)
  sender.add_argument('--images', default='', metavar='FILE', help='NPY, or NPZ with conditions')
  sender.add_argument('--num', type=int, default=0, help='images of the split; 0: all')
  for name in ('group_size', 'streams', 'seed'):
    sender.add_argument(f'--{name}', type=int, default=getattr(DEFAULTS, name))
  sender.add_argument('--cells', type=float, default=DEFAULTS.cells, help='in a deviation, 2 to 4')
  made = commands.add_parser('compress', parents=[model, sender], help='images to a file')
  made.add_argument('--num_timesteps', type=int, default=DEFAULTS.num_timesteps, help='T')
  made.add_argument('--out', required=True, metavar='FILE.vdm')
  back = commands.add_parser('decompress', parents=[model], help='a file to images')
  back.add_argument('file', metavar='FILE.vdm')
  back.add_argument('--out', default='', metavar='FILE.npz', help='or FILE.npy')
  back.add_argument('--until_log_snr', type=float, help='x_hat of latents up to there instead')
  back.add_argument('--any_environment', action='store_true', help='try with other versions')
  table = commands.add_parser('report', parents=[model, sender], help='a table, and curves')
  steps = (DEFAULTS.num_timesteps,)
  table.add_argument('--num_timesteps', type=_steps, default=steps, help='T, or several: 200,1000')
  table.add_argument('--out', required=True, metavar='FOLDER')
  table.add_argument('--draws', type=int, default=32, help='of the bound, for each image')
  table.add_argument('--rate_distortion', action='store_true', help='PSNR by bits spent')
  table.add_argument('--verify', action='store_true', help='decompress as well')
  return parser


def _overrides(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
  """Returns the arguments without --config.LEAF=VALUE, and the leaves with their values."""
  matches = {arg: OVERRIDE.fullmatch(arg) for arg in argv}
  leaves: dict[str, Any] = {}
  for match in filter(None, matches.values()):
    try:
      leaves[match[1]] = ast.literal_eval(match[2])
    except (ValueError, SyntaxError):  # a word
      leaves[match[1]] = match[2]
  return [arg for arg in argv if not matches[arg]], leaves


COMMANDS = {'compress': compress, 'decompress': decompress, 'report': write_report}


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  rest, overrides = _overrides(sys.argv[1:] if argv is None else argv)
  typed = _parser().parse_args(rest)
  os.environ['XLA_FLAGS'] = f'{GPU_FLAGS} {os.environ.get("XLA_FLAGS", "")}'.strip()
  set_up_logging()
  try:
    require_coder()
    if typed.command != 'decompress':
      rule, remedy = 'given, or else --split', 'name a file, or a split such as --split=test'
      require(bool(typed.images) != bool(typed.split), '--images', typed.images, rule, remedy)
    both, rule = typed.conditions and typed.split, 'left out with --split, which has its own'
    require(not both, '--conditions', typed.conditions, rule, 'give one of the two')
    run = read_run(None, files.packaged_run(typed.workdir), typed.step, overrides)
    averages = ('raw', *run.state.averages)
    require(typed.params in averages, '--params', typed.params, f'one of {averages}', 'choose one')
    return COMMANDS[typed.command](typed, run)
  except (ValueError, FloatingPointError) as error:
    print(f'error: {error}', file=sys.stderr)
  except OSError as error:
    print(f'error: {error.filename}: {error.strerror or error}', file=sys.stderr)
  return 1


if __name__ == '__main__':
  sys.exit(main())
