"""Time, memory and FLOPs of the train step of a config, and where its time goes: one JSON line.

  python -m benchmarks.train_step --config=configs/cifar10.py --config.model.num_blocks=4 \\
    --config.model.width=64 --config.train.batch_size=16 --steps=10

It runs the compiled step that training runs, on random images, on all devices of one host. The
breakdown times three parts alone, each on every device's own share of the batch, in turn with the
step, so that a drift of the machine's speed cancels in the shares:

  decoder       the reconstruction term: value, and gradient with respect to its end point
  random_bits   all random numbers of the step: times, noise, flips and the masks of dropout
  convolutions  every convolution of width 3 of the network, forward and backward
  rest          the step less these: attention, norms, optimizer, average, communication, ...

Parts alone are fused and overlapped otherwise than in the step, so the shares are estimates. XLA
counts the body of a loop once. On CPU attention is one, so there `flops` is a little low; with
microbatches the whole network is one, with `scan_blocks` most of it, and `flops` and
`bytes_accessed` are null. `matmul_flops` are those of `vdm.planning.flops`, loops and all;
`flop_utilisation` is their share of the device's peak in `vdm.planning.chips`, for float32 that of
TF32 whatever `matmul_precision` is.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks import kernels
from vdm import build
from vdm.diffusion.gaussian import fold_in, standard_normal
from vdm.diffusion.times import stratified
from vdm.nn import convolution, layers
from vdm.planning import chips, flops
from vdm.system import files, hosts, parallel, runners
from vdm.training.step import make_train_step

Calls = list[tuple[Any, jax.ShapeDtypeStruct]]  # (a setting of the layer, shape of its input)


def layer_calls(config: ConfigDict, model: build.Model, num_images: int) -> tuple[Calls, Calls]:
  """What a forward pass in training calls, in order; nothing is computed.

  Returns:
    The 3x3 convolutions as (features, input in their dtype), the dropouts as (rate, input).
  """
  convs, dropouts = [], []
  if build.scan_blocks(config.model):  # a loop would call one block for all
    config = config.copy_and_resolve_references()
    config.model.scan_blocks = 'off'
    model = build.model(config)

  def note(call, args, kwargs, context):
    module = context.module
    if context.method_name == '__call__' and isinstance(module, convolution.Conv3):
      convs.append((module.features, jax.ShapeDtypeStruct(args[0].shape, module.dtype)))
    elif context.method_name == '__call__' and isinstance(module, layers.Dropout):
      dropouts.append((module.rate, jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)))
    return call(*args, **kwargs)

  def forward(key, z, label):
    denoiser = model.denoiser(model.init(key), {'label': label}, train=True, key_dropout=key)
    log_snr = jnp.zeros(z.shape if model.multivariate else num_images)
    with nn.intercept_methods(note):
      return denoiser(z, log_snr)

  z = jax.ShapeDtypeStruct((num_images, *model.image_shape), jnp.float32)
  jax.eval_shape(forward, jax.random.key(0), z, jax.ShapeDtypeStruct((num_images,), jnp.int32))
  return convs, dropouts


def conv_flops(features: int, x: jax.ShapeDtypeStruct) -> int:
  """FLOPs of a convolution of x [B, *space, I] of width 3, once forward and twice backward.

  The products with the zeros of the padding are left out, as XLA does.
  """
  batch, *sizes, channels = x.shape
  return 3 * 2 * batch * math.prod(3 * n - 2 for n in sizes) * channels * features


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
  """What training gets from the data: 'image' uint8 [B H W C], 'label' and 'index' [B]."""
  size, rng = config.train.batch_size, np.random.default_rng(config.seed)
  image = rng.integers(0, config.data.num_values, (size, *config.data.image_shape))
  index = np.arange(size, dtype=np.int32)
  return {'image': image.astype(np.uint8), 'label': np.zeros_like(index), 'index': index}


def make_parts(config: ConfigDict, model: build.Model, mesh: Mesh) -> dict[str, tuple]:
  """name -> (compiled function, its arguments) of each part, for one microbatch.

  A function takes what all devices share, then what is split over them. Its results pass an
  optimization barrier and leave as single elements: the compiler can drop nothing, and the time is
  not that of writing or summing them.
  """
  num_images = config.train.batch_size // config.train.microbatches
  batch = jax.tree.map(lambda a: a[:num_images], random_batch(config))
  convs, dropouts = layer_calls(config, model, num_images // mesh.size)
  keys = iter(jax.random.split(jax.random.key(config.seed), 2 + 2 * len(convs)))
  shared, split = parallel.replicated(mesh), parallel.batch_sharding(mesh)
  split_normal = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=split)

  def decoder(log_snr_max, images):
    def loss(log_snr_max):
      u, eps = images
      return model.decoder.loss(u, eps, log_snr_max).mean()

    return jnp.stack(jax.value_and_grad(loss)(log_snr_max))

  def random_bits(key, index):
    key_t, key_eps, key_recon, key_flip, key_dropout = jax.random.split(key, 5)
    drawn = [
      stratified(key_t, index, config.train.batch_size),
      standard_normal(fold_in(key_recon, index), model.image_shape),
      standard_normal(fold_in(key_eps, index), model.image_shape),
    ]
    if config.data.flip:
      drawn.append(jax.vmap(jax.random.bernoulli)(fold_in(key_flip, index)))
    for number, (rate, x) in enumerate(dropouts):
      rngs = {'dropout': jax.random.fold_in(key_dropout, number)}
      drawn.append(layers.Dropout(rate).apply({}, jnp.ones_like(x), train=True, rngs=rngs) != 0)
    return jnp.stack([_one_element(a) for a in drawn])

  def convolutions(kernels, images):
    # Each kernel waits for the result before it, as in the network; only the gradients of kernels
    # are free. Otherwise the CPU would run several convolutions at a time.
    (zero, *kernels), out = kernels, []
    link, operands = zero, list(zip(kernels, images, strict=True))
    for kernel, (x, _) in operands:
      link = zero * _one_element(convolution.conv3(x, kernel + link.astype(kernel.dtype)))
    for kernel, (x, g) in reversed(operands):
      dx, dkernel = jax.vjp(convolution.conv3, x, kernel + link.astype(kernel.dtype))[1](g)
      link = zero * _one_element(dx)
      out.append(_one_element(dkernel))
    return jnp.stack([link, *out])

  log_snr_max = jnp.float32(config.schedule.log_snr_max)
  rng, kernels, images = np.random.default_rng(config.seed), [np.float32(0)], []
  for features, x in convs:
    kernels.append(
      rng.standard_normal((*[3] * (x.ndim - 2), x.shape[-1], features)).astype(x.dtype)
    )
    shapes = [(num_images, *x.shape[1:-1], channels) for channels in (x.shape[-1], features)]
    images.append([split_normal(next(keys), shape, x.dtype) for shape in shapes])
  eps = split_normal(next(keys), batch['image'].shape, jnp.float32)
  parts = {
    'decoder': (decoder, log_snr_max, (batch['image'], eps)),
    'random_bits': (random_bits, next(keys), batch['index']),
    'convolutions': (convolutions, kernels, images),
  }

  def compiled(function, *args):
    specs = {'in_specs': (shared.spec, split.spec), 'out_specs': split.spec}
    on_each_device = jax.jit(jax.shard_map(function, mesh=mesh, check_vma=False, **specs))
    args = jax.device_put(args, (shared, split))
    return on_each_device.lower(*args).compile(), args

  return {name: compiled(*part) for name, part in parts.items()}


def _one_element(a):
  a = jax.lax.optimization_barrier(a)
  return a[(0,) * a.ndim].astype(jnp.float32)


def compile_timed(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
  """The compiled program, and the seconds it took."""
  start = time.perf_counter()
  return lowered.compile(), time.perf_counter() - start


def time_in_turn(rounds: int, functions: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
  """Milliseconds of each call of each function, blocked on; one call of each in every round."""
  times = {name: [] for name in functions}
  for i in range(rounds):
    for name, function in functions.items():
      if name != 'step':
        time.sleep(0.2)  # a CPU goes on freeing the step's memory, which would slow a short part
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(1000 * (time.perf_counter() - start))
    _log(f'{i + 1} of {rounds}: ' + ', '.join(f'{k} {v[-1]:.1f} ms' for k, v in times.items()))
  return {name: np.array(values) for name, values in times.items()}


def _log(text):
  print(text, file=sys.stderr, flush=True)


def measure(
  config: ConfigDict,
  steps: int = 20,
  warmup: int = 2,
  breakdown: bool = True,
  trace_steps: int = 0,
) -> dict[str, Any]:
  """Everything about one train step, in JSON's types; None is what is not known here.

  Args:
    config: as for training.
    steps: steps timed, one or more.
    warmup: steps before those, not timed.
    breakdown: whether to time the parts too; their arguments take about the memory of the
      network's activations once more.
    trace_steps: steps traced on a GPU, for its time by class of kernel; 0: none.
  """
  model = build.model(config)
  build.check_devices(config, jax.device_count())
  mesh = parallel.make_mesh(config.parallel.fsdp)
  init = build.init_state(config, model)
  step_fn = make_train_step(config, model)
  abstract = parallel.abstract_state(mesh, init)
  runner = runners.runner(config.parallel.mode, step_fn, mesh, abstract)
  rows = random_batch(config)
  matmuls = flops.matmuls(jax.make_jaxpr(step_fn)(abstract, rows).jaxpr, jax.default_backend())
  batch = runner.put_batch(rows)
  state = runner.put_state(parallel.initial_state(mesh, init))
  start = time.perf_counter()
  lowered = runner.program.lower(state, batch)
  lower_s = time.perf_counter() - start
  compiled, compile_s = compile_timed(lowered)
  _log(f'lowered in {lower_s:.1f} s, compiled in {compile_s:.1f} s')

  def step():
    nonlocal state
    state, metrics = compiled(state, batch)
    return state, metrics

  functions = {'step': step}
  time_in_turn(warmup, functions)
  device_stats = jax.local_devices()[0].memory_stats() or {}  # before the parts take any
  if breakdown:
    parts = make_parts(config, model, mesh)
    functions |= {name: functools.partial(part, *args) for name, (part, args) in parts.items()}
    time_in_turn(1, functions)
  times = time_in_turn(steps, functions)

  size, microbatches = config.train.batch_size, config.train.microbatches
  low, median, high = np.percentile(times['step'], (25, 50, 75))
  dtype, device_kind = build.dtype(config.model.dtype), jax.devices()[0].device_kind
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()  # of one device's program
  counted = microbatches == 1 and not build.scan_blocks(config.model)
  chip = chips.of_kind(device_kind)
  peak = chip.flops(dtype.name) if chip else None
  new_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  result = {
    'config': config.name,
    'model': {**config.model.to_dict(), 'dtype': dtype.name},
    'batch_size': size,
    'microbatches': microbatches,
    'mode': config.parallel.mode,
    'fsdp': config.parallel.fsdp,
    'devices': mesh.size,
    'device_kind': device_kind,
    'jax': jax.__version__,
    'matmul_precision': jax.config.jax_default_matmul_precision,
    'trace_and_lower_s': lower_s,
    'compile_s': compile_s,
    'steps': steps,
    'step_ms': {'median': median, 'min': times['step'].min(), 'q25': low, 'q75': high},
    'images_per_s': 1000 * size / median,
    'flops': int(cost['flops']) * mesh.size if counted else None,
    'matmul_flops': matmuls.flops,
    'bytes_accessed': int(cost['bytes accessed']) * mesh.size if counted else None,
    'convolution_flops': sum(conv_flops(*call) for call in layer_calls(config, model, size)[0]),
    'flop_utilisation': matmuls.flops / mesh.size / peak / (median / 1000) if peak else None,
    'memory_bytes_per_device': {
      'arguments': memory.argument_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
      'total': memory.argument_size_in_bytes + new_bytes,
      'peak_of_device': device_stats.get('peak_bytes_in_use'),
    },
  }
  if trace_steps:
    result['kernels'] = kernels.by_class(step, trace_steps)
  if breakdown:
    ms = {name: microbatches * np.median(times[name]) for name in parts}
    ms['rest'] = median - sum(ms.values())
    result['breakdown'] = {name: {'ms': v, 'share': v / median} for name, v in ms.items()}
  return result


def to_json(result: dict[str, Any]) -> str:
  """One line, with floats to five digits."""
  short = json.loads(json.dumps(result), parse_float=lambda text: float(f'{float(text):.5g}'))
  return files.json_text(short, indent=None).rstrip()


def main(_):
  """Prints the JSON line."""
  values = flags.FLAGS
  hosts.use_cores(functools.partial(build.works_on, values.config))
  how = (values.steps, values.warmup, values.breakdown, values.trace_steps)
  print(to_json(measure(values.config, *how)))


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', 'configs/cifar10.py', 'Config file.')
  flags.DEFINE_integer('steps', 20, 'Steps timed.', lower_bound=1)
  flags.DEFINE_integer('warmup', 2, 'Steps before those, not timed.', lower_bound=0)
  flags.DEFINE_boolean('breakdown', True, 'Whether the parts of the step are timed too.')
  flags.DEFINE_integer('trace_steps', 0, 'Steps traced, for the time by kernel.', lower_bound=0)
  app.run(main)
