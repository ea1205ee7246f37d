"""Fashion-MNIST by a small U-ViT: exact likelihoods of the whole test set on a laptop CPU.

  python -m vdm.main --config=configs/fashion_mnist_uvit.py --config.data.dir=DIR
  python -m vdm.main --config=configs/fashion_mnist_uvit.py --config.data.dir=DIR --mode=eval \
    --config.eval.likelihood=elbo,ode --config.eval.max_images=0

Minutes each. Without Fourier features the field of the probability-flow ODE is smooth: some 50
evaluations an image, where sin(2 pi 2^7 z) makes it hundreds.
"""

from ml_collections import ConfigDict
from vdm.configs import default, fashion_mnist


def get_config(arg=''):
  """A quarter of a million parameters, learned end points."""
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = 'fashion_mnist_uvit'
    config.model = ConfigDict(
      dict(
        name='uvit',
        output='eps',
        widths=(32,),
        num_blocks=1,
        transformer_width=64,
        transformer_depth=2,
        head_width=32,
        patch_size=2,
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
    config.eval.ode.update(rtol=1e-2, atol=1e-2)
    config.checkpoint.every_steps = 1500
    if arg == 'debug':
      default.debug(config)
  return config.lock()
