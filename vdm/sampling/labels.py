"""Gives the conditions of an image by its number: its class, vector, field and mask."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict, FrozenConfigDict

from vdm import data
from vdm.diffusion.gaussian import fold_in
from vdm.errors import require
from vdm.system import files

LABEL_RULES = ('balanced', 'uniform')


Labels = Callable[[np.ndarray], np.ndarray]  # image numbers [b] -> classes [b]
# image numbers [b] -> what each is conditioned on (`data.source.CONDITIONS`)
Conditions = Callable[[np.ndarray], dict[str, np.ndarray]]


def conditions_of(
  settings: ConfigDict, data_settings: ConfigDict, class_conditional: bool, own: bool = False
) -> Conditions:
  """Returns image number -> what it is conditioned on.

  Classes are those of `labels_of`. Vectors are the rows of settings.embeddings, in turn; without
  that file, and for fields and masks, they are those of the evaluation split, whose own classes
  then go with them.

  Args:
    settings: config.sample.
    data_settings: config.data.
    class_conditional: whether the model reads classes.
    own: whether all are those of the evaluation split, whatever `settings` say.
  """
  labels = labels_of(settings, data_settings, class_conditional)
  size, path = data_settings.embedding_size, '' if own else settings.embeddings
  vectors = embeddings_of(path, data_settings) if size and path else None
  taken = set()
  if size and not path:
    taken.add('vector')
  if data_settings.condition_shape:
    taken.add('condition')
  if data_settings.masked:
    taken.add('valid')
  if class_conditional and (own or (taken and settings.label < 0)):
    taken.add('label')
  source = data.load(data_settings, 'eval') if taken else None

  def of(index):
    found = {'label': labels(index)}
    if vectors is not None:
      found['vector'] = vectors(index)
    if source is not None:
      batch = source.fetch(index % len(source))
      found |= {name: batch[name] for name in taken}
    return found

  return of


def labels_of(settings: ConfigDict, data_settings: ConfigDict, class_conditional: bool) -> Labels:
  """Returns image number -> class: settings.label; if that is -1, by settings.label_rule.

  'balanced' takes each class in turn, 'uniform' draws one from the image's own key; for a
  class-conditional model they take only classes of which the training split has images.

  Args:
    settings: config.sample.
    data_settings: config.data.
    class_conditional: whether the model reads classes.
  """
  classes = max(1, data_settings.num_classes)
  label, rule = settings.label, settings.label_rule
  fact, remedy = f'a class, 0 .. {classes - 1}, or -1', 'use -1 for config.sample.label_rule'
  require(-1 <= label < classes, 'config.sample.label', label, fact, remedy)
  choices = ' or '.join(map(repr, LABEL_RULES))
  require(rule in LABEL_RULES, 'config.sample.label_rule', rule, choices, 'choose one')

  if label >= 0:
    return lambda index: np.full(len(index), label, np.int32)
  drawn = drawn_classes(data_settings, class_conditional)

  def uniform(index):
    keys = fold_in(jax.random.key(settings.seed), jnp.asarray(index))
    keys = fold_in(keys, jnp.full(len(index), 2))  # `samplers.sample` splits them in two: 0 and 1
    numbers = np.asarray(jax.vmap(lambda key: jax.random.randint(key, (), 0, len(drawn)))(keys))
    return drawn[numbers].astype(np.int32)

  return uniform if rule == 'uniform' else lambda index: drawn[index % len(drawn)].astype(np.int32)


def drawn_classes(data_settings: ConfigDict, class_conditional: bool) -> np.ndarray:
  """Returns the classes that config.sample.label_rule draws from."""
  if class_conditional:
    return _classes_with_images(FrozenConfigDict(data_settings))
  return np.arange(max(1, data_settings.num_classes))


@functools.lru_cache
def _classes_with_images(settings: FrozenConfigDict) -> np.ndarray:
  """Returns the classes of config.data's training split; if it is not here, all, and says so."""
  every = np.arange(settings.num_classes)
  try:
    source = data.load(settings, 'train')
  except ValueError as error:
    cause = str(error).partition(';')[0]  # what is to be done about it matters to training alone
    logging.info(
      'labels are drawn from all %d classes, not those with images: %s', len(every), cause
    )
    return every
  found = data.classes(source, len(every))
  if len(found) < len(every):
    missing = np.setdiff1d(every, found)
    logging.warning(
      '%d of %d classes have no images in %r and are not drawn: %s%s',
      len(missing),
      len(every),
      settings.train_split,
      ', '.join(map(str, missing[:8])),
      ', ...' if len(missing) > 8 else '',
    )
  return found


def embeddings_of(path: str, data_settings: ConfigDict) -> Callable[[np.ndarray], np.ndarray]:
  """Returns image numbers [b] -> vectors float32 [b, E] of a file with an array [N, E], in turn."""
  size = data_settings.embedding_size
  with files.reading(f'config.sample.embeddings={path!r}', 'name a file of np.save'):
    rows = np.asarray(np.load(files.path_of(path), allow_pickle=False, mmap_mode='r'))
  good = rows.ndim == 2 and rows.shape[1] == size and len(rows) > 0 and np.isfinite(rows).all()
  fact = f'an array [N, {size}] of finite numbers, not {rows.dtype} {list(rows.shape)}'
  require(good, 'config.sample.embeddings', path, fact, 'see config.data.embedding_size')
  return lambda index: rows[index % len(rows)].astype(np.float32)
