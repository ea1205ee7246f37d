"""Multivariate schedules: every dimension's log_snr falls in its own way between shared end points.

With log_snr(t) in R^D the diffusion term is 1/2 E sum_d (-dlog_snr_d/dt) (eps_hat_d - eps_d)^2, an
integral along a path (MuLAN, arXiv 2312.13236). With the exact denoiser no path between
two end points is better than another: each gives -log p(x). With any other denoiser the value
depends on the path, and the bound trains it. How fast the path is run through changes nothing but
the variance of the estimate, which trains it, as it trains the interior of `learned_net`.

The parametrisation is MuLAN's polynomial: three numbers for each group of dimensions,
elementwise, where a monotone network of each group would hold many times the activations of z.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm.diffusion.gaussian import Schedule, mean_over_dims, per_channel
from vdm.diffusion.schedules import Learned, almost_linear, check_range, ends, rising
from vdm.errors import require

FLOOR = 0.01  # least slope of a dimension over that of the straight line
PER = ('channel', 'dimension')


def learned_multivariate(
  log_snr_min: float,
  log_snr_max: float,
  shape: tuple[int, ...],
  per: str = 'dimension',
  num_hidden: int = 1024,
) -> Learned:
  """Returns a learned path between learned end points, the same for all examples.

  With f' = (a t^2 + b t + c)^2 and f(0) = 0, a polynomial of degree five, each group has

    log_snr(t) = log_snr_max - |slope| (0.99 f(w) / f(1) + 0.01 w),

  which falls strictly whatever the optimizer does. w(t) is the monotone network of `learned_net`,
  from 0 to 1, the same for all dimensions. The path starts straight, a = b = 0 and c = 1. The end
  points are those of all dimensions.

  Args:
    log_snr_min: at t = 1, before training.
    log_snr_max: at t = 0, before training.
    shape: of an example, spatial axes and channels.
    per: what has a, b and c of its own, each 'channel' or each 'dimension' of an example.
    num_hidden: units of the monotone network.
  """
  check_range(log_snr_min, log_snr_max)
  groups = _groups(shape, per)
  return Learned(
    lambda: _start(log_snr_min, log_snr_max, num_hidden, _straight(groups)),
    lambda params: _falling(params, [params['path'][k][None] for k in 'abc'], len(shape)),
    multivariate=True,
  )


def learned_conditional(
  log_snr_min: float,
  log_snr_max: float,
  shape: tuple[int, ...],
  num_classes: int,
  vector_size: int,
  field_channels: int,
  per: str = 'dimension',
  width: int = 32,
  num_hidden: int = 1024,
) -> Learned:
  """Returns `learned_multivariate` with a, b and c that depend on what an example is given.

  A hidden layer h = swish(W x + w) reads the class, one of K + 1 with that of none, the vector, and
  the field at each position; a linear layer, zero at first, adds to the a, b and c of each group.
  Under a field and 'dimension' the last layer is that of all positions; under a field and
  'channel', h is the mean over positions.

  Args:
    log_snr_min: at t = 1, before training.
    log_snr_max: at t = 0, before training.
    shape: of an example, spatial axes and channels.
    num_classes: K; 0: no class is given.
    vector_size: E; 0: no vector is given.
    field_channels: of the field as the network sees it; 0: none is given.
    per: what has a, b and c of its own, each 'channel' or each 'dimension' of an example.
    width: of the hidden layer.
    num_hidden: units of the monotone network, as in `learned_multivariate`.
  """
  check_range(log_snr_min, log_snr_max)
  groups = _groups(shape, per)
  require(width >= 1, 'width', width, '1 or more', 'try 32')
  pointwise = field_channels > 0 and per == 'dimension'  # one last layer for all positions
  of_class, of_vector = num_classes and num_classes + 1, vector_size and vector_size + 1
  size = of_class + of_vector + field_channels

  def init():
    key = jax.random.key(0)  # what is learned starts at zero, whatever these numbers are
    reads = jax.random.normal(key, (size, width)) / size**0.5
    more = {'reads': reads, 'bias': jnp.zeros(width)}
    more['adds'] = jnp.zeros((width, 3, *(shape[-1:] if pointwise else groups)))
    return _start(log_snr_min, log_snr_max, num_hidden, _straight(groups) | more)

  def hidden(path, told):
    """Returns h [B *spatial width], its spatial axes of length one where there is no field."""
    parts = []
    if of_class:
      number = jnp.where(told['label'] < 0, num_classes, told['label'])
      parts.append(jax.nn.one_hot(number, of_class))
    if of_vector:
      there = ~jnp.isnan(told['vector']).any(axis=-1, keepdims=True)
      parts += [jnp.where(there, told['vector'], 0), there.astype(jnp.float32)]
    parts = [part.reshape(len(part), *[1] * (len(shape) - 1), -1) for part in parts]
    if field_channels:
      field = told['field']
      for axis, (fine, coarse) in enumerate(zip(shape[:-1], field.shape[1:-1], strict=True), 1):
        field = jnp.repeat(field, fine // coarse, axis=axis)
      parts = [jnp.broadcast_to(part, (*field.shape[:-1], part.shape[-1])) for part in parts]
      parts.append(field)
    h = jnp.concatenate(parts, axis=-1) @ path['reads']
    return jax.nn.swish(h + per_channel(path['bias'], h))

  def as_schedule(params, told: Mapping[str, Array]):
    path = params['path']
    h = hidden(path, told)
    if not pointwise:
      h = h.mean(axis=tuple(range(1, len(shape))))
    added = [jnp.tensordot(h, path['adds'][:, i], 1) for i in range(3)]
    both = zip('abc', added, strict=True)
    return _falling(params, [path[k][None] + more for k, more in both], len(shape))

  return Learned(init, as_schedule, multivariate=True, conditional=True)


def on_path(schedule: Schedule, level: Float[Array, ' b']) -> Float[Array, '...']:
  """Returns the log_snr of a multivariate schedule whose mean over dimensions is `level`.

  The time is found by bisection. A step of Newton's method follows, which has its derivative.
  """
  mean = lambda t: mean_over_dims(schedule(t))
  level = jnp.broadcast_to(level, jax.eval_shape(mean, level).shape)  # one may be that of all
  wanted = jax.lax.stop_gradient(level)

  def halve(_, between):
    early, late = between
    middle = (early + late) / 2
    above = mean(middle) > wanted
    return jnp.where(above, middle, early), jnp.where(above, late, middle)

  early, late = jax.lax.fori_loop(0, 24, halve, (jnp.zeros_like(level), jnp.ones_like(level)))
  t = jax.lax.stop_gradient((early + late) / 2)
  found, slope = jax.jvp(mean, (t,), (jnp.ones_like(t),))
  return schedule(t + (level - found) / slope)


def _groups(shape: tuple[int, ...], per: str) -> tuple[int, ...]:
  """Returns the shape of what broadcasts against an example, one number for each group."""
  require(per in PER, 'per', per, "'channel' or 'dimension'", 'choose one')
  groups = shape if per == 'dimension' else (*[1] * (len(shape) - 1), shape[-1])
  several = any(size > 1 for size in groups)
  rule, remedy = f'one of several in examples of shape {shape}', 'with one, no path is better'
  remedy += ": try per='dimension', or name='learned_net'"
  require(several, 'per', per, rule, remedy)
  return groups


def _straight(groups: tuple[int, ...]) -> dict[str, Array]:
  """Returns a, b and c of the straight line."""
  return {'a': jnp.zeros(groups), 'b': jnp.zeros(groups), 'c': jnp.ones(groups)}


def _start(log_snr_min: float, log_snr_max: float, num_hidden: int, path: dict[str, Array]):
  """Returns the parameters before training: the bound has ends and path, the variance the rest."""
  require(num_hidden >= 1, 'num_hidden', num_hidden, '1 or more', 'try 1024')
  interior = almost_linear(num_hidden)
  return ends(log_snr_min, log_snr_max) | {'path': path, 'interior': interior}


def _falling(params: dict[str, Any], abc: list[Array], rank: int) -> Schedule:
  """Returns t [B] -> log_snr [B ...], for a, b and c [B ...] or [1 ...]."""
  a, b, c = abc

  def f(t):
    high = (2 * a * c + b**2) / 3 + t * (a * b / 2 + t * a**2 / 5)
    return t * (1e-6 + c**2 + t * (b * c + t * high))  # 1e-6: a line even where all three are zero

  h = rising(params['interior'])

  def schedule(t):
    start, end = h(jnp.zeros(())), h(jnp.ones(()))
    t = ((h(t) - start) / (end - start)).reshape(-1, *[1] * rank)
    fallen = (1 - FLOOR) * f(t) / f(jnp.ones_like(t)) + FLOOR * t
    return params['log_snr_max'] - jnp.abs(params['slope']) * fallen

  return schedule
