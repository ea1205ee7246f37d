"""Your own arrays of real values on one, two or three axes: NPZ, NPY, HDF5 or zarr.

python -m vdm.main --config=configs/my_arrays.py --config.data.path=FILE
python -m vdm.main --config=configs/my_arrays.py:large --config.data.path=FILE

The file has `x` [N *spatial C] and, if you have them, `condition`, `vector`, `mask` and `label`:
each that is there is used, but for --config.data.ignore=mask and the like, and labels only with
--config.model.class_conditional=True. python -m vdm.data show --name=arrays --path=FILE says what
is found.
"""

from vdm.configs import default, fields3d, gaussian_fields


def get_config(arg=''):
  """The recipe is that of configs/gaussian_fields.py, with zero padding.

  Its network keeps all positions, and attends over all: for up to some 64 x 64, or 16^3. `large`
  has one that halves the array three times, and attends at the coarsest level alone: for 256 x 256,
  or 64^3, of sizes that need not divide; `large_debug` shrinks it as `debug` does the other.
  """
  config = gaussian_fields.get_config()
  with config.unlocked():
    config.name = 'my_arrays'
    config.data.update(name='arrays', as_found=True, condition_shape=())
    config.model.padding = 'zero'
    if arg in ('large', 'large_debug'):
      config.name = 'my_large_arrays'
      config.model = fields3d.get_config().model.to_dict() | dict(
        width=32,
        channel_multipliers=(1, 2, 2, 4),
        head_width=32,
        padding='zero',
        fit_size=True,
        remat=False,
      )
      config.train.batch_size = 16
      config.eval.update(batch_size=16, draws=4)
      config.sample.update(num_images=16, preview_images=16, batch_size=16)
    if arg in ('debug', 'large_debug'):
      default.debug(config)
  return config.lock()
