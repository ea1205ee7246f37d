"""Fashion-MNIST by a small plain transformer on patches of 4 x 4.

  python -m vdm.main --config=configs/fashion_mnist_dit.py --config.data.dir=DIR
  python -m vdm.codec compress --workdir=runs/fashion_mnist_dit --split=test --num=200 \
    --num_timesteps=200 --out=fashion.vdm

It has 49 tokens and no convolution, and is meant to be quick, in training and for lossless codes.
It has not been trained to the end.
"""

from ml_collections import ConfigDict
from vdm.configs import default, fashion_mnist


def get_config(arg=''):
  """Four blocks of width 96, learned end points."""
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = 'fashion_mnist_dit'
    config.model = ConfigDict(
      dict(
        name='dit',
        output='eps',
        width=96,
        num_blocks=4,
        head_width=32,
        patch_size=4,
        bottleneck=0,
        conditioning_width=32,
        dropout=0.0,
        class_conditional=False,
        condition_on='live',
        dtype='auto',
      )
    )
    config.ema.halflife_images = 20_000
    config.train.update(num_steps=3000, log_every_steps=200, eval_every_steps=1500)
    config.fid.train_every_steps = 1500
    config.checkpoint.every_steps = 1500
    if arg == 'debug':
      default.debug(config)
  return config.lock()
