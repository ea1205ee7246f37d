"""The optimizer, and the decays of the averages."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from vdm.diffusion import averages


def ema_decays(
  settings: ConfigDict, batch_size: int, step: jax.Array | int
) -> dict[str, jax.Array]:
  """Returns the decay at `step` of each average that config.ema asks for, by name, 'ema' first."""
  halflives = {'ema': settings.halflife_images}
  halflives |= {f'halflife_{images:g}': images for images in settings.extra_halflives_images}
  decays = {
    name: averages.exponential_decay(step, batch_size, images, settings.rampup_ratio)
    for name, images in halflives.items()
  }
  return decays | {f'std_{std:g}': averages.power_decay(step, std) for std in settings.power_stds}


def decay_mask(params: Any) -> Any:
  """Returns True where weight decay applies: to the network's kernels, and to nothing else.

  It does not apply to the schedule (decay would narrow the learned log-SNR range), biases, norms or
  embeddings.
  """

  def decays(path, _):
    return path[0].key == 'network' and path[-1].key == 'kernel'

  return jax.tree_util.tree_map_with_path(decays, params)


def optimizer(
  num_steps: int,
  learning_rate: float,
  warmup_steps: int,
  decay: str,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
  schedule_rate: float,
) -> optax.GradientTransformation:
  """Returns AdamW with linear warm-up, then constant or cosine to zero; it can clip to a norm.

  Update number k of a warm-up over N, k = 1 .. N, has k/N of the learning rate: none is in vain.

  The schedule's parameters move `schedule_rate` times as fast: Adam moves any parameter by about
  the learning rate, and end points are a hundred times as large as weights.
  """
  rate = {
    'constant': lambda: optax.constant_schedule(learning_rate),
    'cosine': lambda: optax.cosine_decay_schedule(learning_rate, max(1, num_steps - warmup_steps)),
  }[decay]()
  if warmup_steps:
    warmup = lambda count: learning_rate * (count + 1) / warmup_steps
    rate = optax.join_schedules([warmup, rate], [warmup_steps])
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
  faster = []
  if schedule_rate != 1:
    faster = [optax.masked(optax.scale(schedule_rate), is_schedule)]
  return optax.chain(*clip, adamw, *faster)


def is_schedule(params: Any) -> Any:
  """Returns True for the schedule's parameters, False for the network's."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == 'schedule', params)
