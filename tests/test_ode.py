"""The probability-flow ODE against closed forms, and the bound and its dequantisers."""

import importlib
import itertools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from vdm.configs import default, digits

from vdm import build, data
from vdm.diffusion import ode
from vdm.diffusion.decoders import discrete, to_grid
from vdm.diffusion.gaussian import Prediction, fold_in, q_sample
from vdm.diffusion.schedules import linear
from vdm.evaluation import evaluate
from vdm.evaluation import ode as evaluation_ode
from vdm.system import parallel
from vdm.training import loop
from vdm.workdir.load import read_run

ENDS = (jnp.float32(12.0), jnp.float32(-12.0))
SETTINGS = dict(rtol=1e-5, atol=1e-4, max_steps=500)


@pytest.fixture
def exact(monkeypatch):
  """The mixtures, their densities and their denoisers."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1])
  return importlib.import_module('benchmarks.likelihood')


def test_the_field_moves_z_along_its_own_diffusion_path():
  """With the true x and eps, z = alpha x + sigma eps, whose slope is that of alpha and sigma."""
  x, eps, log_snr = jnp.array([[0.3, -0.7]]), jnp.array([[1.1, 0.4]]), jnp.array([1.7])
  f = ode.velocity(lambda z, log_snr: Prediction(x, eps), log_snr)
  _, slope = jax.jvp(lambda at: q_sample(x, eps, at), (log_snr,), (jnp.ones(1),))
  np.testing.assert_allclose(f(q_sample(x, eps, log_snr)), slope, rtol=1e-5)


def test_trace_is_that_of_the_jacobian(key):
  """A full, asymmetric Jacobian: exact probes exactly, Hutchinson's within its known error."""
  matrix = jax.random.normal(key, (6, 6))
  f = lambda z: jnp.tanh(z.reshape(-1, 6) @ matrix).reshape(z.shape)
  z = jax.random.normal(key, (2, 2, 3))
  jacobian = jax.vmap(jax.jacobian(lambda z: f(z[None])[0].reshape(6)))(z).reshape(2, 6, 6)
  expected = jnp.trace(jacobian, axis1=1, axis2=2)
  dz, trace = ode.velocity_and_trace(f, z, ode.exact_probes(2, (2, 3)))
  np.testing.assert_allclose(dz, f(z))
  np.testing.assert_allclose(trace, expected, rtol=1e-4)
  symmetric = (jacobian + jacobian.swapaxes(1, 2)) / 2
  off_diagonal = symmetric * (1 - jnp.eye(6))[None]
  variance = {
    'gaussian': 2 * (symmetric**2).sum((1, 2)),
    'rademacher': 2 * (off_diagonal**2).sum((1, 2)),
  }
  for name, draw in ode.PROBES.items():
    _, trace = ode.velocity_and_trace(f, z, draw(fold_in(key, jnp.arange(2)), (4000, 2, 3)))
    assert (jnp.abs(trace - expected) < 4 * jnp.sqrt(variance[name] / 4000)).all(), name


@pytest.fixture
def solve(exact):
  """(mixture, z_0, rtol, atol) -> Solution; compiled once."""
  if not _solve:

    def run(m, z_0, rtol, atol):
      probes = ode.exact_probes(len(z_0), z_0.shape[1:])
      return ode.log_prob(exact.denoiser_of(m), z_0, *ENDS, probes, rtol, atol, max_steps=500)

    _solve.append(jax.jit(run))
  return _solve[0]


_solve = []


def example(exact, gaussian=False):
  """A mixture in 3-d, eight z_0 of it, and their exact log p."""
  m = exact.mixture(3, 3)
  if gaussian:
    m = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), m)._replace(
      weight=jnp.full(3, 1 / 3)
    )
  log_snr = jnp.full(8, ENDS[0])
  x, eps = exact.sample(m, jax.random.key(0), 8), jax.random.normal(jax.random.key(1), (8, 3))
  z_0 = q_sample(x, eps, log_snr)
  return m, z_0, exact.log_density(m, z_0, log_snr)


@pytest.mark.parametrize('gaussian', [True, False], ids=['gaussian', 'mixture'])
def test_log_prob_is_exact_and_its_error_falls_with_the_tolerance(exact, solve, gaussian):
  m, z_0, expected = example(exact, gaussian)
  error, evaluations = {}, {}
  for tolerance in (3e-3, 3e-4, 3e-5):
    solution = solve(m, z_0, tolerance, tolerance)
    assert solution.finished.all()
    error[tolerance] = jnp.abs(solution.log_prob - expected).mean()
    evaluations[tolerance] = solution.evaluations.mean()
  assert error[3e-5] < 2e-3
  assert error[3e-4] < error[3e-3] / 4 and error[3e-5] < error[3e-4] / 4, error
  assert evaluations[3e-3] < evaluations[3e-4] < evaluations[3e-5]


def test_an_example_takes_its_own_steps(exact, solve):
  """Beside easy or hard ones the result and its cost are the same; hard ones cost more."""
  m, z_0, _ = example(exact)
  alone = solve(m, jnp.broadcast_to(z_0[:1], z_0.shape), 1e-4, 1e-4)
  hard = z_0.at[1:].add(3.0 * jnp.arange(1, 8).reshape(7, 1))  # far away from all components
  beside = solve(m, hard, 1e-4, 1e-4)
  np.testing.assert_allclose(beside.log_prob[0], alone.log_prob[0], rtol=1e-5)
  assert beside.evaluations[0] == alone.evaluations[0]
  assert len(set(beside.evaluations.tolist())) > 1


@pytest.mark.parametrize('tolerance', [1e-2, 1e-4])
def test_what_a_mask_leaves_out_does_not_loosen_the_tolerance(exact, tolerance):
  """A field of one dimension that counts among 64 is solved as it is by itself."""
  m = exact.mixture(3, 1)
  inside = jnp.arange(64) == 5
  z_0 = exact.sample(m, jax.random.key(0), 8)

  def masked(z, log_snr):
    found = exact.denoiser_of(m)(z[:, 5:6], log_snr)
    return Prediction(*(jnp.where(inside, value, 0.0) for value in found))

  def solve(denoiser, z_0, valid=None):
    probes = ode.exact_probes(len(z_0), z_0.shape[1:])
    how = dict(rtol=tolerance, atol=tolerance, max_steps=500)
    return ode.log_prob(denoiser, z_0, *ENDS, probes, valid=valid, **how)

  alone = jax.jit(lambda z: solve(exact.denoiser_of(m), z))(z_0)
  valid = jnp.broadcast_to(inside, (8, 64))
  among = jax.jit(lambda z: solve(masked, z, valid))(jnp.where(inside, z_0, 0.0))
  np.testing.assert_array_equal(among.evaluations, alone.evaluations)
  np.testing.assert_allclose(among.log_prob, alone.log_prob, atol=2e-3)


@pytest.mark.parametrize('log_snr_max', [4.0, 8.0])
def test_dequantisers_draw_from_the_density_that_they_state(log_snr_max):
  num_values, u = 8, jnp.tile(jnp.array([[0, 3, 7]]), (3000, 1))
  keys = fold_in(jax.random.key(0), jnp.arange(len(u)))
  std, half = math.exp(-log_snr_max / 2), 1 / num_values
  centre = np.asarray(to_grid(u, num_values), np.float64)
  cells = {
    'uniform': stats.uniform(-half, 2 * half),
    'truncated_normal': stats.truncnorm(-half / std, half / std, scale=std),
  }
  for name, draw in discrete(num_values).dequantizations.items():
    y, log_q = draw(keys, u, jnp.float32(log_snr_max))
    offset = np.clip(np.asarray(y, np.float64) - centre, -half, half)  # float32 at the edges
    np.testing.assert_allclose(np.asarray(y) - centre, offset, atol=1e-6)
    # scipy's density of the cell, which integrates to one, is the one stated ...
    np.testing.assert_allclose(log_q, cells[name].logpdf(offset).sum(axis=1), atol=1e-3)
    # ... and the one drawn from
    assert stats.kstest(offset.ravel(), cells[name].cdf).pvalue > 1e-3


def test_discrete_value_is_that_of_the_density_of_z_0_over_alpha_0(exact):
  """At an end point where alpha_0 is not one, for the very draw of y."""
  m, (low, high) = exact.mixture(3, 3), (ENDS[1], jnp.float32(1.0))
  u = jnp.array([[0, 3, 7], [4, 4, 3]])
  keys = fold_in(jax.random.key(0), jnp.arange(2))
  probes = ode.exact_probes(2, (3,))
  dequantize = discrete(8).dequantizations['truncated_normal']
  solution = ode.data_log_prob(
    exact.denoiser_of(m), u, keys, high, low, dequantize, 1, probes, **SETTINGS
  )
  y, log_q = dequantize(fold_in(keys, jnp.zeros(2, jnp.int32)), u, high)
  alpha_0 = 1 / math.sqrt(1 + math.exp(-1))
  log_p = exact.log_density(m, alpha_0 * y, jnp.full(2, high)) + 3 * math.log(alpha_0)
  np.testing.assert_allclose(solution.log_prob, log_p - log_q, atol=3e-3)


@pytest.fixture(scope='module')
def small_tables():
  """The benchmark's rows at sizes that take seconds."""
  root = str(pathlib.Path(__file__).parents[1])
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(root)
    exact = importlib.import_module('benchmarks.likelihood')
    methods = {'ODE, exact trace': ('exact', exact.TIGHT)}
    m = exact.mixture(3, 3)
    yield {
      'density': list(exact.density_rows('', m, 64, 64, methods)),
      'mass': list(exact.mass_rows('', m, 400, samples=(1, 8))),
      'grid': list(exact.grid_rows(num_dims=3, num_values=128, count=64, draws=32)),
    }


@pytest.mark.slow
def test_bound_and_ode_agree_on_the_exact_density(small_tables):
  continuous, fine, coarse, by_ode = (row.difference() for row in small_tables['density'])
  assert abs(continuous[0]) < 4 * continuous[1] < 0.3
  assert fine[0] - continuous[0] < 0.15 < 0.3 < coarse[0] - continuous[0]  # O(1 / T)
  assert abs(by_ode[0]) < 5e-4
  assert '| ODE, exact trace | ' in str(small_tables['density'][3])


@pytest.mark.slow
def test_more_importance_samples_tighten_the_bound(small_tables):
  one, one_hutchinson, eight, eight_hutchinson = small_tables['mass']
  difference, error = one.difference()
  assert difference > 2 * error
  tighter, its_error = eight.difference()
  assert -4 * its_error < tighter < difference / 2
  # The probe belongs to the image: its error is the same for one draw and for eight.
  noise = [
    np.subtract(b.values, a.values) for a, b in ((one, one_hutchinson), (eight, eight_hutchinson))
  ]
  assert np.std(noise[0] - noise[1]) < 0.5 * np.std(noise[0])


@pytest.mark.slow
def test_bound_with_decoder_and_ode_agree_on_data_of_the_grid(small_tables):
  continuous, fine, coarse, truncated, uniform = (row.difference() for row in small_tables['grid'])
  assert abs(continuous[0]) < 4 * continuous[1] + 0.01
  assert continuous[0] - 4 * continuous[1] < fine[0] < coarse[0]
  assert -4 * truncated[1] - 1e-3 < truncated[0] < 0.02
  assert uniform[0] > truncated[0] + 0.2  # asks the model about what it never saw


# --- the evaluation


@pytest.mark.slow
def test_it_is_in_float32_whatever_the_activations_are(rank_promotion_allowed):
  config = digits.get_config('debug').unlock()
  settings = evaluation_ode.OdeSettings(**config.eval.ode)
  images = np.random.default_rng(0).integers(0, 17, (2, 8, 8, 1)).astype(np.uint8)
  batch = {'image': images, 'index': jnp.arange(2), 'mask': jnp.ones(2)}
  found, bounds = [], []
  for dtype in ('float32', 'bfloat16'):
    config.model.dtype = dtype
    model = build.model(config)
    params = model.init(jax.random.key(0))
    # nothing at zero: the layers that start there hide the others
    params = jax.tree.map(lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params)
    found.append(jax.jit(evaluation_ode.make_step(model, settings))(params, batch, 0))
    z = jnp.asarray(images, jnp.float32) / 8 - 1
    bounds.append(model.denoiser(params)(z, jnp.zeros(2)).eps)
  assert float(jnp.abs(bounds[0] - bounds[1]).max()) > 1e-4  # of the bound they are not the same
  np.testing.assert_array_equal(found[0]['value'], found[1]['value'])
  np.testing.assert_array_equal(found[0]['evaluations'], found[1]['evaluations'])


def oracle(exact):
  """A model of 2 x 2 images whose denoiser is exact, and images of it."""
  m = exact.mixture(3, 4)
  denoise = exact.denoiser_of(m)

  def denoise_images(z, log_snr):
    prediction = denoise(z.reshape(-1, 4), log_snr)
    return Prediction(*(leaf.reshape(z.shape) for leaf in prediction))

  schedule = linear(-12.0, 12.0)
  model = build.Model(
    init=None,
    schedule=lambda *_: schedule,
    denoiser=lambda params, conditions=None, **_: denoise_images,
    weighting=None,
    image_shape=(2, 2, 1),
    decoder=discrete(exact.NUM_VALUES),
  )
  u, log_mass = exact.discretise(m, jax.random.key(5), 40, exact.NUM_VALUES)
  images = np.asarray(u, np.uint8).reshape(40, 2, 2, 1)
  source = data.Source(
    lambda index: {'image': images[index], 'label': np.zeros(len(index), np.int32)},
    {'num_images': len(images)},
  )
  return model, source, np.asarray(log_mass, np.float64)


def score(exact, batch_size=16, **settings):
  model, source, log_mass = oracle(exact)
  config = default.get_config()
  with config.unlocked():
    config.eval.batch_size = batch_size
    config.eval.ode.update(trace='exact', dequantization='uniform', **settings)
  settings = evaluation_ode.OdeSettings(**config.eval.ode)
  evaluator = evaluation_ode.make_evaluator(model, parallel.make_mesh(), settings, seed=0)
  hosts = dict(process_index=0, process_count=1)
  result = evaluator({}, data.eval_batches(source, batch_size=batch_size, **hosts), len(source))
  return result, -log_mass / (4 * math.log(2))


@pytest.mark.slow
def test_evaluation_counts_every_image_once_whatever_the_batch_size(exact):
  small, bits = score(exact, batch_size=16)
  large, _ = score(exact, batch_size=48)
  assert small.num_images == large.num_images == 40
  np.testing.assert_allclose(small[:2], large[:2], rtol=1e-5)
  assert small.evaluations == large.evaluations <= small.max_evaluations == large.max_evaluations
  assert -0.01 < small.value - bits.mean() < 0.1
  np.testing.assert_allclose(small.stderr, bits.std(ddof=1) / math.sqrt(40), rtol=0.3)


def test_no_draw_of_a_seed_is_one_of_another():
  drawn = [evaluation_ode.seeds_of(seed, 8) for seed in range(50)]
  assert [seeds[0] for seeds in drawn] == list(range(50))
  assert len(set(itertools.chain(*drawn))) == 400 and max(itertools.chain(*drawn)) < 2**31
  assert evaluation_ode.seeds_of(-1, 2)[0] == -1
  assert drawn[3] == evaluation_ode.seeds_of(3, 9)[:8]


def test_too_few_steps_stop_the_evaluation_with_the_remedy(exact):
  with pytest.raises(ValueError, match=r'config\.eval\.ode\.max_steps=2 .*config\.eval\.ode\.rtol'):
    score(exact, max_steps=2)


@pytest.mark.parametrize(
  ('leaf', 'value', 'says'),
  [
    ('likelihood', 'exact', "'elbo', 'ode' or 'elbo,ode'"),
    ('ode.trace', 'hutchison', "'hutchinson' or 'exact'"),
    ('ode.dequantization', 'normal', "'uniform', 'truncated_normal' or 'none'"),
    ('ode.dequantization', 'none', "'uniform' or 'truncated_normal'"),
    ('ode.atol', 0.0, 'try 1e-3'),
    ('ode.importance_samples', 0, '1 or more'),
  ],
)
def test_bad_settings_are_refused(leaf, value, says):
  config = default.get_config()
  config.eval.update_from_flattened_dict({leaf: value})
  if value == 'none':  # which only densities have: asked where the ODE is
    build.check_config(config)
    config.eval.likelihood = 'elbo,ode'
  with pytest.raises(ValueError, match=rf'config\.eval\.{leaf}={value!r} must be .*{says}'):
    build.check_config(config)


@pytest.mark.slow
def test_eval_mode_writes_a_card_for_each_likelihood(tmp_path, rank_promotion_allowed):
  config = digits.get_config('debug')
  with config.unlocked():
    config.train.eval_every_steps = 4
  assert loop.train(config, tmp_path) == 0
  for card in (tmp_path / 'cards').glob('*.json'):
    card.unlink()
  config.eval.likelihood = 'elbo,ode'
  assert evaluate.run(read_run(config, tmp_path)) == 0
  found = {path.name: json.loads(path.read_text()) for path in (tmp_path / 'cards').glob('*.json')}
  (name,) = (name for name in found if name.startswith('ode_'))
  assert name.startswith('ode_bits_per_dim_ema_truncated_normal1_hutchinson_16_seed0_')
  exact_card = found.pop(name)
  elbo, raw = (found[name] for name in sorted(found))
  assert all(
    re.fullmatch(r'bits_per_dim_\w+_continuous_16x2_seed0_\w{8}_step0+4\.json', n) for n in found
  )
  assert (elbo['params'], raw['params']) == ('ema', 'raw')
  assert exact_card['bound'].startswith('probability-flow ODE, truncated_normal dequantisation')
  assert exact_card['num_images'] == 16 and exact_card['mean_evaluations'] > 6
  assert exact_card['stderr_is'].startswith('standard deviation over images')
  common = elbo.keys() & exact_card.keys()
  assert {'metric', 'data', 'params', 'config', 'environment', 'log_snr_max'} <= common
  # Four steps from the start both are worse than uniform, log2(17) = 4.1, by not too much.
  assert 4 < exact_card['value'] < elbo['value'] < 8
