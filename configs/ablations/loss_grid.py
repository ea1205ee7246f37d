"""What a plain transformer predicts, by the space of its loss, by the size of its patches.

  python -m vdm.ablate --config=configs/ablations/loss_grid.py --workdir=DIR --workers=2
  python -m vdm.ablate --config=configs/ablations/loss_grid.py:fashion_mnist --workdir=DIR \
    --config.base.data.dir=DIR

x, eps or v predicted, and the error of x, eps or v as the loss: nine ways to train one network,
which are three weightings of one loss (`vdm.diffusion.heads.loss_ratio`) by three heads. Times are
those of the adaptive schedule, so that no weighting has a noisier loss than another. At patches of
4 x 4 a token is 16 pixels and as wide as these: noise, which fills all 16, then leaves no room for
what is to be computed, and the pictures, which do not, still do (JiT, arXiv 2511.13720, has 768
pixels in 768 channels). eps is predicted without z added to it, which would be such room.

81 runs on digits, of three seeds. On Fashion-MNIST 36 of one, of which the first nine, whose 784
tokens are pixels, are for an accelerator: --index names the others. --config=...:debug and
:fashion_mnist_debug have two patches, two heads, one seed and four steps.
"""

from ml_collections import ConfigDict
from vdm.configs import default, digits_dit, fashion_mnist_dit

HEADS = ('eps', 'v', 'x')


def get_config(arg=''):
  """See vdm/ablate.py: `base`, `axes`, `evaluations`, `reference`."""
  small, fashion = arg.endswith('debug'), arg.startswith('fashion_mnist')
  base = (fashion_mnist_dit if fashion else digits_dit).get_config()
  patches = (1, 2, 4, 7) if fashion else (1, 2, 4)
  with base.unlocked():
    base.name = 'loss_grid'
    width = 48 if fashion else 16
    base.model.update(width=width, head_width=width // 2, residual=False)
    base.schedule = ConfigDict(dict(name='adaptive', log_snr_min=-8.0, log_snr_max=8.0))
    steps = 1500 if fashion else 1000
    rate = 1e-3 if fashion else 5e-3
    base.optimizer.update(kind='adamw', learning_rate=rate, clip_norm=0.0, decay='cosine')
    base.train.update(num_steps=steps, eval_every_steps=steps, log_every_steps=steps // 10)
    base.eval.update(draws=8, params='ema')
    base.sample.update(num_images=360, batch_size=72, preview_images=36, num_steps=32)
    base.sample.grid = ConfigDict(dict(name='edm_train', std=5.0))
    base.fid.update(train_every_steps=steps, train_images=360)
    base.checkpoint.update(every_steps=steps, keep=1)
    if small:
      default.debug(base)
  heads, patches = (HEADS[::2], patches[-2:]) if small else (HEADS, patches)
  seeds = range(1 if small or fashion else 3)
  axes = dict(
    patch={f'p{size}': dict(model=dict(patch_size=size)) for size in patches},
    prediction={head: dict(model=dict(output=head)) for head in heads},
    space={f'{head}-loss': dict(weighting=dict(name='sd3', head=head)) for head in heads},
    seed={str(seed): dict(seed=seed) for seed in seeds},
  )
  return ConfigDict(dict(base=base, axes=axes, evaluations=(32,), reference={})).lock()
