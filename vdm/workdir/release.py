"""--mode=release: a model to give away, of a run."""

import os
import pathlib

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vdm.build.state import named_params
from vdm.system import files
from vdm.workdir import config_file, released
from vdm.workdir.load import read_run


def run(
  config: ConfigDict,
  workdir: os.PathLike | str,
  step: str = 'newest',
  out: pathlib.Path | None = None,
) -> int:
  """Writes config.sample.params of a run, its config and the number cards of that step.

  The folder is `out`, or <workdir>_release: a tenth of a checkpoint's size, to be evaluated and
  sampled from with --workdir=<folder>.
  """
  own, _, _, state = read_run(config, workdir, step)
  folder, name = epath.Path(out or f'{workdir}_release'), own.sample.params
  config_file.check_writable(folder, '--out', 'choose another --out')
  released.write(folder, named_params(state, name), int(state.step))
  files.write(folder / config_file.CONFIG, files.json_text(own.to_dict()))
  for card in (epath.Path(workdir) / 'cards').glob(f'*_{name}_*step{int(state.step):08d}.json'):
    files.write(folder / 'cards' / card.name, card.read_bytes())
  size = (folder / released.PARAMS).stat().length / 1e6
  logging.info(
    '%s: %s parameters at step %d, %.3g MB, float16', folder, name, int(state.step), size
  )
  return 0
