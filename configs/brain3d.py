"""Crops 16^3 of the MNI152 brain, real data in three dimensions, with a mask of what is brain.

pip install nilearn && python examples/brain.py brain.npz
python -m vdm.main --config=configs/brain3d.py --config.data.path=brain.npz

The back of the head is held out. An hour on two CPU cores.
"""

from vdm.configs import default, fields3d


def get_config(arg=''):
  """The network and the recipe of configs/fields3d.py, with zero padding."""
  config = fields3d.get_config()
  with config.unlocked():
    config.name = 'brain3d'
    config.data.update(name='arrays', as_found=True, train_split='[:2850]', eval_split='[2850:]')
    config.model.padding = 'zero'
    if arg == 'debug':
      default.debug(config)
  return config.lock()
