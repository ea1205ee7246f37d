"""The model of a config: pure functions of parameters."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdm.build import conditioning, factories
from vdm.build.checks import check_config, is_flagged
from vdm.build.platform import dtype, scan_blocks
from vdm.build.sample_checks import check_sampling
from vdm.diffusion.adaptive import Adaptive
from vdm.diffusion.decoders import Decoder
from vdm.diffusion.gaussian import Denoiser, Prediction, Schedule, end_levels, mean_over_dims
from vdm.diffusion.heads import HEADS, network_input, to_prediction
from vdm.diffusion.weightings import Weighting
from vdm.errors import require
from vdm.nn import NETWORKS, blocks, layers


class Model(NamedTuple):
  """Holds everything the loss, the likelihood and the samplers need of a config."""

  init: Callable[[jax.Array], Any]  # key -> params {'network', 'schedule'}, and 'decoder' if any
  # (params, conditions={}) -> Schedule; conditions matter where the schedule is a function of them
  schedule: Callable[..., Schedule]
  # (params, conditions={}, flag=None, *, train=False, key_dropout=None, precise=False) -> Denoiser;
  # conditions that the model does not take are passed over (`data.source.CONDITIONS`); `precise` is
  # for activations in float32, whatever config.model.dtype is
  denoiser: Callable[..., Denoiser]
  weighting: Weighting
  image_shape: tuple[int, ...]  # spatial axes, channels
  decoder: Decoder  # untrained: of the data's units and the likelihood's
  adaptive: Adaptive | None = None
  network: str = ''  # its name
  dtype: str = 'float32'  # of its activations
  takes: conditioning.Takes = conditioning.Takes()  # of conditions
  multivariate: bool = False  # whether log_snr is [B ...]
  conditional_schedule: bool = False  # whether the schedule is a function of conditions

  def decoder_of(self, params: Any) -> Decoder:
    """Returns the decoder, with the parameters that it has if any."""
    return self.decoder.with_params(params)

  def training_schedule(self, params: Any, adaptive_state: Any, conditions: Any = None) -> Schedule:
    """Returns what training draws its times from: the adaptive schedule, if any, or its own."""
    if self.adaptive:
      return self.adaptive.as_schedule(adaptive_state)
    return self.schedule(params, conditions)


def model(config: ConfigDict) -> Model:
  """Returns the network, schedule and weighting of a config, as pure functions of parameters."""
  check_config(config)
  block = config.model.to_dict()
  output, class_conditional = block.pop('output'), block.pop('class_conditional')
  condition_on = block.pop('condition_on')
  require(
    output in HEADS,
    'config.model.output',
    output,
    f'one of {", ".join(HEADS)}',
    'choose one of these',
  )
  data, scan = config.data, scan_blocks(config.model)
  flagged = is_flagged(config.model)
  takes = conditioning.of_config(data, class_conditional, config.train.label_dropout)
  unrolled = factories.factory(
    NETWORKS,
    'model',
    # z is nearly eps where noise dominates; x, v and F are nothing like it, the score is -z there,
    # and o = eps - x has the wrong sign of x
    {'residual': output == 'eps'}
    | block
    | ({'scan_blocks': False} if 'scan_blocks' in block else {}),
    num_classes=data.num_classes if class_conditional else 0,
    dtype=dtype(config.model.dtype),
    **(dict(embedding_size=data.embedding_size) if data.embedding_size else {}),
  )
  network = unrolled.clone(scan_blocks=True) if scan else unrolled
  image_shape = tuple(data.image_shape)
  learned, adapts = factories.schedule(config.schedule, image_shape, takes)
  weighting = factories.weighting(config.weighting)
  is_learned = bool(jax.tree.leaves(learned.init()))
  require(
    not (is_learned and config.weighting.name != 'elbo'),
    'config.weighting.name',
    config.weighting.name,
    "'elbo' where the schedule is learned",
    'the end points are trained by the bound: choose a fixed config.schedule.name, such as linear',
  )
  require(
    not (is_learned and config.train.second_order),
    'config.train.second_order',
    config.train.second_order,
    '0 where the schedule is learned',
    'the bound alone trains it: choose config.schedule.name=adaptive, or a fixed one',
  )

  def told_of(size, conditions):
    return takes.inputs(takes.nothing(size, image_shape) | (conditions or {}))

  def as_schedule(params, conditions=None):
    if not learned.conditional:
      return learned.as_schedule(params['schedule'])
    size = max(map(len, conditions.values())) if conditions else 1
    return learned.as_schedule(params['schedule'], told_of(size, conditions))

  first = lambda: as_schedule({'schedule': learned.init()})
  own = first()
  one_path = not learned.conditional and not (is_learned and learned.multivariate)
  factories.check_curves(config.schedule, first if one_path else None, config.weighting, weighting)
  check_sampling(config.sample, own, takes)
  factories.other_schedule(config.eval.schedule, 'eval.schedule', own)
  decoder = factories.decoder(config.decoder, data, config.schedule.log_snr_max)

  def init(key):
    z = jnp.zeros((1, *image_shape))
    t, inputs = seen(z, own(jnp.zeros((1,))), (1.0, 0.0), None)

    def params_of(network, key):
      return network.init(key, z, t, **inputs, train=False)['params']

    params = params_of(unrolled, key)
    if scan:  # the same numbers in either layout
      names = blocks.stacked_names(jax.eval_shape(functools.partial(params_of, network), key))
      params = blocks.stack(params, names)
    of_decoder = decoder.init()
    more = {'decoder': of_decoder} if of_decoder else {}
    return {'network': params, 'schedule': learned.init(), **more}

  def seen(z, log_snr, ends, conditions):
    """Returns t [B] of the mean log_snr, and what else the network is given beside z.

    Under one path t is all there is to say. But convolutions do not know where they are: if each
    position has a level of its own, they read it in further channels of the field.
    """
    level = (ends[0] - log_snr) / (ends[0] - ends[1])
    inputs = told_of(len(z), conditions)
    if math.prod(level.shape[1:-1]) > 1:
      each = jnp.broadcast_to(level, z.shape)
      inputs |= dict(field=layers.append_field(each, inputs.get('field')))
    return mean_over_dims(level), inputs

  def denoiser(params, conditions=None, flag=None, *, train=False, key_dropout=None, precise=False):
    if condition_on == 'live':
      ends = end_levels(as_schedule(params))  # so that t is always in [0, 1]
    else:
      ends = config.schedule.log_snr_max, config.schedule.log_snr_min
    rngs = {} if key_dropout is None else {'dropout': key_dropout}
    kwargs = dict(train=train, rngs=rngs) | (dict(flag=flag) if flagged else {})
    valid = (conditions or {}).get('valid') if data.masked else None
    inside = lambda a: a if valid is None else jnp.where(valid, a, 0)

    def denoise(z, log_snr):
      z = inside(z)
      t, inputs = seen(z, log_snr, ends, conditions)
      z_in = network_input(output, z, log_snr)
      applied = network.clone(dtype=jnp.float32) if precise else network
      out = applied.apply({'params': params['network']}, z_in, t, **inputs, **kwargs)
      return Prediction(*map(inside, to_prediction(output, out, z, log_snr)))

    return denoise

  return Model(
    init,
    as_schedule,
    denoiser,
    weighting,
    image_shape,
    decoder,
    adapts,
    network=config.model.name,
    dtype=dtype(config.model.dtype).name,
    takes=takes,
    multivariate=learned.multivariate,
    conditional_schedule=learned.conditional,
  )
