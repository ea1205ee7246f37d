"""Fashion-MNIST by a perceptron: likelihoods in seconds, on a laptop CPU.

  python -m vdm.main --config=configs/fashion_mnist_mlp.py --config.data.dir=DIR
  python -m vdm.main --config=configs/fashion_mnist_mlp.py --config.data.dir=DIR --mode=eval \
    --config.eval.likelihood=elbo,ode

The bound of all 10,000 test images takes seconds, the probability-flow ODE some 2,400 evaluations
an image: give it --config.eval.max_images=100. The bits/dim are a perceptron's:
configs/fashion_mnist.py has the U-Net.
"""

from ml_collections import ConfigDict
from vdm.configs import default, fashion_mnist


def get_config(arg=''):
  """A residual perceptron with VDM's Fourier features, learned schedule."""
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = 'fashion_mnist_mlp'
    config.model = ConfigDict(
      dict(
        name='mlp',
        output='eps',
        width=64,
        num_blocks=2,
        fourier_exponents=(6, 7),
        dropout=0.0,
        class_conditional=False,
        condition_on='live',
        dtype='auto',
      )
    )
    config.schedule.name = 'learned_net'
    config.optimizer.learning_rate = 3e-3
    config.ema.halflife_images = 100_000
    config.train.update(batch_size=128, num_steps=4000, log_every_steps=500, eval_every_steps=2000)
    config.eval.update(batch_size=400, draws=2, max_images=0)
    config.checkpoint.every_steps = 2000
    if arg == 'debug':
      default.debug(config)
  return config.lock()
