"""--mode=release makes of a run a model to give away."""

import pathlib

from absl import logging
from etils import epath

from vdm.build.state import named_params
from vdm.errors import require
from vdm.system import files
from vdm.workdir import config_file, released
from vdm.workdir.load import Run


def run(of: Run, out: pathlib.Path | None = None) -> int:
  """Runs --mode=release: writes config.sample.params of a run, its config and that step's cards.

  The folder is `out`, or <workdir>_release. It has a tenth of a checkpoint's size, and is evaluated
  and sampled from with --workdir=<folder>.

  Raises:
    ValueError: the folder is a run's.
  """
  workdir, state = of.workdir, of.state
  folder, name = epath.Path(out or f'{workdir}_release'), of.config.sample.params
  config_file.check_writable(folder, '--out', 'choose another --out')
  rule, remedy = 'a folder without checkpoints of a run', 'choose another --out'
  require(not (folder / 'checkpoints').exists(), '--out', str(folder), rule, remedy)
  if (folder / released.PARAMS).exists():  # an earlier release, of another step, perhaps
    for card in (folder / 'cards').glob('*.json'):
      card.unlink()
  released.write(folder, named_params(state, name), int(state.step))
  files.write(folder / config_file.CONFIG, files.json_text(of.config.to_dict()))
  for card in (epath.Path(workdir) / 'cards').glob(f'*_{name}_*step{int(state.step):08d}.json'):
    files.write(folder / 'cards' / card.name, card.read_bytes())
  size = (folder / released.PARAMS).stat().length / 1e6
  logging.info(
    '%s: %s parameters at step %d, %.3g MB, float16', folder, name, int(state.step), size
  )
  return 0
