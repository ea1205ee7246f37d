"""Your own folder of pictures, of any sizes; subfolders are classes.

python -m vdm.main --config=configs/my_folder.py --config.data.path=DIR
"""

from vdm.configs import default, fashion_mnist


def get_config(arg=''):
  """The recipe is that of configs/fashion_mnist.py; for larger pictures see imagenet64.py."""
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = 'my_folder'
    config.data.update(name='folder', as_found=True, image_shape=(32, 32, 3), resize=True)
    if arg == 'debug':
      default.debug(config)
  return config.lock()
