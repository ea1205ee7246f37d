"""The model of a config: pure functions of parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vdm.build import factories
from vdm.build.checks import check_config, check_sampling, is_flagged
from vdm.build.platform import dtype, scan_blocks
from vdm.diffusion.adaptive import Adaptive
from vdm.diffusion.decoders import Decoder, discrete
from vdm.diffusion.gaussian import Denoiser, Schedule, end_points, mean_over_dims
from vdm.diffusion.heads import HEADS, network_input, to_prediction
from vdm.diffusion.weightings import Weighting
from vdm.errors import require
from vdm.nn import NETWORKS, blocks


class Model(NamedTuple):
  """Holds everything the loss, the likelihood and the samplers need of a config."""

  init: Callable[[jax.Array], Any]  # key -> params {'network', 'schedule'}
  schedule: Callable[[Any], Schedule]  # params -> Schedule
  # (params, label=None, flag=None, *, train=False, key_dropout=None) -> Denoiser
  denoiser: Callable[..., Denoiser]
  weighting: Weighting
  image_shape: tuple[int, ...]
  decoder: Decoder
  adaptive: Adaptive | None = None
  network: str = ''  # its name
  dtype: str = 'float32'  # of its activations

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
  num_classes = config.data.num_classes if class_conditional else 0
  embedding_size = config.data.embedding_size
  flagged, scan = is_flagged(config.model), scan_blocks(config.model)
  unrolled = factories.factory(
    NETWORKS,
    'model',
    block | ({'scan_blocks': False} if 'scan_blocks' in block else {}),
    num_classes=num_classes,
    dtype=dtype(config.model.dtype),
    # z is nearly eps where noise dominates; x, v and F are nothing like it, the score is -z there,
    # and o = eps - x has the wrong sign of x
    residual=output == 'eps',
    **(dict(embedding_size=embedding_size) if embedding_size else {}),
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
  image_shape = tuple(config.data.image_shape)

  def init(key):
    z, t = jnp.zeros((1, *image_shape)), jnp.zeros((1,))
    label = jnp.zeros((1,), jnp.int32) if class_conditional else None
    vector = dict(vector=jnp.zeros((1, embedding_size))) if embedding_size else {}

    def params_of(network, key):
      return network.init(key, z, t, label, **vector, train=False)['params']

    params = params_of(unrolled, key)
    if scan:  # the same numbers in either layout
      names = blocks.stacked_names(jax.eval_shape(functools.partial(params_of, network), key))
      params = blocks.stack(params, names)
    return {'network': params, 'schedule': learned.init()}

  def as_schedule(params):
    return learned.as_schedule(params['schedule'])

  def denoiser(params, label=None, flag=None, *, train=False, key_dropout=None):
    if condition_on == 'live':
      ends = end_points(as_schedule(params))  # so that t is always in [0, 1]
    else:
      ends = config.schedule.log_snr_max, config.schedule.log_snr_min
    rngs = {} if key_dropout is None else {'dropout': key_dropout}
    kwargs = dict(train=train, rngs=rngs) | (dict(flag=flag) if flagged else {})
    kwargs |= dict(vector=label) if embedding_size else {}
    label = label if class_conditional else None

    def denoise(z, log_snr):
      t = mean_over_dims((ends[0] - log_snr) / (ends[0] - ends[1]))
      z_in = network_input(output, z, log_snr)
      out = network.apply({'params': params['network']}, z_in, t, label, **kwargs)
      return to_prediction(output, out, z, log_snr)

    return denoise

  decoder = discrete(config.data.num_values)
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
  )
