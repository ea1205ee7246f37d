"""--mode=plan: whether a run fits its devices, and how fast it can be, before any is rented.

  python -m vdm.main --config=configs/imagenet64.py --mode=plan --topology=v5e:8x8
  python -m vdm.main --config=configs/imagenet64.py --mode=plan --topology=h100:8
  python -m vdm.main --config=configs/digits.py --mode=plan      # measures the devices at hand

For a slice of TPUs the steps of training, evaluation and sampling are put through XLA's TPU
compiler, which needs no TPU, up to the generation of code; --noplan_fast compiles them whole. For
GPUs nothing is compiled, and memory and traffic are estimated. Nothing is written, and no data is
read but, with config.data.as_found, for its shapes.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from vdm import build
from vdm.data import conditions_of
from vdm.data.settle import as_found
from vdm.diffusion.samplers import num_evaluations
from vdm.errors import require
from vdm.evaluation.bound import jit_step
from vdm.planning.costs import Cost, Step, bytes_per_device, cost, num_devices, target
from vdm.planning.fit import advice, advice_on_reading, fits, search
from vdm.planning.programs import Program, compiled, compilers, optimised
from vdm.planning.table import column, notes, table
from vdm.sampling.draw import make_guidance, unguided
from vdm.system import parallel
from vdm.system.runners import jit_runner
from vdm.training import step as step_lib
from vdm.training.step import Recipe, recipe

TIMED_STEPS = 5


def steps(config: ConfigDict, mesh: Mesh | AbstractMesh) -> Iterator[Step]:
  """Yields the steps of training, evaluation and sampling, on abstract arrays."""
  model = build.model(config)
  state = parallel.abstract_state(mesh, build.init_state(config, model))
  yield train_step(recipe(config, model), config.data, config.train.num_steps, mesh, state)

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

  settings, guided = config.sample, unguided(model)[0]
  if settings.guidance.kind == 'classifier_free':  # of 'auto' the checkpoint is not read
    guided, _ = make_guidance(settings.guidance, config.schedule, model, mesh)
  threshold = build.threshold(config.sample.threshold)

  def evaluate_network(params, z, log_snr, conditions):
    return threshold(guided(params, None, conditions))(z, log_snr).x

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
    (state.params, z, log_snr, conditions_of(batch)),
    settings.batch_size,
    evaluations,
    evaluations * math.ceil(settings.num_images / settings.batch_size),
  )


def train_step(
  how: Recipe, data: ConfigDict, num_steps: int, mesh: Mesh | AbstractMesh, state: Any
) -> Step:
  """Returns the step of training on config.data, of abstract arrays."""
  function = functools.partial(step_lib.train_step, how)
  args = (state, _batch(data, mesh, how.batch_size))
  jitted = jit_runner(function, mesh, state).program
  residuals = functools.partial(residual_bytes, how, data, mesh, state)
  # XLA sums over devices where a product is made, in its type, before it becomes float32
  itemsize = jnp.dtype(how.model.dtype).itemsize
  return Step('train', jitted, args, how.batch_size, 1, num_steps, residuals, itemsize)


def _batch(data: ConfigDict, mesh: Mesh | AbstractMesh, size: int, mask: bool = False) -> dict:
  """Returns what config.data gives, as shapes."""
  shapes = {
    'image': ((size, *data.image_shape), jnp.uint8 if data.num_values else jnp.float32),
    'label': ((size,), jnp.int32),
    'index': ((size,), jnp.int32),
  }
  if data.embedding_size:
    shapes['vector'] = ((size, data.embedding_size), jnp.float32)
  if data.condition_shape:
    shapes['condition'] = ((size, *data.condition_shape), jnp.float32)
  if data.masked:
    shapes['valid'] = ((size, *data.image_shape[:-1], 1), jnp.bool_)
  if mask:
    shapes['mask'] = ((size,), jnp.float32)
  sharding = parallel.batch_sharding(mesh)
  return {k: jax.ShapeDtypeStruct(*v, sharding=sharding) for k, v in shapes.items()}


def residual_bytes(how: Recipe, data: ConfigDict, mesh: Any, state: Any) -> int:
  """Returns the bytes that JAX keeps for the gradient of a device's microbatch, before fusion."""
  batch = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype),
    _batch(data, mesh, how.batch_size // how.microbatches),
  )
  key = jax.random.key(0)

  def pullback(params, probe, adaptive, batch):
    of = lambda params, probe: step_lib.loss(how, params, probe, adaptive, batch, key, key)
    _, gradient, _ = jax.vjp(of, params, probe, has_aux=True)
    return [leaf for leaf in jax.tree.leaves(gradient) if isinstance(leaf, jax.Array)]

  probe = (jax.ShapeDtypeStruct(batch['index'].shape, jnp.float32),) * 2
  kept = jax.eval_shape(pullback, state.params, probe, state.adaptive, batch)
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept)


def measure(step: Step, init: Callable[[], Any], mesh: Mesh) -> list[float]:
  """Returns the seconds of TIMED_STEPS calls on the devices at hand, after one that warms up."""
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


def lowered(config: ConfigDict, topology: str, name: str) -> jax.stages.Lowered:
  """Returns the step of that name of a run on a slice of TPUs, ready to be compiled."""
  jax.config.update('jax_platforms', 'cpu')
  where = target(topology, config.parallel.fsdp)
  step = next(step for step in steps(config, where.mesh) if step.name == name)
  return step.function.trace(*step.args).lower()


def run(config: ConfigDict, topology: str, budget: int, fast: bool = True) -> int:
  """Runs --mode=plan: prints the table of --topology, or of the devices at hand, and what fits.

  Args:
    config: of the run.
    topology: 'v5e:8x8' or 'h100:8'; '' for the devices at hand.
    budget: how many batches may be tried for the largest that fits.
    fast: leaves out the generation of code for TPUs, which takes most of a compilation's time.

  Returns:
    The process's exit status, 1 for a run of which some part does not fit.
  """
  with compilers() as pool:
    mode, remedy = config.parallel.mode, 'pmap takes the same steps, with as much memory'
    require(mode == 'jit', 'config.parallel.mode', mode, "'jit' for a plan", remedy)
    if topology:
      jax.config.update('jax_platforms', 'cpu')  # no device is taken for what only compiles
    build.check_devices(config, num_devices(topology))
    where = target(topology, config.parallel.fsdp)
    config = config.copy_and_resolve_references().unlock()
    config.data = as_found(config.data)
    config.model = build.for_platform(config.model, where.platform)

    def program_in(changed: ConfigDict, step: Step) -> Callable[[], Program] | None:
      what = step.name, step.images
      logging.info('%s on %s: the step of %s, %d images', config.name, where.name, *what)
      if not topology or where.platform != 'tpu':
        return None
      if fast:
        return pool.submit(optimised, lowered, changed, topology, step.name).result
      return lambda: compiled(step.function.trace(*step.args).lower())

    def cost_of(size: int, remat: bool) -> Cost:
      if (size, remat) == (config.train.batch_size, own):
        return costs['train']
      changed = config.copy_and_resolve_references()
      changed.train.batch_size = size
      if 'remat' in changed.model:
        changed.model.remat = remat
      step = next(steps(changed, where.mesh))
      return cost(step, where, program_in(changed, step))

    own = config.model.remat if 'remat' in config.model else False
    columns, costs, failures = {}, {}, []
    init = build.init_state(config, build.model(config))
    planned = list(steps(config, where.mesh))
    programs = [program_in(config, step) for step in planned]
    for step, program in zip(planned, programs, strict=True):
      measured = [] if topology else measure(step, init, where.mesh)
      of = costs[step.name] = cost(step, where, program)
      columns[step.name] = column(step, of, where, config.model.dtype, measured)
      if topology and not fits(of, where.chip):
        if step.name == 'train':
          found = advice(config.train, config.model, of, where, bytes_per_device(step.args[0]))
        else:
          found = advice_on_reading(step, of, where)
        failures.append(f'{config.name} does not fit {where.name}: {found}')
    print(f'{config.name} on {where.name}, {config.model.dtype}\n')
    print(table(columns))
    print(f'\n{notes(where, fast, not topology)}')
    if topology and budget:
      state = bytes_per_device(parallel.abstract_state(where.mesh, init))
      remat = (own, not own) if 'remat' in config.model else ()
      print('\n'.join(search(cost_of, config.train, remat, state, where, budget)))
    elif topology:
      print('--plan_search=0: the largest batch that fits was not looked for.')
    for failure in failures:
      print(failure)
    return 1 if failures else 0
