"""Your own folder of pictures, of any sizes; subfolders are classes.

python -m vdm.main --config=configs/my_folder.py --config.data.path=DIR
"""

from vdm.configs import default, fashion_mnist


def get_config(arg=''):
  """The recipe is that of configs/fashion_mnist.py, a short one for a CPU, on 32 x 32 in colour.

  For larger pictures see imagenet64.py. Samples are not scored in training, which takes classes:
  with them, --config.fid.train_every_steps=300.
  """
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = 'my_folder'
    config.data.update(name='folder', as_found=True, image_shape=(32, 32, 3), resize=True)
    config.fid.train_every_steps = 0
    if arg == 'debug':
      default.debug(config)
  return config.lock()
