"""Inception's weights: converted once from a published file, then read from an NPZ of ours.

The published files hold the same numbers: torch-fidelity's
`weights-inception-2015-12-05-6726825d.pth` (pytorch-fid has it as `pt_inception-...`), and the
frozen graph `classify_image_graph_def.pb` of `inception-2015-12-05.tgz`. torch and TensorFlow are
imported here only, to read theirs.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vdm.fid.inception import SIDE, Inception, conv_names
from vdm.system import files, packages

NAME = 'inception-2015-12-05'
# sha256 of files whose weights are known to be Inception's.
PUBLISHED = {
  '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2': (
    'weights-inception-2015-12-05-6726825d.pth'
  ),
}
FETCH = (
  'fetch weights-inception-2015-12-05-6726825d.pth from the releases (v0.2.0) of '
  'github.com/toshas/torch-fidelity, and run: python -m vdm.fid convert FILE'
)
EPSILON = 1e-3  # of batch normalisation

Params = dict[str, np.ndarray]  # {'mixed/tower/conv/kernel': [H, W, I, O], ..., 'softmax': ...}


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
  """Returns the shape of every array of `Params`."""
  abstract = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  tree = jax.eval_shape(Inception().init, jax.random.key(0), abstract)['params']
  return {name: leaf.shape for name, leaf in flatten_dict(tree, sep='/').items()}


def nested(params: Params) -> dict:
  """Returns params as the tree that the network takes."""
  split = {name: _split(name) for name in params}
  return unflatten_dict({split[name]: value for name, value in params.items()})


def _split(name: str) -> tuple[str, ...]:
  """Splits 'mixed/tower/conv/kernel' in block, path, parameter: 'mixed', 'tower/conv', 'kernel'."""
  first, _, rest = name.partition('/')
  middle, _, last = rest.rpartition('/')
  return tuple(part for part in (first, middle, last) if part)


# --- names in the torch file, block by block, in the order of `inception.BLOCKS`

_TORCH_35 = (
  'branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool'
)
_TORCH_17 = (
  'branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 '
  'branch7x7dbl_4 branch7x7dbl_5 branch_pool'
)
_TORCH_8 = (
  'branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a '
  'branch3x3dbl_3b branch_pool'
)
_TORCH_BLOCKS = {
  'Mixed_5b': _TORCH_35,
  'Mixed_5c': _TORCH_35,
  'Mixed_5d': _TORCH_35,
  'Mixed_6a': 'branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3',
  'Mixed_6b': _TORCH_17,
  'Mixed_6c': _TORCH_17,
  'Mixed_6d': _TORCH_17,
  'Mixed_6e': _TORCH_17,
  'Mixed_7a': ('branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4'),
  'Mixed_7b': _TORCH_8,
  'Mixed_7c': _TORCH_8,
}
_TORCH_STEM = 'Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3'


def torch_names() -> dict[str, str]:
  """Returns {our name of a convolution: the torch file's}."""
  theirs = _TORCH_STEM.split()
  theirs += [f'{block}.{name}' for block, text in _TORCH_BLOCKS.items() for name in text.split()]
  return dict(zip(conv_names(), theirs, strict=True))


# --- reading


def convert(path: str, out: str, allow_unknown: bool = False) -> str:
  """Writes the NPZ that `read` reads, from a published file.

  Args:
    path: a .pth of torch-fidelity, or a frozen TensorFlow graph, .pb.
    out: the NPZ; '' is where `config.fid.weights=''` looks for it.
    allow_unknown: take a file that is none of PUBLISHED.

  Returns:
    A sentence that says what was done.

  Raises:
    ValueError: the file is not there, is unknown, or lacks a weight or has one of another shape.
  """
  source = pathlib.Path(path)
  if not source.is_file():
    raise ValueError(f'{path} is no file; {FETCH}.')
  digest = hashlib.sha256(source.read_bytes()).hexdigest()
  if digest not in PUBLISHED and not allow_unknown:
    raise ValueError(
      f'{path} has sha256 {digest}, which is not that of {", ".join(PUBLISHED.values())}: '
      'cut short, or another file; fetch it again, or give --allow_unknown to take it as it is '
      '(a TensorFlow graph, or weights of your own).'
    )
  tensors = _read_graph(source) if source.suffix == '.pb' else _read_torch(source)
  params = {}
  for name, shape in shapes().items():
    if name not in tensors:
      raise ValueError(f'{path} lacks the weights of {name}; it is no Inception of 2015-12-05.')
    if tensors[name].shape != shape:
      raise ValueError(
        f'{path} has {name} of shape {tensors[name].shape}, must be {shape}; '
        'it is no Inception of 2015-12-05.'
      )
    params[name] = np.asarray(tensors[name], np.float32)
  known = digest in PUBLISHED
  name = NAME if known else f'inception-{fingerprint(params)[:8]}'
  target = pathlib.Path(out) if out else files.cache_folder() / 'inception.npz'
  write(target, params, {'name': name, 'source': source.name, 'source_sha256': digest})
  return f'wrote {target}: {name}, from {source.name} (sha256 {digest})'


def _folded(name: str, kernel, gamma, beta, mean, variance) -> Params:
  """Returns a convolution with its batch normalisation as scale and bias, folded in float64."""
  gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in (gamma, beta, mean, variance))
  scale = gamma / np.sqrt(variance + EPSILON)
  return {f'{name}/kernel': kernel, f'{name}/scale': scale, f'{name}/bias': beta - mean * scale}


def _collect(fold: Callable[[str], Params], logits: Callable[[], np.ndarray]) -> Params:
  """Returns what there is of the weights; `convert` says what is missing."""
  params = {}
  for name in conv_names():
    try:
      params |= fold(name)
    except KeyError:
      return params
  try:
    return params | {'softmax': logits()}
  except KeyError:
    return params


def _read_torch(path: pathlib.Path) -> Params:
  import torch

  try:
    state = torch.load(path, map_location='cpu', weights_only=True)
    state = {name: tensor.numpy() for name, tensor in state.items()}
  except Exception as error:  # torch raises a different one for every way a file can be wrong
    raise ValueError(f'{path} is no weights file of torch, or is cut short; {FETCH}.') from error
  theirs = torch_names()

  def fold(name):
    conv, norm = f'{theirs[name]}.conv.weight', f'{theirs[name]}.bn'
    parts = (state[f'{norm}.{p}'] for p in ('weight', 'bias', 'running_mean', 'running_var'))
    return _folded(name, state[conv].transpose(2, 3, 1, 0), *parts)

  return _collect(fold, lambda: state['fc.weight'].T)


def _read_graph(path: pathlib.Path) -> Params:
  """Reads the constants of a frozen graph; its normalisation may be told to ignore gamma."""
  packages.require_tensorflow(f'{path}: reading a frozen graph')
  import tensorflow as tf

  graph = tf.compat.v1.GraphDef()
  try:
    graph.ParseFromString(path.read_bytes())
  except Exception as error:  # protobuf's own DecodeError, which is not TensorFlow's to import
    raise ValueError(f'{path} is no frozen TensorFlow graph, or is cut short.') from error
  nodes = {node.name: node for node in graph.node}
  value = lambda name: tf.make_ndarray(nodes[name].attr['value'].tensor)

  def fold(name):
    kernel = value(f'{name}/conv2d_params')
    norm = f'{name}/batchnorm'
    parts = [value(f'{norm}/{p}') for p in ('gamma', 'beta', 'moving_mean', 'moving_variance')]
    if norm in nodes and not nodes[norm].attr['scale_after_normalization'].b:
      parts[0] = np.ones_like(parts[0])
    return _folded(name, kernel, *parts)

  return _collect(fold, lambda: value('softmax/weights'))


# --- the file of ours


def fingerprint(params: Params) -> str:
  """Returns the sha256 of all names, shapes and bytes."""
  digest = hashlib.sha256()
  for name in sorted(params):
    array = np.ascontiguousarray(params[name])
    digest.update(f'{name} {array.dtype} {array.shape} '.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def write(path: pathlib.Path, params: Params, facts: dict):
  """Writes params and facts as one NPZ, atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  with part.open('wb') as file:
    facts = json.dumps(facts | {'sha256': fingerprint(params)})
    np.savez(file, facts=np.array(facts), **params)
  os.replace(part, path)


def read(path: pathlib.Path, remedy: str) -> tuple[Params, dict]:
  """Reads params and facts, checked against the sha256 that was written with them."""
  with files.reading(f'config.fid.weights: {path}', remedy):
    arrays = files.read_arrays(path, remedy)
    facts = dict(json.loads(str(arrays.pop('facts'))))
    facts['sha256'], facts['name'] = str(facts['sha256']), str(facts['name'])
  found = fingerprint(arrays)
  if found != facts['sha256']:
    raise ValueError(
      f'config.fid.weights: {path} has weights of sha256 {found[:8]}, but was written with '
      f'{facts["sha256"][:8]}: it is damaged; {remedy}.'
    )
  return arrays, facts


def inception(path: str) -> tuple[Params, dict]:
  """Returns Inception's params as `config.fid.weights` names them, with their facts.

  Raises:
    ValueError: they are not there; it says what to fetch, and where it goes.
  """
  target = pathlib.Path(path).expanduser() if path else files.cache_folder() / 'inception.npz'
  if not target.exists():
    raise ValueError(
      f"config.fid.features='inception' needs its weights in {target}, where there are none; "
      f'{FETCH} {target}.'
    )
  params, facts = read(target, f'{FETCH} {target}')
  wrong = [name for name, shape in shapes().items() if params.get(name, np.zeros(0)).shape != shape]
  if wrong:
    raise ValueError(f'config.fid.weights={str(target)!r} has no {wrong[0]} of Inception; {FETCH}.')
  return params, facts
