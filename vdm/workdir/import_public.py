"""Makes a run of a checkpoint of the public VDM code, google-research/vdm.

That code saves, by clu, `ckpt-<N>.flax` beside TensorFlow's files of the same name: a msgpack tree
with `step`, `params`, `ema_params` and `opt_state`. Parameters are `score_model` and `gamma`, which
is -log_snr. The optimizer's state is left: training goes on from a fresh one.
"""

import os
import re
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from msgpack.exceptions import UnpackException

from vdm import build
from vdm.diffusion.schedules import inverse_softplus
from vdm.errors import require
from vdm.nn import layers
from vdm.system import files, parallel
from vdm.workdir import checkpoint, config_file

PUBLIC_GROUPS = 32  # of channels, in every norm
# Which schedule of ours holds which leaves.
_SCHEDULES = {
  'learned_endpoints': {'gamma/w', 'gamma/b'},
  'learned_net': {
    f'gamma/{n}' for n in ('l1/kernel', 'l1/bias', 'l2/kernel', 'l2/bias', 'l3/kernel')
  },
}
# From the path of a leaf below score_model to its path in our network, one after the other.
_RENAMES = (
  (r'^(down|up)\.block_(\d+)/', r'\1_\2/'),
  (r'^(down|up)\.attn_(\d+)/', r'\1_\2_attention/'),
  (r'^mid\.block_1/', 'mid_0/'),
  (r'^mid\.block_2/', 'mid_1/'),
  (r'^mid\.attn_1/', 'mid_attention/'),
  (r'^dense(\d)/', r'conditioning/dense_\1/'),
  (r'^GroupNorm_0/', 'norm_out/'),
  (r'_attention/GroupNorm_0/', '_attention/norm/'),
  (r'/GroupNorm_(\d)/', r'/norm_\1/'),
  (r'/conv1/', '/conv_0/'),
  (r'/conv2/', '/conv_1/'),
  (r'/cond_proj/', '/cond/'),
  (r'/nin_shortcut/', '/shortcut/'),
  (r'/q/', '/query/'),
  (r'/k/', '/key/'),
  (r'/v/', '/value/'),
  (r'/proj_out/', '/out/'),
)


def convert(public: dict, params: Any, model: ConfigDict, schedule: str) -> dict[str, Any]:
  """Returns the public code's parameters as ours, the same function of (z, t) and of t.

  Args:
    public: {'score_model': ..., 'gamma': ...}, nested dictionaries of arrays.
    params: ours, of any values or abstract.
    model: config.model, which must describe the public network.
    schedule: config.schedule.name.

  Returns:
    {'network': ..., 'schedule': ...} of float32 arrays.

  Raises:
    ValueError: the config is of another model, or a leaf is missing, left over, of another shape or
      not finite; the message names it.
  """
  leaves = {path: np.asarray(leaf) for path, leaf in _flat(public).items()}
  _check_settings(model, schedule, leaves)
  of_schedule = {'learned_endpoints': _end_points, 'learned_net': _net}[schedule](leaves)
  ours = {f'schedule/{name}': leaf for name, leaf in of_schedule.items()}
  origin: dict[str, str] = {}
  for path, leaf in leaves.items():
    if not path.startswith('gamma/'):
      name = path.removeprefix('score_model/')
      for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
      name = f'network/{name}'
      if name in ours:
        raise ValueError(f'the checkpoint holds {origin[name]} and {path}, both for our {name}.')
      ours[name], origin[name] = leaf, path

  remedy = 'is this a checkpoint of google-research/vdm for this config.model and config.data?'
  wanted = _flat(params)
  for name in wanted.keys() - ours.keys():
    raise ValueError(f'the checkpoint holds nothing for {name}, {wanted[name].shape}; {remedy}')
  for name, leaf in ours.items():
    says = f'the checkpoint holds {origin.get(name, name)}, {leaf.shape}'
    if name not in wanted:
      raise ValueError(f'{says}, for which this config has no place; {remedy}')
    if leaf.shape != wanted[name].shape:
      raise ValueError(f'{says}, where this config has {wanted[name].shape}; {remedy}')
    if not np.isfinite(leaf).all():
      raise ValueError(f'{says}, with values that are not finite; import another checkpoint.')
  ours = {name: leaf.astype(np.float32) for name, leaf in ours.items()}
  return flax.traverse_util.unflatten_dict(ours, sep='/')


def _flat(tree: dict) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _check_settings(model: ConfigDict, schedule: str, leaves: dict[str, np.ndarray]):
  """Holds config.model and the schedule's name to what the leaves and the public code say."""
  _check_name(model.name)
  conv_in, conv_out = (leaves.get(f'score_model/conv_{way}/kernel') for way in ('in', 'out'))
  gamma = {path for path in leaves if path.startswith('gamma/')}
  schedules = [name for name, paths in _SCHEDULES.items() if paths == gamma]
  if conv_in is None or conv_out is None or not schedules:
    raise ValueError(
      'the checkpoint must hold score_model/conv_in, score_model/conv_out and the leaves of a '
      f'learned schedule, but of gamma it holds {", ".join(sorted(gamma)) or "nothing"}; is it one '
      'of google-research/vdm?'
    )
  settings = {
    'model.width': conv_in.shape[-1],
    'model.num_blocks': sum('down.block' in p and p.endswith('conv1/kernel') for p in leaves),
    'model.attention': any('down.attn' in path for path in leaves),
    'model.num_heads': 1,
    'model.norm_groups': norm_groups(conv_in.shape[-1]),
    'model.fourier_exponents': (6, 7) if conv_in.shape[2] > conv_out.shape[-1] else (),
    'model.output': 'eps',
    'model.class_conditional': False,
    'model.augmentation_flag': True,
    'model.condition_on': 'configured',
    'schedule.name': schedules[0],
  }
  values = {field: model[field.split('.')[1]] for field in settings if field[0] == 'm'}
  values['schedule.name'] = schedule
  wrong = [field for field, value in settings.items() if values[field] != value]
  if wrong:
    must = ', '.join(f'config.{f}={values[f]!r} must be {settings[f]!r}' for f in wrong)
    give = ' '.join(f'--config.{f}={settings[f]}'.replace(', ', ',') for f in wrong)
    raise ValueError(f"{must} to hold this checkpoint's network; give {give}.")


def _check_name(name: str):
  require(
    name == 'vdm_unet',
    'config.model.name',
    name,
    "'vdm_unet' to hold a checkpoint of the public VDM code",
    'use configs/cifar10.py',
  )


def norm_groups(width: int) -> int:
  """Returns the config.model.norm_groups that is 32 groups in a network of this width."""
  return 0 if layers.auto_groups(width) == PUBLIC_GROUPS else PUBLIC_GROUPS


def _end_points(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns log_snr_max and slope of gamma = b + |w| t, with b and w [1]."""
  return {'log_snr_max': -leaves['gamma/b'].squeeze(), 'slope': np.abs(leaves['gamma/w']).squeeze()}


def _net(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the leaves of our learned net for the public one, with K = 1024:

    gamma = |w1| t + b1 + 1/K sum_k |w3_k| (2 sigmoid(|w2_k| (2t - 1) + b2_k) - 1).

  This is |w1| h(t) + constant with the h of `vdm.diffusion.schedules.learned_net`,
  a_k = 2 |w3_k| / (K |w1|), b_k = |w2_k| and c_k = b2_k, and its end points are those of gamma.
  """
  w1, w2, w3 = (np.abs(np.float64(leaves[f'gamma/l{i}/kernel'])).ravel() for i in (1, 2, 3))
  b1, b2 = (np.float64(leaves[f'gamma/l{i}/bias']) for i in (1, 2))

  def gamma(t):
    return w1 * t + b1 + (w3 * np.tanh((w2 * (2 * t - 1) + b2) / 2)).mean()

  least = 1e-30  # softplus reaches no zero
  weights = {'a': 2 * w3 / (len(w3) * w1), 'b': w2}
  interior = {k: np.vectorize(inverse_softplus)(np.maximum(v, least)) for k, v in weights.items()}
  return {
    'log_snr_max': -gamma(0.0).squeeze(),
    'slope': (gamma(1.0) - gamma(0.0)).squeeze(),
    **{f'interior/{name}': leaf for name, leaf in interior.items()},
    'interior/c': b2,
  }


def newest(path: str) -> epath.Path:
  """Returns the newest `ckpt-<N>.flax` in a directory, or the one `path` names, with suffix or not.

  clu writes TensorFlow's files last, so if there are any, one without them was cut short.
  """
  named = epath.Path(path if path.endswith('.flax') else f'{path.rstrip("/")}.flax')
  if path and named.exists():
    return named
  found = [p for p in epath.Path(path).glob('*.flax') if re.fullmatch(r'.*-\d+', p.stem)]
  if not path or not found:
    raise ValueError(
      f'--checkpoint={path} holds no ckpt-<number>.flax; give the directory that does, which the '
      'public VDM code calls checkpoints-0, or one such file.'
    )
  whole = [p for p in found if p.with_suffix('.index').exists()]
  return max(whole or found, key=lambda p: int(p.stem.rpartition('-')[2]))


def read(path: epath.Path) -> dict[str, Any]:
  """Reads the tree at `path`: step, params, ema_params."""
  with files.reading(f'--checkpoint={path}', 'give a whole one of the public VDM code'):
    try:
      tree = flax.serialization.msgpack_restore(path.read_bytes())
    except (UnpackException, MemoryError) as error:
      raise ValueError(f'{type(error).__name__} {error}') from error
    found = {name: tree[name] for name in ('step', 'params', 'ema_params')}
    found['step'] = int(found['step'])
    for name in ('params', 'ema_params'):
      for leaf in jax.tree.leaves(dict(found[name])):
        np.asarray(leaf, np.float32)
  return found


def run(config: ConfigDict, workdir: os.PathLike | str, checkpoint_path: str) -> int:
  """Runs --mode=import_vdm: writes a workdir as a run would have left it at the checkpoint's step.

  Raises:
    ValueError: there is no checkpoint, the config is of another model, or the workdir is in use.
  """
  if any((epath.Path(workdir) / name).exists() for name in ('config.json', 'checkpoints')):
    raise ValueError(f'--workdir={workdir} holds a run; choose another --workdir to import into.')
  path = newest(str(files.path_of(checkpoint_path)) if checkpoint_path else '')
  _check_name(config.model.name)
  with config.unlocked():
    config.model.scan_blocks = 'off'  # as the public code names blocks; a restore may stack them
    config.model.norm_groups = norm_groups(config.model.width)
  model = build.model(config)
  build.check_devices(config, jax.device_count())
  public = read(path)
  mesh, init = parallel.make_mesh(config.parallel.fsdp), build.init_state(config, model)
  abstract = parallel.abstract_state(mesh, init)
  params, ema_params = (
    convert(public[name], abstract.params, config.model, config.schedule.name)
    for name in ('params', 'ema_params')
  )
  config_file.open_workdir(workdir, config)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

  def fill(params, ema_params):
    state = init(params)
    averages = dict.fromkeys(state.averages, ema_params)
    return state.replace(step=jnp.int32(public['step']), averages=averages)

  state = jax.jit(fill, out_shardings=shardings)(params, ema_params)
  with checkpoint.manager(workdir, config.checkpoint.keep) as writer:
    checkpoint.save(writer, int(state.step), state)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  logging.info('imported %s: step %d, %d parameters', path, int(state.step), count)
  return 0
