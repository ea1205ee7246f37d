"""The model of a config: pure functions of parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdm.build import conditioning, factories
from vdm.build.checks import check_config, check_sampling, is_flagged
from vdm.build.platform import dtype, scan_blocks
from vdm.diffusion.adaptive import Adaptive
from vdm.diffusion.decoders import Decoder
from vdm.diffusion.gaussian import Denoiser, Prediction, Schedule, end_points, mean_over_dims
from vdm.diffusion.heads import HEADS, network_input, to_prediction
from vdm.diffusion.weightings import Weighting
from vdm.errors import require
from vdm.nn import NETWORKS, blocks


class Model(NamedTuple):
  """Holds everything the loss, the likelihood and the samplers need of a config."""

  init: Callable[[jax.Array], Any]  # key -> params {'network', 'schedule'}, and 'decoder' if any
  schedule: Callable[[Any], Schedule]  # params -> Schedule
  # (params, conditions={}, flag=None, *, train=False, key_dropout=None) -> Denoiser; conditions
  # that the model does not take are passed over (`data.source.CONDITIONS`)
  denoiser: Callable[..., Denoiser]
  weighting: Weighting
  image_shape: tuple[int, ...]  # spatial axes, channels
  decoder: Decoder  # untrained: of the data's units and the likelihood's
  adaptive: Adaptive | None = None
  network: str = ''  # its name
  dtype: str = 'float32'  # of its activations
  takes: conditioning.Takes = conditioning.Takes()  # of conditions

  def decoder_of(self, params: Any) -> Decoder:
    """Returns the decoder, with the parameters that it has if any."""
    return self.decoder.with_params(params)

  def training_schedule(self, params: Any, adaptive_state: Any) -> Schedule:
    """Returns what training draws its times from: the adaptive schedule, if any, or its own."""
    if self.adaptive:
      return self.adaptive.as_schedule(adaptive_state)
    return self.schedule(params)


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
  flagged, takes = is_flagged(config.model), conditioning.of_config(data, class_conditional)
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
  learned, adapts = factories.schedule(config.schedule)
  weighting = factories.weighting(config.weighting)
  require(
    not (jax.tree.leaves(learned.init()) and config.weighting.name != 'elbo'),
    'config.weighting.name',
    config.weighting.name,
    "'elbo' where the schedule is learned",
    'the end points are trained by the bound: choose a fixed config.schedule.name, such as linear',
  )
  own = learned.as_schedule(learned.init())
  check_sampling(config.sample, own, config.train.label_dropout)
  factories.other_schedule(config.eval.schedule, 'eval.schedule', own)
  image_shape = tuple(data.image_shape)
  decoder = factories.decoder(config.decoder, data, config.schedule.log_snr_max)

  def init(key):
    z, t = jnp.zeros((1, *image_shape)), jnp.zeros((1,))
    inputs = takes.inputs(takes.nothing(1, image_shape))

    def params_of(network, key):
      return network.init(key, z, t, **inputs, train=False)['params']

    params = params_of(unrolled, key)
    if scan:  # the same numbers in either layout
      names = blocks.stacked_names(jax.eval_shape(functools.partial(params_of, network), key))
      params = blocks.stack(params, names)
    of_decoder = decoder.init()
    more = {'decoder': of_decoder} if of_decoder else {}
    return {'network': params, 'schedule': learned.init(), **more}

  def as_schedule(params):
    return learned.as_schedule(params['schedule'])

  def denoiser(params, conditions=None, flag=None, *, train=False, key_dropout=None):
    if condition_on == 'live':
      ends = end_points(as_schedule(params))  # so that t is always in [0, 1]
    else:
      ends = config.schedule.log_snr_max, config.schedule.log_snr_min
    rngs = {} if key_dropout is None else {'dropout': key_dropout}
    kwargs = dict(train=train, rngs=rngs) | (dict(flag=flag) if flagged else {})
    given = conditions or {}
    valid = given.get('valid') if data.masked else None
    inside = lambda a: a if valid is None else jnp.where(valid, a, 0)

    def denoise(z, log_snr):
      z = inside(z)
      t = mean_over_dims((ends[0] - log_snr) / (ends[0] - ends[1]))
      z_in = network_input(output, z, log_snr)
      inputs = takes.inputs(takes.nothing(len(z), image_shape) | given)
      out = network.apply({'params': params['network']}, z_in, t, **inputs, **kwargs)
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
  )
