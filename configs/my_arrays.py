"""Your own arrays of real values on one, two or three axes: NPZ, NPY, HDF5 or zarr.

python -m vdm.main --config=configs/my_arrays.py --config.data.path=FILE

The file has `x` [N *spatial C] and, if you have them, `condition`, `vector`, `mask` and `label`:
each that is there is used, but for --config.data.ignore=mask and the like, and labels only with
--config.model.class_conditional=True. python -m vdm.data show --name=arrays --path=FILE says what
is found.
"""

from vdm.configs import default, gaussian_fields


def get_config(arg=''):
  """The recipe is that of configs/gaussian_fields.py, with zero padding."""
  config = gaussian_fields.get_config()
  with config.unlocked():
    config.name = 'my_arrays'
    config.data.update(name='arrays', as_found=True, condition_shape=())
    config.model.padding = 'zero'
    if arg == 'debug':
      default.debug(config)
  return config.lock()
