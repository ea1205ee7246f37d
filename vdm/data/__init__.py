"""Examples in: `load` a split, then iterate over batches of it.

`load.KINDS` are the kinds of data; any other name is that of an image data set of TensorFlow
Datasets, read at random from ArrayRecord files through Grain. Nothing is ever downloaded here, and
reading imports no TensorFlow. `source.Batch` says what examples consist of.
"""

from vdm.data.batches import eval_batches, num_eval_images, train_batches
from vdm.data.identity import fingerprint
from vdm.data.load import classes, load, num_images
from vdm.data.pictures import centre_crop, decode
from vdm.data.source import Batch, Source, conditions_of, of_arrays

ORDER = (
  'source',
  'pictures',
  'identity',
  'digits',
  'gaussian_field',
  'tfds',
  'splits',
  'kept',
  'decoded',
  'folder',
  'columns',
  'arrays',
  'huggingface',
  'batches',
  'augment',
  'wavelet',
  'derive',
  'load',
  'settle',
  'prepare',
  '__init__',
  '__main__',
)

__all__ = [
  'Batch',
  'Source',
  'centre_crop',
  'classes',
  'conditions_of',
  'decode',
  'eval_batches',
  'fingerprint',
  'load',
  'num_eval_images',
  'num_images',
  'of_arrays',
  'train_batches',
]
