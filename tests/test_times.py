import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm.diffusion import times


@pytest.mark.slow
def test_one_time_in_each_stratum_for_every_batch_size():
  draw = jax.jit(times.stratified)
  for size in range(1, 129):
    t = np.sort(draw(jax.random.key(size), jnp.arange(128), size)[:size])
    low = np.arange(size) / size
    assert np.all(t >= low - 1e-6) and np.all(t <= low + 1 / size + 1e-6), size


def test_strata_are_equally_far_apart(key):
  t = np.sort(times.stratified(key, jnp.arange(49), 49))
  np.testing.assert_allclose(np.diff(t), 1 / 49, atol=1e-6)


def test_parts_of_a_batch_get_the_times_of_the_whole(key):
  whole = times.stratified(key, jnp.arange(24), 24)
  parts = [times.stratified(key, jnp.arange(24)[part::4], 24) for part in range(4)]
  for number, part in enumerate(parts):
    np.testing.assert_array_equal(whole[number::4], part)


@pytest.mark.parametrize('count', [1, 16, 360, 511, 512, 700, 1031])
def test_blocks_of_an_evaluation_hold_every_example_once_each_with_strata_of_its_own(count, key):
  index = jnp.arange(count)
  number, position, size = times.block_of(index, count)
  assert size.min() >= min(count, times.BLOCK) and size.max() < 2 * times.BLOCK
  t = times.stratified_in_blocks(key, index, count)
  for block in range(number.max() + 1):
    own = np.flatnonzero(number == block)
    np.testing.assert_array_equal(position[own], np.arange(len(own)))
    np.testing.assert_array_equal(size[own], len(own))
    np.testing.assert_array_equal(np.sort(np.floor(t[own] * len(own) + 1e-4)), np.arange(len(own)))
    assert own.max() - own.min() == len(own) - 1  # consecutive
  one_u = np.unique(np.round(t * size % 1, 3))
  assert len(one_u) <= 2 * (number.max() + 1)


def test_one_block_is_a_full_batch(key):
  alone = times.stratified(jax.random.fold_in(key, 0), jnp.arange(360), 360)
  whole = times.stratified_in_blocks(key, jnp.arange(360), 360)
  np.testing.assert_allclose(whole, alone, rtol=0, atol=1e-7)  # the division rounds


def test_each_time_is_uniform():
  """The first position of the batch falls into every stratum equally often."""
  keys = jax.random.split(jax.random.key(1), 8000)
  t = jax.vmap(lambda key: times.stratified(key, jnp.arange(8), 8)[0])(keys)
  counts, _ = np.histogram(t, 16, (0, 1))
  assert np.all(np.abs(counts - 500) < 5 * np.sqrt(500))


def test_discrete_times_are_the_ends_of_the_steps():
  t = jnp.array([0.0, 0.09, 0.1, 0.55, 0.999, 1.0])
  np.testing.assert_allclose(times.discretize(t, 10), [0.1, 0.1, 0.2, 0.6, 1, 1], rtol=1e-6)
