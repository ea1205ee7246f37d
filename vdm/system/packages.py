"""Packages that are extras."""

import importlib.util
import os


def has_tensorflow() -> bool:
  """Returns whether TensorFlow is installed, an extra, which most of this package does without."""
  return importlib.util.find_spec('tensorflow') is not None


def require_tensorflow(what: str):
  """Raises ValueError if TensorFlow is missing, with `what` as the subject of the sentence.

  If it is there, it is kept from accelerators, which are JAX's.
  """
  if not has_tensorflow():
    raise ValueError(f"{what} needs TensorFlow; pip install 'vdm-jax[tensorflow]'.")
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  import tensorflow as tf

  for kind in ('GPU', 'TPU'):
    tf.config.set_visible_devices([], kind)  # before TensorFlow takes one from JAX
