"""Time of a train step as the public VDM code takes it, beside ours: one JSON line.

  python -m benchmarks.public_step --num_blocks=8 --width=128 --batch_size=128 --steps=20

A plain port, written for this comparison from a description of that code: blocks unrolled, flax's
own layers, float32, a softmax over all 256 values in the reconstruction term, learned end points,
AdamW on every kernel and scale, an average, a state that is not donated. Its number of parameters
is the published one, and with ours it takes turns in one process, `configs/cifar10.py` at the same
size in each of --dtypes, so that the ratios are of one device at one time. A line is printed after
each of ours, with those before it measured again.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import linen as nn
from vdm.configs import cifar10

from benchmarks import train_step
from vdm import build
from vdm.system import parallel, runners
from vdm.training.step import make_train_step

VALUES, EXPONENTS, GAMMA = 256, (6, 7), (-13.3, 5.0)
zeros = nn.initializers.zeros


class ResNetBlock(nn.Module):
  """GroupNorm, swish, convolution, shift by the condition, and once more with dropout; added."""

  width: int
  train: bool

  @nn.compact
  def __call__(self, x, cond):
    h = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm(32)(x)))
    h += nn.Dense(self.width, use_bias=False, kernel_init=zeros)(cond)[:, None, None]
    h = nn.swish(nn.GroupNorm(32)(h))
    h = nn.Dropout(0.1, deterministic=not self.train)(h)
    h = nn.Conv(self.width, (3, 3), kernel_init=zeros)(h)
    return h + (x if x.shape[-1] == self.width else nn.Dense(self.width)(x))


class Attention(nn.Module):
  """Self-attention of one head over all positions; added."""

  @nn.compact
  def __call__(self, x):
    width, h = x.shape[-1], nn.GroupNorm(32)(x).reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = (nn.Dense(width)(h) for _ in range(3))
    weights = nn.softmax(jnp.einsum('bqc,bkc->bqk', q, k) / np.sqrt(width))
    h = nn.Dense(width, kernel_init=zeros)(jnp.einsum('bqk,bkc->bqc', weights, v))
    return x + h.reshape(x.shape)


class ScoreNetwork(nn.Module):
  """eps_hat of z [B H W C] at t [B]; `num_blocks` blocks in, one more out, at full resolution."""

  width: int
  num_blocks: int
  train: bool

  @nn.compact
  def __call__(self, z, t):
    frequency = np.exp(-np.arange(self.width // 2) * np.log(1e4) / (self.width // 2 - 1))
    angle = 1000 * t[:, None] * jnp.asarray(frequency, jnp.float32)
    cond = jnp.concatenate([jnp.sin(angle), jnp.cos(angle), jnp.zeros((len(t), 1))], axis=1)
    for _ in range(2):
      cond = nn.swish(nn.Dense(4 * self.width)(cond))
    waves = [f(2 * jnp.pi * 2**n * z) for n in EXPONENTS for f in (jnp.sin, jnp.cos)]
    h = nn.Conv(self.width, (3, 3))(jnp.concatenate([z, *waves], axis=-1))
    block = functools.partial(ResNetBlock, self.width, self.train)
    kept = [h]
    for _ in range(self.num_blocks):
      h = block()(h, cond)
      kept.append(h)
    h = block()(Attention()(block()(h, cond)), cond)
    while kept:
      h = block()(jnp.concatenate([h, kept.pop()], axis=-1), cond)
    h = nn.swish(nn.GroupNorm(32)(h))
    return z + nn.Conv(z.shape[-1], (3, 3), kernel_init=zeros)(h)


def loss(network, params, images, key, train=True):
  """Mean bits per dimension of images uint8 [B H W C] under the bound, one time per image."""
  gamma = lambda t: params['gamma']['b'] + jnp.abs(params['gamma']['w']) * t
  key_t, key_0, key_eps, key_dropout = jax.random.split(key, 4)
  encode = lambda u: 2 * ((u + 0.5) / VALUES) - 1
  f, batch = encode(images.astype(jnp.float32)), len(images)
  ends = gamma(0.0), gamma(1.0)
  noisy = f + jnp.exp(ends[0] / 2) * jax.random.normal(key_0, f.shape)
  values = encode(jnp.arange(VALUES, dtype=jnp.float32))
  logits = -0.5 * ((noisy[..., None] - values) * jnp.exp(-ends[0] / 2)) ** 2
  log_prob = nn.log_softmax(logits) * jax.nn.one_hot(images, VALUES)
  recon = -log_prob.sum(axis=(1, 2, 3, 4))
  variance = nn.sigmoid(ends[1])
  prior = 0.5 * ((1 - variance) * f**2 + variance - jnp.log(variance) - 1).sum(axis=(1, 2, 3))
  t = (jax.random.uniform(key_t) + jnp.arange(batch) / batch) % 1
  gamma_t, slope = jax.jvp(gamma, (t,), (jnp.ones_like(t),))
  eps, spread = jax.random.normal(key_eps, f.shape), lambda a: a[:, None, None, None]
  z = spread(jnp.sqrt(nn.sigmoid(-gamma_t))) * f + spread(jnp.sqrt(nn.sigmoid(gamma_t))) * eps
  position = (gamma_t - GAMMA[0]) / (GAMMA[1] - GAMMA[0])
  eps_hat = network.apply(
    {'params': params['network']}, z, position, rngs={'dropout': key_dropout} if train else {}
  )
  diffusion = 0.5 * slope * ((eps - eps_hat) ** 2).sum(axis=(1, 2, 3))
  return (recon + prior + diffusion).mean() / (np.prod(f.shape[1:]) * np.log(2))


def init(network, shape):
  """Parameters for images of `shape`: the network's, and the line gamma(t) = b + |w| t."""
  params = network.init(jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1))['params']
  gamma = {'b': jnp.float32(GAMMA[0]), 'w': jnp.float32(GAMMA[1] - GAMMA[0])}
  return {'network': params, 'gamma': gamma}


def public_step(width, num_blocks, batch_size, shape):
  """Compiles the step; returns (a function that takes one, seconds of compilation, parameters)."""
  optimizer = optax.adamw(2e-4, b2=0.99, weight_decay=0.01)
  network = ScoreNetwork(width, num_blocks, train=True)

  def step(state, images):
    number, params, average, opt_state = state
    key = jax.random.fold_in(jax.random.key(1), number)
    bits, grads = jax.value_and_grad(functools.partial(loss, network))(params, images, key)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda a, p: a + 1e-4 * (p - a), average, params)
    return (number + 1, params, average, opt_state), bits

  params = jax.jit(lambda: init(ScoreNetwork(width, num_blocks, train=False), shape))()
  state = [(jnp.int32(0), params, params, optimizer.init(params))]
  images = np.random.default_rng(0).integers(0, VALUES, (batch_size, *shape)).astype(np.uint8)
  images = jax.device_put(images)
  compiled, seconds = train_step.compile_timed(jax.jit(step).lower(state[0], images))

  def run():
    state[0], bits = compiled(state[0], images)
    return bits

  return run, seconds, sum(leaf.size for leaf in jax.tree.leaves(params))


def our_step(width, num_blocks, batch_size, dtype):
  """The same of ours, `configs/cifar10.py` at this size."""
  config = cifar10.get_config()
  with config.unlocked():
    config.model.update(width=width, num_blocks=num_blocks, dtype=dtype)
    config.train.batch_size = batch_size
  model = build.model(config)
  mesh, init_state = parallel.make_mesh(), build.init_state(config, model)
  step = make_train_step(config, model)
  runner = runners.runner('jit', step, mesh, parallel.abstract_state(mesh, init_state))
  batch = runner.put_batch(train_step.random_batch(config))
  state = [parallel.initial_state(mesh, init_state)]
  compiled, seconds = train_step.compile_timed(runner.program.lower(state[0], batch))

  def run():
    state[0], metrics = compiled(state[0], batch)
    return metrics.scalars['loss']

  return run, seconds, sum(leaf.size for leaf in jax.tree.leaves(state[0].params))


def measured(made, batch_size):
  """Times the steps of `made`, name -> (step, seconds of compilation, parameters), in turn."""
  functions = {name: run for name, (run, _, _) in made.items()}
  train_step.time_in_turn(2, functions)
  times = train_step.time_in_turn(_STEPS.value, functions)
  base = np.median(next(iter(times.values())))
  return {
    name: {
      'step_ms': float(np.median(ms)),
      'min_ms': float(ms.min()),
      'images_per_s': float(1000 * batch_size / np.median(ms)),
      'ratio_of_speed': float(base / np.median(ms)),
      'compile_s': made[name][1],
      'parameters': made[name][2],
    }
    for name, ms in times.items()
  }


def main(_):
  """Prints a JSON line whenever one more of our steps is compiled."""
  size = (_WIDTH.value, _NUM_BLOCKS.value, _BATCH_SIZE.value)
  facts = {'width': size[0], 'num_blocks': size[1], 'batch_size': size[2], 'steps': _STEPS.value}
  facts |= {'device_kind': jax.devices()[0].device_kind, 'jax': jax.__version__}
  makers = {'public code, ported, float32': functools.partial(public_step, *size, (32, 32, 3))}
  makers |= {f'ours, {dtype}': functools.partial(our_step, *size, dtype) for dtype in _DTYPES.value}
  made = {}
  for name, make in makers.items():
    made[name] = make()
    print(f'{name}: compiled in {made[name][1]:.1f} s', file=sys.stderr, flush=True)
    if len(made) > 1:
      print(train_step.to_json(facts | measured(made, size[2])), flush=True)


if __name__ == '__main__':
  _WIDTH = flags.DEFINE_integer('width', 128, 'Channels; the published model has 128.')
  _NUM_BLOCKS = flags.DEFINE_integer('num_blocks', 8, 'Blocks a side; the published has 32.')
  _BATCH_SIZE = flags.DEFINE_integer('batch_size', 128, 'Images per step.')
  _STEPS = flags.DEFINE_integer('steps', 20, 'Steps timed, in turn.', lower_bound=1)
  _DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'Of our activations.')
  app.run(main)
