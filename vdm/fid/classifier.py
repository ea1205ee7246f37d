"""A small convolutional network, trained on the labelled data at hand: features that work offline.

Distances between its features are called FD-classifier, never FID: they compare with nothing but
themselves. It is trained once from a fixed seed and kept; its name has the sha256 of its weights,
since another machine's rounding makes another network.
"""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from vdm import data
from vdm.diffusion.decoders import to_grid
from vdm.errors import require
from vdm.fid import weights
from vdm.fid.network import Network
from vdm.system import files

NUM_FEATURES = 64
RECIPE = dict(widths=(32, 64), batch_size=128, num_steps=600, learning_rate=2e-3, seed=0)


class Classifier(nn.Module):
  """Maps x [B, H, W, C] in [-1, 1] to features [B, 64], before the last ReLU, and logits [B, K]."""

  num_classes: int

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate(RECIPE['widths']):
      x = nn.relu(nn.Conv(width, (3, 3), (2, 2), precision='highest', name=f'conv_{i}')(x))
    x = x.reshape(len(x), -1)
    features = nn.Dense(NUM_FEATURES, precision='highest', name='features')(x)
    logits = nn.Dense(self.num_classes, precision='highest', name='logits')(nn.relu(features))
    return {'features': features, 'logits': logits}


def classifier_network(settings, data_settings) -> Network:
  """Returns the network of `config.fid.features='classifier'`: reads it, or trains and keeps it.

  Raises:
    ValueError: the data set has no labels.
  """
  require(
    data_settings.num_classes > 1,
    'config.fid.features',
    'classifier',
    'trained on labels, and config.data.num_classes is 0',
    "set config.fid.train_every_steps=0 to score no samples in training, use 'inception', or bring "
    'a data set with labels',
  )
  source = data.load(data_settings, 'train')
  # These leave out where it lies, and the fields that say only how it was checked.
  made_of = {'data': source.identity, 'classes': data_settings.num_classes, 'recipe': RECIPE}
  text = json.dumps(made_of, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  path = pathlib.Path(settings.weights or files.cache_folder() / f'classifier_{digest[:16]}.npz')
  path = path.expanduser()
  model = Classifier(data_settings.num_classes)

  def make(blank):
    return _read_or_train(blank, path, digest, model, source, data_settings.num_values)

  params = _everywhere(make, model, data_settings.image_shape)
  sha256 = weights.fingerprint(flatten_dict(params, sep='/'))
  return Network(
    name=f'classifier-{sha256[:16]}',
    label='classifier',
    sha256=sha256,
    num_features=NUM_FEATURES,
    params=params,
    prepare=lambda images: to_grid(images.astype(jnp.int32), data_settings.num_values),
    apply=lambda params, x: model.apply({'params': params}, x),
  )


def _everywhere(make, model, image_shape):
  """Returns on all processes the parameters that make() returns on the first one."""
  blank = _init(model, image_shape)
  made = make(blank) if jax.process_index() == 0 else blank
  if jax.process_count() > 1:
    made = multihost_utils.broadcast_one_to_all(made)
  return jax.tree.map(np.asarray, made)


def _init(model, image_shape):
  key = jax.random.key(RECIPE['seed'])
  return model.init(key, jnp.zeros((1, *image_shape)))['params']


def _read_or_train(params, path: pathlib.Path, digest: str, model, source, num_values: int):
  remedy = 'remove it, to train it again, or name another file'
  if path.exists():
    flat, facts = weights.read(path, remedy)
    if facts['made_of_sha256'] != digest:
      raise ValueError(
        f'config.fid.weights={str(path)!r} is a classifier of other data or recipe; {remedy}.'
      )
    return unflatten_dict(flat, sep='/')
  logging.info('training the classifier of FD-classifier, %d steps', RECIPE['num_steps'])
  params, accuracy = _train(params, model, source, num_values)
  facts = {'name': 'classifier', 'made_of_sha256': digest, 'data': source.identity}
  weights.write(path, flatten_dict(params, sep='/'), facts | {'train_accuracy': accuracy})
  logging.info('classifier: %.4f of the last training images right; kept as %s', accuracy, path)
  return params


def _train(params, model, source, num_values: int):
  """Trains by Adam on the cross-entropy, on one device.

  Returns params, and the accuracy over the last 20 batches.
  """
  optimizer = optax.adam(optax.cosine_decay_schedule(RECIPE['learning_rate'], RECIPE['num_steps']))

  def loss(params, x, label):
    logits = model.apply({'params': params}, x)['logits']
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return entropy.mean(), (logits.argmax(axis=1) == label).mean()

  @jax.jit
  def step(params, state, image, label):
    x = to_grid(image.astype(jnp.int32), num_values)
    (_, right), gradient = jax.value_and_grad(loss, has_aux=True)(params, x, label)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, right

  batches = data.train_batches(
    source,
    batch_size=RECIPE['batch_size'],
    seed=RECIPE['seed'],
    start_step=0,
    process_index=0,
    process_count=1,
  )
  state, rights = optimizer.init(params), []
  for _, batch in zip(range(RECIPE['num_steps']), batches, strict=False):
    params, state, right = step(params, state, batch['image'], batch['label'])
    rights.append(right)
  return jax.device_get(params), float(np.mean(jax.device_get(rights[-20:])))
