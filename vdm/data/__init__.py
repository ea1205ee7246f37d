"""Examples in: `load` a split, then iterate over batches of it.

There are two kinds of data sets: `digits` (8x8, embedded in scikit-learn, for offline runs and
tests), and any image data set of TensorFlow Datasets by name, read at random from ArrayRecord files
through Grain. Nothing is ever downloaded here, and reading imports no TensorFlow. Images are uint8
[H, W, C], labels int32 or embeddings float32 [E].
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
