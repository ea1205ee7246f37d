"""What an accelerator computes beside the CPU of the same machine: one JSON line.

  python -m benchmarks.correctness

For small models of every network, schedule and head: the loss, eps_hat and the gradient on the same
parameters, images and random numbers, by float32 in true precision, by the default precision of
products (TF32 on NVIDIA), and by bfloat16 activations. Errors are relative: of the loss, and of the
whole arrays by their Euclidean norm. Then a train step by jit and by pmap, one run twice, a resumed
run beside one in a piece (all compared by their bits), a sampler, and attention; last, alone on the
device, attention's time beside that of cuDNN's kernel, which the networks do not use.
"""

import functools
import importlib
import json
import pathlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import train_step
from vdm import build
from vdm.data import conditions_of
from vdm.diffusion.gaussian import end_points, fold_in
from vdm.diffusion.samplers import dpmpp_2m, sample, time_grid
from vdm.nn.attention import softmax_attention
from vdm.system import parallel, runners
from vdm.training.step import loss, make_train_step, recipe
from vdm.workdir import checkpoint

CASES = {  # name: config file, leaves
  'vdm_unet, learned_endpoints': ('cifar10', {}),
  'vdm_unet, learned_net, attention': (
    'cifar10',
    {'schedule.name': 'learned_net', 'model.attention': True},
  ),
  'adm_unet, adaptive, F': ('imagenet64', {'model.attention_resolutions': (8,)}),
  'uvit, adaptive, v': ('fashion_mnist_pp', {}),
  'dit, learned_endpoints': ('digits_dit', {}),
  'mlp, discrete time': (
    'digits',
    {'model.name': 'mlp', 'schedule.name': 'linear', 'train.num_timesteps': 100},
  ),
}
PRECISIONS = {  # name: dtype of activations, precision of products
  'float32': ('float32', 'highest'),
  'default': ('float32', None),
  'bfloat16': ('bfloat16', None),
}


def config_of(name: str, leaves: dict, dtype: str = 'float32'):
  """The :debug of a config with these leaves, without a random choice of how it is run."""
  config = importlib.import_module(f'vdm.configs.{name}').get_config('debug')
  with config.unlocked():
    if leaves.get('model.name') == 'mlp':
      kept = ('output', 'class_conditional', 'condition_on', 'dropout')
      config.model = {k: config.model[k] for k in kept} | {'width': 64, 'num_blocks': 2}
    if config.data.image_shape[0] > 16:
      config.data.image_shape = (16, 16, config.data.image_shape[2])
    for path, value in leaves.items():
      block, leaf = path.split('.')
      config[block][leaf] = value
    config.model.dtype = dtype
    config.parallel.fsdp = 1
    config.model = build.for_platform(config.model, 'cpu')  # unrolled; each says its dtype
  return config


def evaluated(name: str, leaves: dict, precision: str, device: jax.Device) -> dict[str, np.ndarray]:
  """The loss, eps_hat and gradient of a case on a device, as one array each."""
  dtype, products = PRECISIONS[precision]
  config = config_of(name, leaves, dtype)
  model, plain = build.model(config), build.model(config_of(name, leaves))
  with jax.default_device(jax.devices('cpu')[0]):  # the same numbers for all
    state = jax.jit(build.init_state(config, plain))()
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state.params))))
    # away from layers that start at zero, behind which there would be no gradient
    nudged = lambda a: a + 0.02 * jax.random.normal(next(noise), a.shape, a.dtype)
    network = jax.tree.map(nudged, state.params['network'])
  params = state.params | {'network': network}
  settings = recipe(config, model)

  def run(params, adaptive, batch):
    def loss_of(params):
      zeros = jnp.zeros(len(batch['index']))
      key, key_dropout = jax.random.key(2), jax.random.key(3)
      probe = (zeros, zeros)
      return loss(settings, params, probe, adaptive, batch, key, key_dropout)[0]

    value, gradient = jax.value_and_grad(loss_of)(params)
    z = jax.vmap(lambda k: jax.random.normal(k, model.image_shape))(
      fold_in(jax.random.key(4), batch['index'])
    )
    ends = end_points(model.schedule(params))
    levels = jnp.linspace(ends[1], ends[0], len(z))
    eps_hat = model.denoiser(params, conditions_of(batch))(z, levels).eps
    return {'loss': value[None], 'eps_hat': eps_hat, 'gradient': gradient}

  context = jax.default_matmul_precision(products) if products else jax.default_device(device)
  with context, jax.default_device(device):
    args = jax.device_put((params, state.adaptive, train_step.random_batch(config)), device)
    out = jax.device_get(jax.jit(run)(*args))
  flat = lambda tree: np.concatenate([np.ravel(a).astype('f8') for a in jax.tree.leaves(tree)])
  return {k: flat(v) for k, v in out.items()}


def relative_errors(name: str, leaves: dict, device: jax.Device) -> dict[str, dict[str, float]]:
  """precision -> quantity -> |device - CPU| / |CPU|."""
  want = evaluated(name, leaves, 'float32', jax.devices('cpu')[0])
  norm = np.linalg.norm

  def of(precision):
    got = evaluated(name, leaves, precision, device)
    return {k: float(norm(got[k] - want[k]) / norm(want[k])) for k in want}

  return {precision: of(precision) for precision in PRECISIONS}


def _steps(case: tuple, mode: str, count: int, halfway: bool = False) -> dict[str, np.ndarray]:
  """The parameters and averages after `count` steps; halfway saved, and read back, if so asked."""
  config = config_of(*case)
  model = build.model(config)
  mesh, init = parallel.make_mesh(), build.init_state(config, model)
  abstract = parallel.abstract_state(mesh, init)
  step = make_train_step(config, model)
  runner = runners.runner(mode, step, mesh, abstract)
  state = runner.put_state(parallel.initial_state(mesh, init))
  for number in range(count):
    if halfway and number == count // 2:
      with tempfile.TemporaryDirectory() as folder:
        manager = checkpoint.manager(pathlib.Path(folder), 1)
        checkpoint.save(manager, number, runner.get_state(state), {'bits_per_dim': 1.0})
        manager.wait_until_finished()
        state = runner.put_state(checkpoint.restore(manager, abstract)[0])
        manager.close()
    state, _ = runner.step(state, runner.put_batch(train_step.random_batch(config)))
  state = jax.device_get(runner.get_state(state))
  return {'params': state.params, 'ema': state.averages['ema']}


def _compare(a, b) -> dict[str, float | bool]:
  pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
  difference = max(float(np.abs(x - y).max()) for x, y in pairs)
  return {'same_bits': all(np.array_equal(x, y) for x, y in pairs), 'difference': difference}


def runs(case: tuple) -> dict[str, dict]:
  """Eight steps, and the same eight again, resumed after four, and by pmap."""
  first = _steps(case, 'jit', 8)
  others = {'again': ('jit', 8), 'resumed': ('jit', 8, True), 'pmap': ('pmap', 8)}
  return {name: _compare(first, _steps(case, *args)) for name, args in others.items()}


def attention(device: jax.Device) -> dict[str, float]:
  """The relative error of value and gradient of attention against float64, by dtype."""
  shape = (2, 256, 2, 64)
  q, k, v, g = (np.random.default_rng(i).standard_normal(shape) for i in range(4))

  def plain(q, k, v):  # numpy's
    logits = np.einsum('bqnd,bknd->bnqk', q, k) / np.sqrt(shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dv = np.einsum('bnqk,bqnd->bknd', weights, g)
    return np.einsum('bnqk,bknd->bqnd', weights, v), dv

  want, found = plain(q, k, v), {}
  for name, (dtype, products) in PRECISIONS.items():
    with jax.default_matmul_precision(products or 'default'), jax.default_device(device):
      args = [jnp.asarray(a, dtype) for a in (q, k, v)]
      out, pull = jax.vjp(jax.jit(softmax_attention), *args)
      got = (out, pull(jnp.asarray(g, dtype))[2])
    errors = [
      np.linalg.norm(np.asarray(a, 'f8') - b) / np.linalg.norm(b)
      for a, b in zip(got, want, strict=True)
    ]
    found[name] = {'value': float(errors[0]), 'gradient': float(errors[1])}
  return found


def attention_ms(device: jax.Device, repeats: int = 20) -> dict[str, float | str]:
  """Milliseconds of value and gradient at imagenet64's costliest shape, or why there are none.

  On a CPU the shape is small, and cuDNN is not asked.
  """
  gpu = device.platform == 'gpu'
  shape = (64, 1024, 6, 64) if gpu else (2, 64, 2, 8)
  q, k, v, g = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)
  kernels = {'ours': softmax_attention}
  if gpu:
    kernels['cudnn'] = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')

  def timed(kernel):
    @jax.jit
    def run(q, k, v, g):
      out, pull = jax.vjp(kernel, q, k, v)
      return out, pull(g)

    jax.block_until_ready(run(q, k, v, g))
    start = time.perf_counter()
    for _ in range(repeats):
      out = run(q, k, v, g)
    jax.block_until_ready(out)
    return 1000 * (time.perf_counter() - start) / repeats

  found = {}
  for name, kernel in kernels.items():
    try:
      found[name] = timed(kernel)
    except (NotImplementedError, RuntimeError, ValueError) as error:
      found[name] = str(error).partition('\n')[0]
  return found


def sampler(device: jax.Device) -> dict[str, float]:
  """The greatest difference of 16 samples, of values in -1 .. 1, from the CPU's."""
  config = config_of('fashion_mnist_uvit', {})
  model = build.model(config)
  with jax.default_device(jax.devices('cpu')[0]):
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))

  def draw(params):
    keys = fold_in(jax.random.key(1), jnp.arange(16))
    grid = time_grid(model.schedule(params), 16)
    return sample(keys, dpmpp_2m(), model.denoiser(params), grid, model.image_shape)

  def on(device):
    with jax.default_device(device), jax.default_matmul_precision('highest'):
      return jax.device_get(jax.jit(draw)(jax.device_put(params, device)))

  return {'difference': float(np.abs(on(device) - on(jax.devices('cpu')[0])).max())}


def main(_):
  """Prints a JSON line after each part, with those before it."""
  device = jax.devices()[0]
  cases = {name: case for name, case in CASES.items() if name.startswith(flags.FLAGS.only)}
  result = {'device_kind': device.device_kind, 'jax': jax.__version__, 'relative_errors': {}}
  with ThreadPoolExecutor(flags.FLAGS.threads) as pool:  # nearly all of it is compilation
    parts = {pool.submit(relative_errors, *case, device): name for name, case in cases.items()}
    case = next(iter(cases.values()))
    parts |= {pool.submit(runs, case): 'runs', pool.submit(sampler, device): 'sampler'}
    parts[pool.submit(attention, device)] = 'attention'
    for part in as_completed(parts):
      name = parts[part]
      (result['relative_errors'] if name in CASES else result)[name] = part.result()
      print(json.dumps(result), flush=True)
  result['attention_ms'] = attention_ms(device)
  print(json.dumps(result), flush=True)


if __name__ == '__main__':
  flags.DEFINE_string('only', '', 'Only models whose name begins so; the first takes the steps.')
  flags.DEFINE_integer('threads', 8, 'Parts computed at a time.')
  app.run(main)
