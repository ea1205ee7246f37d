import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdm.build.optimizer import optimizer as make_optimizer
from vdm.build.state import apply_gradients, create, named_params
from vdm.diffusion import averages

PARAMS = {
  'network': {
    'conv_in': {'kernel': jnp.ones((3, 3, 1, 4)), 'bias': jnp.ones(4)},
    'norm': {'scale': jnp.ones(4), 'bias': jnp.ones(4)},
    'label': {'embedding': jnp.ones((10, 4))},
  },
  'schedule': {'slope': jnp.float32(18.3), 'log_snr_max': jnp.float32(13.3)},
}
SETTINGS = dict(
  num_steps=100,
  kind='adamw',
  moments='float32',
  learning_rate=0.1,
  warmup_steps=0,
  decay='constant',
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  weight_decay=0.5,
  clip_norm=0.0,
  schedule_rate=1.0,
)


def test_weight_decay_reaches_kernels_alone():
  """With no gradient, AdamW moves what decays: not the learned end points, norms or biases."""
  optimizer = make_optimizer(**SETTINGS)
  before = create(PARAMS, optimizer)
  zero = jax.tree.map(jnp.zeros_like, PARAMS)
  after = apply_gradients(before, zero, optimizer, {'ema': 0.9}).params
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, after)
  assert moved['network'].pop('conv_in') == {'kernel': True, 'bias': False}
  assert not any(jax.tree.leaves(moved))


@pytest.mark.parametrize('decay, end', [('constant', 0.1), ('cosine', 0.0), ('linear', 0.0)])
def test_learning_rate_warms_up_without_an_update_of_zero_and_decays(decay, end):
  """Every update of a constant gradient under Adam is the learning rate itself."""
  settings = SETTINGS | dict(warmup_steps=10, decay=decay, weight_decay=0.0)
  optimizer = make_optimizer(**settings)
  params, opt_state, sizes = {'network': jnp.zeros(1)}, None, []
  params = {'network': {'bias': jnp.zeros(1)}}
  opt_state = optimizer.init(params)
  for _ in range(101):
    updates, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    sizes.append(-float(updates['network']['bias'][0]))
  np.testing.assert_allclose(sizes[:10], (1 + np.arange(10)) * 0.01, atol=1e-6)
  np.testing.assert_allclose(sizes[10], 0.1, atol=1e-6)
  np.testing.assert_allclose(sizes[100], end, atol=1e-5)


@pytest.mark.parametrize('warmup_steps', [1, 2])
def test_a_short_warm_up_changes_the_parameters_at_once(warmup_steps):
  optimizer = make_optimizer(**SETTINGS | dict(warmup_steps=warmup_steps, weight_decay=0.0))
  updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates['network']['conv_in']['bias'], -0.1 / warmup_steps, rtol=1e-4)


def test_the_schedule_moves_at_its_own_rate():
  """The first update of Adam is the learning rate, whatever the gradient."""
  optimizer = make_optimizer(**SETTINGS | dict(weight_decay=0.0, schedule_rate=10.0))
  updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates['schedule']['slope'], -1.0, rtol=1e-4)
  np.testing.assert_allclose(updates['network']['conv_in']['bias'], -0.1, rtol=1e-4)


def test_muon_moves_kernels_as_orthogonal_matrices_and_the_rest_by_adam():
  """Every singular value of an update is that of the others, and its mean square Adam's."""
  rng = np.random.RandomState(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  shapes = {'conv': (3, 3, 8, 16), 'dense': (24, 6)}
  params = {'network': {name: {'kernel': draw(*shape)} for name, shape in shapes.items()}}
  params['network']['block_*'] = {'conv': {'kernel': draw(5, 3, 3, 4, 8), 'bias': draw(5, 8)}}
  params['schedule'] = {'slope': draw(), 'interior': {'kernel': draw(3, 4)}}
  optimizer = make_optimizer(**SETTINGS | dict(kind='muon', weight_decay=0.0))
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  stacked = np.asarray(updates['network']['block_*']['conv']['kernel']).reshape(5, -1, 8)
  matrices = [
    np.reshape(u['kernel'], (-1, u['kernel'].shape[-1]))
    for u in (updates['network']['conv'], updates['network']['dense'])
  ]
  for matrix in [*matrices, *stacked]:
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert singular.max() < 1.8 * singular.min()  # of five Newton-Schulz steps
    assert 0.1 * 0.2 * 0.7 < np.sqrt(np.mean(matrix**2)) < 0.1 * 0.2 * 1.2
  for leaf in jax.tree.leaves([updates['schedule'], updates['network']['block_*']['conv']['bias']]):
    np.testing.assert_allclose(np.abs(leaf), 0.1, rtol=1e-4)  # Adam's first step


def test_muon_decays_kernels_alone():
  optimizer = make_optimizer(**SETTINGS | dict(kind='muon'))
  zero = jax.tree.map(jnp.zeros_like, PARAMS)
  after = apply_gradients(create(PARAMS, optimizer), zero, optimizer, {'ema': 0.9}).params
  np.testing.assert_allclose(after['network']['conv_in'].pop('kernel'), 1 - 0.1 * 0.5, rtol=1e-6)
  left = jax.tree.map(jnp.asarray, PARAMS)
  del left['network']['conv_in']['kernel']
  jax.tree.map(np.testing.assert_array_equal, after, left)


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_first_moments_may_be_of_half_the_size(kind):
  sizes = {}
  for moments in ('float32', 'bfloat16'):
    optimizer = make_optimizer(**SETTINGS | dict(kind=kind, moments=moments))
    state = optimizer.init(PARAMS)
    sizes[moments] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    updates, _ = optimizer.update(PARAMS, state, PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype('float32')}
  count = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
  assert sizes['float32'] - sizes['bfloat16'] == 2 * count


def test_clipping_bounds_the_gradient_norm():
  optimizer = make_optimizer(**SETTINGS | dict(clip_norm=1.0))
  grads = jax.tree.map(lambda a: 100 * jnp.ones_like(a), PARAMS)
  _, opt_state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  adam = [
    s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu')
  ]
  np.testing.assert_allclose(optax.tree.norm(adam[0].mu) / (1 - 0.9), 1, rtol=1e-4)


def test_average_halves_the_past_after_one_half_life():
  """Weight of the initial value after n steps is 0.5 ** (n batch / halflife)."""
  optimizer = optax.set_to_zero()
  current = create({'network': jnp.float32(0.0)}, optimizer)
  current = current.replace(averages={'ema': {'network': jnp.float32(1.0)}})
  for _ in range(50):
    share = averages.exponential_share(current.step, 32, halflife_images=800, rampup_ratio=0.0)
    current = apply_gradients(current, current.params, optimizer, {'ema': share})
  np.testing.assert_allclose(current.averages['ema']['network'], 0.25, rtol=1e-4)
  assert current.step == 50


def test_averages_are_kept_side_by_side():
  optimizer = optax.set_to_zero()
  current = create({'network': jnp.float32(1.0)}, optimizer, averages=('ema', 'slow', 'fast'))
  current = current.replace(params={'network': jnp.float32(0.0)})
  shares = {'ema': 0.5, 'slow': 0.1, 'fast': 1.0}
  for _ in range(2):
    current = apply_gradients(current, current.params, optimizer, shares)
  values = {n: float(named_params(current, n)['network']) for n in ('raw', *shares)}
  assert values == pytest.approx({'raw': 0.0, 'ema': 0.25, 'slow': 0.81, 'fast': 0.0})


def test_parameters_and_average_do_not_share_buffers():
  """The state is donated: one buffer must not be given away twice."""
  created = create(PARAMS, make_optimizer(**SETTINGS))
  pairs = zip(
    jax.tree.leaves(created.params), jax.tree.leaves(created.averages['ema']), strict=True
  )
  assert all(p.unsafe_buffer_pointer() != e.unsafe_buffer_pointer() for p, e in pairs)
