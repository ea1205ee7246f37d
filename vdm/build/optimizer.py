"""The optimizer, and what each of the averages takes of new parameters."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from vdm.diffusion import averages
from vdm.nn import blocks


def ema_shares(
  settings: ConfigDict, batch_size: int, step: jax.Array | int
) -> dict[str, jax.Array]:
  """Returns the share at `step` of the newest parameters in each average, by name, 'ema' first."""
  halflives = {'ema': settings.halflife_images}
  halflives |= {f'halflife_{images:g}': images for images in settings.extra_halflives_images}
  shares = {
    name: averages.exponential_share(step, batch_size, images, settings.rampup_ratio)
    for name, images in halflives.items()
  }
  return shares | {f'std_{std:g}': averages.power_share(step, std) for std in settings.power_stds}


def kernels(params: Any) -> Any:
  """Returns True for the network's kernels, to which alone weight decay applies.

  It does not apply to the schedule (decay would narrow the learned log-SNR range), biases, norms or
  embeddings.
  """

  def is_kernel(path, _):
    return path[0].key == 'network' and path[-1].key == 'kernel'

  return jax.tree_util.tree_map_with_path(is_kernel, params)


def as_matrices(params: Any) -> Any:
  """Returns which axes of each of the `kernels` are inputs, and which one is the output.

  What is stacked over blocks is as many matrices.
  """

  def axes(path, leaf):
    first = int(bool(blocks.stacked_names(part.key for part in path)))
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

  return jax.tree_util.tree_map_with_path(axes, params)


def optimizer(
  num_steps: int,
  kind: str,
  moments: str,
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
  """Returns AdamW or Muon with linear warm-up, then a decay of its rate; it can clip to a norm.

  Update number k of a warm-up over N, k = 1 .. N, has k/N of the learning rate: none is in vain.

  Muon is for the network's kernels, each as a matrix of inputs by outputs, and AdamW for all else;
  b1, b2 and eps are AdamW's alone. The root mean square of a kernel's update is 0.2 of the learning
  rate, about that of Adam's updates (arXiv 2502.16982, section 2.2), so that one rate serves both.

  `moments` is the type of the first moments: with bfloat16 AdamW's state is a quarter smaller, and
  Muon's of a kernel half as large. A second moment, which changes by a share of 1 - b2 per step,
  would stand still in bfloat16.

  The schedule's parameters move `schedule_rate` times as fast: Adam moves any parameter by about
  the learning rate, and end points are a hundred times as large as weights.
  """
  rate = {
    'constant': lambda: optax.constant_schedule(learning_rate),
    'cosine': lambda: optax.cosine_decay_schedule(learning_rate, max(1, num_steps - warmup_steps)),
    'linear': lambda: optax.linear_schedule(learning_rate, 0.0, max(1, num_steps - warmup_steps)),
  }[decay]()
  if warmup_steps:
    warmup = lambda count: learning_rate * (count + 1) / warmup_steps
    rate = optax.join_schedules([warmup, rate], [warmup_steps])
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  made = optax.adamw(rate, b1, b2, eps, mu_dtype=moments, weight_decay=weight_decay, mask=kernels)
  if kind == 'muon':
    muon = optax.contrib.muon(
      rate,
      weight_decay=weight_decay,
      mu_dtype=moments,
      muon_weight_dimension_numbers=as_matrices,
      consistent_rms=0.2,
    )
    of_kernels = lambda params: jax.tree.map(lambda k: 'muon' if k else 'adamw', kernels(params))
    made = optax.partition({'muon': muon, 'adamw': made}, of_kernels)
  faster = []
  if schedule_rate != 1:
    faster = [optax.masked(optax.scale(schedule_rate), is_schedule)]
  return optax.chain(*clip, made, *faster)


def is_schedule(params: Any) -> Any:
  """Returns True for the schedule's parameters, False for the network's."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == 'schedule', params)
