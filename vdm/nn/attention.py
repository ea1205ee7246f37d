"""Softmax attention, by what each kind of device is fast at."""

import contextlib
import contextvars
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

FLASH_FROM = 1024  # positions; below, the weights of an example are small beside the TPU's VMEM
_TWICE = contextvars.ContextVar('differentiated_twice', default=False)
FLASH_BLOCK = 512  # positions that the kernel works on at once


def softmax_attention(query, key, value):
  """Returns softmax(query key^T / sqrt(D)) value, with a float32 softmax; all are [B, S, N, D].

  It equals `jax.nn.dot_product_attention`, but the S x S weights are recomputed in the gradient
  (reverse mode only) instead of kept. On CPU it runs example by example, whose weights stay in the
  cache, and no S x S matrix is transposed, which is what XLA:CPU is slowest at: it takes about half
  the time. On TPU a kernel of JAX's keeps them on the chip from FLASH_FROM positions on, in a
  function that `parallel.jit` has told its mesh, whose devices divide the examples, and but inside
  `differentiated_twice`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device, size = mesh.abstract_device, query.shape[1]
  if device and device.platform == 'tpu' and _suits_flash(len(query), size, mesh):
    by_example = PartitionSpec(mesh.axis_names)
    run = jax.shard_map(_flash, in_specs=by_example, out_specs=by_example, check_vma=False)
    return run(query, key, value)
  return checkpoint_name(_attention(query, key, value), 'attention')


def _suits_flash(batch, size, mesh):
  fits = size >= FLASH_FROM and size % FLASH_BLOCK == 0 and not mesh.manual_axes
  return fits and batch % mesh.size == 0 and not _TWICE.get()


@contextlib.contextmanager
def differentiated_twice(twice=True):
  """Has attention inside be such that its gradient has one, too: the TPU's kernel has none."""
  token = _TWICE.set(twice)
  try:
    yield
  finally:
    _TWICE.reset(token)


def _flash(query, key, value):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  size, num_heads, width = query.shape[1:]
  mask = masks.MultiHeadMask([masks.FullMask((size, size))] * num_heads)
  names = 'block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq'.split()
  blocks = kernels.BlockSizes(**dict.fromkeys(names, FLASH_BLOCK))
  named = dict(residual_checkpoint_name='attention', head_shards=1, q_seq_shards=1)
  kernel = kernels.make_splash_mha(mask, block_sizes=blocks, **named)
  scaled = (query.astype(jnp.float32) / math.sqrt(width)).astype(query.dtype)
  heads_first = [a.swapaxes(1, 2) for a in (scaled, key, value)]
  return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)


@jax.custom_vjp
def _attention(query, key, value):
  return lax.platform_dependent(
    query, key, value, cpu=_attention_by_example, default=jax.nn.dot_product_attention
  )


def _attention_fwd(query, key, value):
  return _attention(query, key, value), (query, key, value)


def _attention_bwd(residuals, g):
  return lax.platform_dependent(
    *residuals, g, cpu=_attention_vjp_by_example, default=_attention_vjp_native
  )


def _attention_vjp_native(query, key, value, g):
  return jax.vjp(jax.nn.dot_product_attention, query, key, value)[1](g)


def _map_examples_and_heads(f, *arrays):
  """Maps f: [S, D] ... -> [S, D] ... over B and N of [B, S, N, D].

  Each device maps over its own examples: the partitioner would give all of them to every device.
  """

  def run(*arrays):
    batch, size, heads, _ = arrays[0].shape
    flat = [a.swapaxes(1, 2).reshape(batch * heads, size, -1) for a in arrays]
    out = lax.map(lambda args: f(*args), flat)
    return jax.tree.map(lambda a: a.reshape(batch, heads, size, -1).swapaxes(1, 2), out)

  mesh = jax.sharding.get_abstract_mesh()
  # under pmap the examples are a device's own already
  if mesh.empty or mesh.manual_axes or len(arrays[0]) % mesh.size:
    return run(*arrays)
  by_example = PartitionSpec(mesh.axis_names)
  return jax.shard_map(run, in_specs=by_example, out_specs=by_example, check_vma=False)(*arrays)


def _matmul(a, b):
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _attention_by_example(query, key, value):
  def attend(q, k, v):
    weights = jax.nn.softmax(_matmul(q, k.T) / math.sqrt(q.shape[-1]))
    return (weights.astype(v.dtype) @ v).astype(q.dtype)

  return _map_examples_and_heads(attend, query, key, value)


def _attention_vjp_by_example(query, key, value, g):
  def vjp(q, k, v, g):
    scale = 1 / math.sqrt(q.shape[-1])
    logits = _matmul(q, k.T) * scale
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - log_sum)
    dweights = _matmul(g, v.T)
    mean = (weights * dweights).sum(-1, keepdims=True)
    dlogits = (weights * (dweights - mean) * scale).astype(q.dtype)
    # Computing the transposes of weights and dlogits from the start is cheaper than transposing.
    weights_t = jnp.exp(_matmul(k, q.T) * scale - log_sum.T)
    dlogits_t = (weights_t * (_matmul(v, g.T) - mean.T) * scale).astype(q.dtype)
    return dlogits @ k, dlogits_t @ q, weights_t.astype(g.dtype) @ g

  return _map_examples_and_heads(vjp, query, key, value, g)


_attention.defvjp(_attention_fwd, _attention_bwd)
