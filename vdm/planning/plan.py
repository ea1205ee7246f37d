"""--mode=plan: whether a run fits its devices, and how fast it can be, before any is rented.

  python -m vdm.main --config=configs/imagenet64.py --mode=plan --topology=v5e:8x8
  python -m vdm.main --config=configs/imagenet64.py --mode=plan --topology=h100:8
  python -m vdm.main --config=configs/digits.py --mode=plan      # measures the devices at hand

For a slice of TPUs the steps of training, evaluation and sampling are compiled with XLA's TPU
compiler, which needs no TPU. For GPUs nothing is compiled, and memory and traffic are estimated.
Nothing is written, and no data is read.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from vdm import build
from vdm.diffusion.samplers import num_evaluations
from vdm.errors import require
from vdm.evaluation.bound import jit_step
from vdm.planning.chips import GIB, Chip
from vdm.planning.costs import Cost, Step, Target, bytes_per_device, cost, roofline, target
from vdm.sampling.draw import make_guidance
from vdm.system import parallel
from vdm.system.runners import jit_runner
from vdm.training.step import loss, make_train_step, recipe

TIMED_STEPS = 5


def steps(config: ConfigDict, mesh: Mesh | AbstractMesh) -> Iterator[Step]:
  """The steps of training, evaluation and sampling, on abstract arrays."""
  model = build.model(config)
  state = parallel.abstract_state(mesh, build.init_state(config, model))
  yield _train_step(config, model, mesh, state)

  settings, params = config.eval, len(config.eval.params.split(','))
  images = settings.max_images or config.data.eval_images
  function = jit_step(model, mesh, settings)
  args = (
    state.params,
    _batch(config.data, mesh, settings.batch_size, mask=True),
    images,
    settings.seed,
  )
  calls = params * math.ceil(images / settings.batch_size)
  yield Step('eval', function, args, settings.batch_size, 1, calls)

  settings = config.sample
  alone = config.copy_and_resolve_references()
  if alone.sample.guidance.kind == 'auto':  # its checkpoint is not read
    alone.sample.guidance.kind = 'none'
  guided, _ = make_guidance(alone, model, mesh)
  threshold = build.threshold(config.sample.threshold)

  def evaluate_network(params, z, log_snr, label):
    return threshold(guided(params, None, label))(z, log_snr).x

  batch = _batch(config.data, mesh, settings.batch_size)
  sharding = parallel.batch_sharding(mesh)
  z, log_snr = (
    jax.ShapeDtypeStruct((settings.batch_size, *shape), jnp.float32, sharding=sharding)
    for shape in (model.image_shape, ())
  )
  evaluations = num_evaluations(
    build.sampler(config.sample.sampler), settings.num_steps, settings.denoise_last
  )
  yield Step(
    'sample',
    parallel.jit(evaluate_network, mesh, out_shardings=sharding),
    (state.params, z, log_snr, batch['label']),
    settings.batch_size,
    evaluations,
    evaluations * math.ceil(settings.num_images / settings.batch_size),
  )


def _train_step(config, model, mesh, state) -> Step:
  function = make_train_step(config, model)
  size, num_steps = config.train.batch_size, config.train.num_steps
  args = (state, _batch(config.data, mesh, size))
  jitted = jit_runner(function, mesh, state).step
  return Step('train', jitted, args, size, 1, num_steps, residual_bytes(config, model, mesh, state))


def _batch(data: ConfigDict, mesh: Mesh | AbstractMesh, size: int, mask: bool = False) -> dict:
  """What config.data gives, as shapes."""
  embedding = data.embedding_size
  shapes = {
    'image': ((size, *data.image_shape), jnp.uint8),
    'label': ((size, embedding), jnp.float32) if embedding else ((size,), jnp.int32),
    'index': ((size,), jnp.int32),
  } | ({'mask': ((size,), jnp.float32)} if mask else {})
  sharding = parallel.batch_sharding(mesh)
  return {k: jax.ShapeDtypeStruct(*v, sharding=sharding) for k, v in shapes.items()}


def residual_bytes(config: ConfigDict, model: build.Model, mesh: Any, state: Any) -> int:
  """What JAX keeps of a device's part of a microbatch for the gradient, before fusion."""
  settings = recipe(config, model)
  batch = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype),
    _batch(config.data, mesh, config.train.batch_size // config.train.microbatches),
  )
  key = jax.random.key(0)

  def pullback(params, probe, adaptive, batch):
    of = lambda params, probe: loss(settings, params, probe, adaptive, batch, key, key)
    _, gradient, _ = jax.vjp(of, params, probe, has_aux=True)
    return [leaf for leaf in jax.tree.leaves(gradient) if isinstance(leaf, jax.Array)]

  probe = (jax.ShapeDtypeStruct(batch['index'].shape, jnp.float32),) * 2
  kept = jax.eval_shape(pullback, state.params, probe, state.adaptive, batch)
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept)


def measure(step: Step, init: Callable[[], Any], mesh: Mesh) -> list[float]:
  """Seconds of TIMED_STEPS calls on the devices at hand, after one that compiles and warms up."""
  state = parallel.initial_state(mesh, init)

  def zeros(leaf):
    make = lambda: jnp.zeros(leaf.shape, leaf.dtype)
    return jax.jit(make, out_shardings=leaf.sharding)()

  first = state if step.name == 'train' else state.params
  abstract = lambda a: isinstance(a, jax.ShapeDtypeStruct)
  rest = jax.tree.map(lambda a: zeros(a) if abstract(a) else a, step.args[1:])
  seconds = []
  for _ in range(1 + TIMED_STEPS):
    start = time.perf_counter()
    out = jax.block_until_ready(step.function(first, *rest))
    seconds.append(time.perf_counter() - start)
    first = out[0] if step.name == 'train' else first
  return seconds[1:]


def fits(cost: Cost, chip: Chip) -> bool:
  """Whether a program of this memory runs; where that is not known it is taken to."""
  return cost.limit is None and (cost.memory or 0) <= chip.hbm_bytes


def advice(config: ConfigDict, cost: Cost, where: Target, state_bytes: int) -> str:
  """One line: by how much training exceeds the memory, and what to change, the cheapest first."""
  limit, size, remedies = cost.limit or where.chip.hbm_bytes, config.train.batch_size, []
  num_devices, parts = where.mesh.size, config.train.microbatches
  fewer = 2 ** max(1, math.ceil(math.log2(cost.memory / limit)))  # images at a time
  if state_bytes > limit / 2 and config.parallel.fsdp < num_devices:
    remedies.append(f'--config.parallel.fsdp={num_devices}')
  if size % (num_devices * parts * fewer) == 0:
    remedies.append(f'--config.train.microbatches={parts * fewer}')
  if 'remat' in config.model and not config.model.remat:
    remedies.append('--config.model.remat=True')
  if size >= fewer * num_devices * parts:
    smaller = size // (fewer * num_devices * parts) * num_devices * parts
    remedies.append(f'--config.train.batch_size={smaller}')
  remedies.append('more devices, or larger ones')
  return (
    f'{config.name} does not fit {where.name}: training takes {_gib(cost.memory)} of '
    f'{_gib(limit)} a device; try {", or ".join(remedies)}.'
  )


class Fit(NamedTuple):
  """A batch of training, and its memory."""

  size: int
  memory: float


def largest_batch(
  cost_of: Callable[[int], Cost], size: int, unit: int, fixed: float, chip: Chip, budget: int
) -> tuple[Fit | None, int]:
  """The largest batch found to fit, among `unit` times powers of two, and how many were tried.

  Args:
    cost_of: of training with a batch of this size.
    size: the first that is tried; the next follows from its memory, of which all but `fixed` is
      taken to grow with the batch.
    unit: what a batch has to be a multiple of.
    fixed: bytes that do not depend on the batch.
    chip: whose memory it is.
    budget: how many sizes may be tried.
  """
  best, tried = None, 0
  while tried < budget and size >= unit and (best is None or size > best.size):
    cost, tried = cost_of(size), tried + 1
    per_image = max(cost.memory - fixed, 1) / size
    room = (chip.hbm_bytes - fixed) / per_image / unit
    guess = unit * 2 ** math.floor(math.log2(room)) if room >= 1 else 0
    if fits(cost, chip):
      best, size = Fit(size, cost.memory), guess
    else:
      size = min(guess, size // (2 * unit) * unit)
  return best, tried


def search(config: ConfigDict, where: Target, known: Cost, budget: int) -> list[str]:
  """Lines that say the largest batch of training without and with remat, from `budget` trials.

  `known` is the cost of the config as it is, the first trial.
  """
  has_remat = 'remat' in config.model
  own = config.model.remat if has_remat else False
  unit = where.mesh.size * config.train.microbatches
  state = parallel.abstract_state(where.mesh, build.init_state(config, build.model(config)))
  lines = []
  for remat in (own, not own) if has_remat else (own,):

    def cost_of(size, remat=remat):
      if (size, remat) == (config.train.batch_size, own):
        return known
      changed = config.copy_and_resolve_references()
      changed.train.batch_size = size
      if has_remat:
        changed.model.remat = remat
      return cost(_train_step(changed, build.model(changed), where.mesh, state), where)

    left = budget if lines or not has_remat else -(-budget // 2)
    best, tried = largest_batch(
      cost_of, config.train.batch_size, unit, bytes_per_device(state), where.chip, left
    )
    budget -= tried
    policy = f' with model.remat={remat}' if has_remat else ''
    found = f'{best.size}, {_gib(best.memory)} a device' if best else 'none'
    lines.append(f'Largest batch found to fit{policy}: {found} ({tried} sizes tried).')
  return lines


def _gib(size: float | None) -> str:
  return '' if size is None else f'{size / GIB:.2f} GiB'


def _duration(seconds: float) -> str:
  for unit, length in (('days', 86400), ('hours', 3600), ('minutes', 60)):
    if seconds >= 2 * length:
      return f'{seconds / length:.3g} {unit}'
  return f'{seconds:.3g} s'


def column(
  step: Step, of: Cost, where: Target, dtype: str, measured: list[float]
) -> dict[str, str]:
  """A step's part of the table: label -> cell."""
  state, chip = step.args[0], where.chip
  params = bytes_per_device(state.params if step.name == 'train' else state)
  cells = {
    'images of a call, on all devices': f'{step.images:,}',
    'parameters': _gib(params),
    'optimizer, averages': _gib(bytes_per_device(state) - params) if step.name == 'train' else '',
    'activations, gradients, temporaries': _gib(of.temporaries),
    'memory in all': _gib(of.memory),
    'FLOPs': f'{of.flops / 1e12:.4g} T',
    'HBM traffic': '' if of.traffic is None else f'{of.traffic / 1e9:.4g} GB',
  }
  if of.accessed is not None:
    cells["accessed, by XLA's count"] = f'{of.accessed / 1e9:.4g} GB'
  for kind, (number, size) in (of.collectives or {}).items():
    cells[f'{kind}: number, sent'] = f'{number}, {size / 1e6:.4g} MB'
  seconds = None
  if chip and of.traffic is not None and of.collectives is not None:
    times = roofline(chip, dtype, of)
    cells |= {f'time by {k}': f'{1e3 * v:.4g} ms' for k, v in times.items()}
    binding = max(times, key=times.get)
    seconds, cells['bound by'] = times[binding], binding
  if measured:
    seconds = statistics.median(measured)
    spread = f'{1e3 * min(measured):.4g} to {1e3 * max(measured):.4g}'
    cells['measured: median'] = f'{1e3 * seconds:.4g} ms ({spread})'
    cells['counted FLOPs a second'] = f'{of.flops / seconds / 1e12:.4g} T'
  if seconds:
    cells['images/s, all devices'] = f'{step.images / seconds / step.calls_per_batch:.4g}'
    cells['all of it'] = f'{_duration(seconds * step.calls)} for {step.calls:,} calls'
  if of.seconds is not None:
    cells['compiled in'] = f'{of.seconds:.0f} s'
  return cells


def table(columns: dict[str, dict[str, str]]) -> str:
  """Columns of cells by label as aligned Markdown; a label that a column lacks is empty there."""
  labels = list(dict.fromkeys(label for cells in columns.values() for label in cells))
  rows = [['a device and call', *columns]]
  rows += [[label, *(cells.get(label, '') for cells in columns.values())] for label in labels]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
  ]
  lines.insert(1, ' | '.join('-' * width for width in widths))
  return '\n'.join(f'| {line} |' for line in lines)


COUNTED = (
  'FLOPs are those of matrix products and convolutions in the traced program: loops times their '
  'length, what remat computes again included. '
)
COMPILED = (
  "Memory, HBM traffic and collectives are those of XLA's compiled program, loops and all, traffic "
  "times the length of its loops; arrays without the padding of their tiles. XLA's own count of "
  'what is accessed takes loops once, and on-chip memory for HBM.'
)
ESTIMATED = (
  'Nothing was compiled. Memory is what JAX keeps for the gradient, before fusion, with state and '
  'gradient; traffic that of every product and convolution, with all else fused; both are rough.'
)


def notes(where: Target, measured: bool) -> str:
  """How the numbers of the table came about."""
  how = COMPILED if where.platform == 'tpu' and not measured else ESTIMATED
  times = (
    'Times are lower bounds, at the peak of the chip and of all its links.' if where.chip else ''
  )
  return f'{COUNTED}{how} {times}'


def run(config: ConfigDict, topology: str, budget: int) -> int:
  """--mode=plan: prints the table of --topology, or of the devices at hand, and what fits.

  Returns:
    The process's exit status, 1 for a run that does not fit.
  """
  mode, remedy = config.parallel.mode, 'pmap takes the same steps, with as much memory'
  require(mode == 'jit', 'config.parallel.mode', mode, "'jit' for a plan", remedy)
  if topology:
    jax.config.update('jax_platforms', 'cpu')  # no device is taken for what only compiles
  where = target(topology, config)
  config = build.for_platform(config, where.platform)
  columns, of_training, failure = {}, None, ''
  init = build.init_state(config, build.model(config))
  for step in steps(config, where.mesh):
    logging.info('%s on %s: the step of %s', config.name, where.name, step.name)
    measured = [] if topology else measure(step, init, where.mesh)
    of = cost(step, where, compiles=bool(topology))
    columns[step.name] = column(step, of, where, config.model.dtype, measured)
    of_training = of_training or of
    if topology and step.name == 'train' and not fits(of, where.chip):
      failure = advice(config, of, where, bytes_per_device(step.args[0]))
  print(f'{config.name} on {where.name}, {config.model.dtype}\n')
  print(table(columns))
  print(f'\n{notes(where, not topology)}')
  if topology and budget:
    print('\n'.join(search(config, where, of_training, budget)))
  elif topology:
    print('--plan_search=0: the largest batch that fits was not looked for.')
  if failure:
    print(failure)
  return 1 if failure else 0
