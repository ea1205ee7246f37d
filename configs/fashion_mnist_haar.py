"""Fashion-MNIST as a cascade of Haar scales: the garments' coarse quarter, and details given it.

  python -m vdm.main --config=configs/fashion_mnist_haar.py:details1 --config.data.dir=DIR
  python -m vdm.main --config=configs/fashion_mnist_haar.py:details2 --config.data.dir=DIR
  python -m vdm.main --config=configs/fashion_mnist_haar.py:coarse2 --config.data.dir=DIR
  python -m benchmarks.cascade runs/fashion_mnist_haar_{details1,details2,coarse2}

Pixels get uniform noise in [0, 1) (`vdm.data.wavelet`), so that the bounds of the three, densities
of coefficients, add up to a bound of the pixels. The three networks together take .62 of the FLOPs
per image of configs/fashion_mnist.py (`forward_flops` of benchmarks/parameters.py). Without a name
of a stage it is coarse2.
"""

from vdm.configs import default, fashion_mnist

STAGES = {  # derive, level, side, channels, whether there is a condition
  'details1': ('haar_details', 1, 14, 3, True),
  'details2': ('haar_details', 2, 7, 3, True),
  'coarse2': ('haar_coarse', 2, 7, 1, False),
}


def get_config(arg=''):
  """A VDM U-Net of width 48 for each scale, learned end points, densities."""
  stage, _, preset = arg.rpartition('_') if arg.endswith('debug') else (arg, '', '')
  name = f'fashion_mnist_haar_{stage}' if stage else 'fashion_mnist_haar'
  stage = stage or 'coarse2'
  derive, level, side, channels, given = STAGES[stage]
  config = fashion_mnist.get_config()
  with config.unlocked():
    config.name = name
    config.data.update(
      derive=derive,
      level=level,
      dequantize=256,
      num_values=0,
      image_shape=(side, side, channels),
      condition_shape=(side, side, 1) if given else (),
    )
    config.decoder.name = 'normal'
    config.model.update(width=48, fourier_exponents=())
    config.schedule.update(log_snr_min=-6.0, log_snr_max=12.0)
    config.fid.train_every_steps = 0
    if preset == 'debug':
      default.debug(config)
  return config.lock()
