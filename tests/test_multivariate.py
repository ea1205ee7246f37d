"""Schedules by dimension: the bound along a path, samples, the ODE, and those of a condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from numpy.polynomial import Polynomial
from numpy.polynomial.legendre import leggauss
from vdm.configs import default

import vdm
from vdm import build, codec
from vdm.codec.shared import share
from vdm.diffusion import decoders, ode
from vdm.diffusion.elbo import diffusion_loss, interior_gradient
from vdm.diffusion.gaussian import (
  Prediction,
  alpha,
  end_levels,
  end_points,
  log_snr_and_slope,
  mean_over_dims,
  sigma,
)
from vdm.diffusion.multivariate import learned_conditional, learned_multivariate, on_path
from vdm.diffusion.samplers import SAMPLERS, heun, sample, times
from vdm.diffusion.schedules import learned_net
from vdm.diffusion.weightings import elbo
from vdm.evaluation import bound, likelihood
from vdm.evaluation import ode as ode_bound
from vdm.training.step import loss, recipe

MIN, MAX = -9.0, 9.0
SHAPE = (4,)
ROOT = np.diag([0.2, 0.6, 1.0, 1.6]) @ (np.eye(4) + 0.8 * np.tri(4, k=-1))
EXACT = ROOT @ ROOT.T  # the covariance of the data: unequal variances, and correlated
OTHER = np.diag(np.diag(EXACT)) + 0.1 * np.ones((4, 4))


def random_params(seed, shape=SHAPE, size=1.5, per='dimension'):
  """Parameters of a learned path far from the line."""
  params = learned_multivariate(MIN, MAX, shape, per).init()
  keys = jax.random.split(jax.random.key(seed), 3)
  moved = {
    k: v + size * jax.random.normal(key, v.shape)
    for key, (k, v) in zip(keys, params['path'].items(), strict=True)
  }
  return params | {'path': moved}


def net(t):
  """`learned_net` before training, whose time all paths have."""
  learned = learned_net(MIN, MAX)
  return learned.as_schedule(learned.init())(t)


def path_of(params, shape=SHAPE, per='dimension'):
  return learned_multivariate(MIN, MAX, shape, per).as_schedule(params)


PARAMS = {'straight': random_params(0, size=0.0)} | {f'{n}': random_params(n) for n in range(4)}


def numpy_path(params, t):
  """log_snr and its slope at t [T], by the integral of (a t^2 + b t + c)^2 as NumPy has it."""
  columns = []
  for a, b, c in zip(*(np.float64(params['path'][k]) for k in 'abc'), strict=True):
    f = (Polynomial([c, b, a]) ** 2 + 1e-6).integ()
    h = 0.99 * f / f(1.0) + Polynomial([0, 0.01])
    columns.append((MAX - (MAX - MIN) * h(t), -(MAX - MIN) * h.deriv()(t)))
  return (np.stack(column, axis=1) for column in zip(*columns, strict=True))


def diffusion_by_quadrature(params, assumed=EXACT, told_mean=False):
  """1/2 int E sum_d -dlog_snr_d/dt (eps_hat - eps)_d^2 dt, of the denoiser of N(0, assumed).

  eps_hat = M z with M = S (A C A + S^2)^-1, so that the error is M A x + (M S - 1) eps. One that is
  `told_mean` takes the mean log_snr for that of all dimensions: it is wrong, and no density's.
  """
  nodes, weights = leggauss(300)
  t, total = (nodes + 1) / 2, 0.0
  for log_snr, slope, weight in zip(*numpy_path(params, t), weights / 2, strict=True):
    a, s = (np.diag((1 + np.exp(-sign * log_snr)) ** -0.5) for sign in (1, -1))
    known = np.full(4, log_snr.mean()) if told_mean else log_snr
    b, r = (np.diag((1 + np.exp(-sign * known)) ** -0.5) for sign in (1, -1))
    m = r @ np.linalg.inv(b @ assumed @ b + r @ r)
    error = m @ a @ EXACT @ a @ m.T + (m @ s - np.eye(4)) @ (m @ s - np.eye(4)).T
    total += weight * 0.5 * (-slope * np.diag(error)).sum()
  return total


def denoiser_of(covariance, told_mean=False):
  """The exact denoiser of N(0, covariance), for log_snr [B D]."""

  def denoise(z, log_snr):
    if told_mean:
      log_snr = jnp.broadcast_to(mean_over_dims(log_snr)[:, None], z.shape)
    a, s = alpha(log_snr), sigma(log_snr)
    noisy = a[:, :, None] * covariance[None] * a[:, None, :] + jax.vmap(jnp.diag)(s**2)
    scaled = jnp.linalg.solve(noisy, z[..., None])[..., 0]
    return Prediction(a * scaled @ covariance, s * scaled)

  return denoise


def diffusion_by_code(params, told_mean, num_nodes=100):
  """The same by `diffusion_loss`: a quadratic form's mean is its sum over unit vectors."""
  nodes, weights = leggauss(num_nodes)
  t = jnp.repeat(jnp.float32((nodes + 1) / 2), 8)
  x = jnp.tile(jnp.concatenate([jnp.float32(ROOT.T), jnp.zeros((4, 4))]), (num_nodes, 1))
  eps = jnp.tile(jnp.concatenate([jnp.zeros((4, 4)), jnp.eye(4)]), (num_nodes, 1))
  denoiser = denoiser_of(jnp.float32(EXACT), told_mean)
  term = diffusion_loss(denoiser, path_of(params), elbo(), x, t, eps)
  return (term.loss.reshape(num_nodes, 8).sum(axis=1) * jnp.float32(weights / 2)).sum()


def prior_and_reconstruction():
  """Of a normal decoder under a flat prior: 1/2 + 1/2 log(2 pi e^-MAX) for each dimension."""
  a2, s2 = 1 / (1 + np.exp(-MIN)), 1 / (1 + np.exp(MIN))
  prior = 0.5 * (a2 * np.diag(EXACT) + s2 - np.log(s2) - 1).sum()
  return prior, 2 * (1 + np.log(2 * np.pi) - MAX)


@pytest.mark.parametrize('name', PARAMS)
def test_the_exact_bound_is_the_entropy_along_any_path(name):
  """Up to what the ends lose: the decoder 1/2 log det(1 + C^-1 e^-MAX), the prior O(e^MIN)."""
  entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * EXACT)[1]
  lost = 0.5 * np.linalg.slogdet(np.eye(4) + np.linalg.inv(EXACT) * np.exp(-MAX))[1]
  bound = diffusion_by_quadrature(PARAMS[name], EXACT) + sum(prior_and_reconstruction())
  np.testing.assert_allclose(bound, entropy + lost, atol=2e-4)


def test_that_of_another_gaussian_is_its_cross_entropy_along_any_path():
  """A denoiser that is exact for some density has no better path, however bad the density is."""
  inverse = np.linalg.inv(OTHER)
  square = np.trace(inverse @ EXACT)
  cross = 0.5 * (square + np.linalg.slogdet(2 * np.pi * OTHER)[1])
  for params in PARAMS.values():
    bound = diffusion_by_quadrature(params, OTHER) + sum(prior_and_reconstruction())
    np.testing.assert_allclose(bound, cross, atol=0.01)


@pytest.mark.parametrize('told_mean', [False, True])
def test_the_loss_is_the_integral_along_the_path(told_mean):
  for params in (PARAMS['straight'], PARAMS['1']):
    want = diffusion_by_quadrature(params, told_mean=told_mean)
    np.testing.assert_allclose(diffusion_by_code(params, told_mean), want, rtol=2e-4)


def test_with_a_wrong_denoiser_the_bound_depends_on_the_path():
  bounds = [diffusion_by_quadrature(params, told_mean=True) for params in PARAMS.values()]
  exact = diffusion_by_quadrature(PARAMS['straight'])
  np.testing.assert_allclose(bounds[0], exact, rtol=1e-9)  # on the line there is one level
  assert np.all(np.array(bounds[1:]) > exact + 0.05)
  assert np.ptp(bounds[1:]) > 0.05


def test_the_gradient_of_the_path_is_zero_with_the_exact_denoiser_and_lowers_a_wrong_one():
  def gradient(params, told_mean):
    return jax.jit(jax.grad(lambda p: diffusion_by_code(p, told_mean)))(params)['path']

  params = PARAMS['1']
  exact, wrong = (gradient(params, told_mean) for told_mean in (False, True))
  norm = lambda tree: float(jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(tree))))
  assert norm(exact) < 0.01 * norm(wrong)
  step = jax.tree.map(lambda p, g: p - 0.05 * g / norm(wrong), params['path'], wrong)
  moved = params | {'path': step}
  before, after = (diffusion_by_quadrature(p, told_mean=True) for p in (params, moved))
  np.testing.assert_allclose(after - before, -0.05 * norm(wrong), rtol=0.2)


def test_the_speed_along_the_path_is_trained_by_the_variance():
  """It is the gradient of the mean square, by each dimension's own derivatives."""
  learned = learned_multivariate(MIN, MAX, SHAPE, num_hidden=8)
  params = learned.init() | {'path': PARAMS['1']['path']}
  keys = jax.random.split(jax.random.key(0), 3)
  t, eps = jax.random.uniform(keys[0], (16,)), jax.random.normal(keys[1], (16, 4))
  x = jax.random.normal(keys[2], (16, 4)) @ jnp.float32(ROOT.T)
  denoiser = denoiser_of(jnp.float32(EXACT), told_mean=True)

  def losses(interior, probe=None):
    schedule = learned.as_schedule(params | {'interior': interior})
    return diffusion_loss(denoiser, schedule, elbo(), x, t, eps, probe=probe).loss

  interior, zeros = params['interior'], jnp.zeros((16, 4))
  by_probe = jax.grad(lambda probe: losses(interior, probe).mean())((zeros, zeros))
  got = interior_gradient(learned.as_schedule, params, t, losses(interior), by_probe)
  want = jax.grad(lambda interior: (losses(interior) ** 2).mean())(interior)
  for name, leaf in want.items():
    np.testing.assert_allclose(got[name], leaf, rtol=1e-3, atol=1e-5 * np.abs(leaf).max())


@pytest.mark.parametrize('size', [0.0, 1.0, 30.0])
@pytest.mark.parametrize('per', ['channel', 'dimension'])
def test_falls_strictly_between_pinned_ends_whatever_the_optimizer_does(per, size):
  shape, t = (3, 2), jnp.linspace(0.0, 1.0, 257)
  log_snr, slope = log_snr_and_slope(path_of(random_params(5, shape, size, per), shape, per), t)
  assert log_snr.shape == (257, 3 if per == 'dimension' else 1, 2)
  assert np.all(np.diff(log_snr, axis=0) < 0)
  assert slope.max() < -0.005 * (MAX - MIN)
  np.testing.assert_allclose(log_snr[0], MAX)
  np.testing.assert_allclose(log_snr[-1], MIN, rtol=1e-5)
  zero = jax.tree.map(jnp.zeros_like, random_params(0, shape, 0.0, per)['path'])
  line = path_of(random_params(0, shape, 0.0, per) | {'path': zero}, shape, per)(t)
  np.testing.assert_allclose(line[:, 0, 0], net(t), atol=1e-4)


def test_end_points_are_arrays_and_their_levels_numbers():
  high, low = end_points(path_of(PARAMS['1']))
  assert high.shape == low.shape == (1, 4)
  np.testing.assert_allclose(end_levels(path_of(PARAMS['1'])), [MAX, MIN], rtol=1e-6)


def test_a_level_is_found_on_the_path_with_its_derivative():
  schedule, level = path_of(PARAMS['2']), jnp.linspace(-8.9, 8.9, 33)
  found, slope = jax.jvp(lambda a: on_path(schedule, a), (level,), (jnp.ones_like(level),))
  np.testing.assert_allclose(mean_over_dims(found), level, atol=1e-5)
  np.testing.assert_allclose(mean_over_dims(slope), 1.0, rtol=1e-4)
  t = jnp.linspace(0.05, 0.95, 9)
  np.testing.assert_allclose(on_path(schedule, mean_over_dims(schedule(t))), schedule(t), atol=1e-4)


@pytest.mark.parametrize('name', SAMPLERS)
def test_samples_have_the_covariance_of_the_data(name):
  """Of 10,000 it has an error of 1.4 %; those of first order take as many steps as that asks."""
  keys, steps = jax.random.split(jax.random.key(0), 10_000), {'ancestral': 600, 'ddim': 300}
  denoiser, grid = denoiser_of(jnp.float32(EXACT)), times(steps.get(name, 100))
  path, std = path_of(PARAMS['1']), np.sqrt(np.diag(EXACT))
  draw = lambda: sample(keys, SAMPLERS[name](), denoiser, grid, SHAPE, schedule=path)
  x = np.float64(jax.jit(draw)()) / std
  np.testing.assert_allclose(np.cov(x.T), EXACT / np.outer(std, std), atol=0.05)


def test_churn_leaves_the_path_and_is_refused():
  keys = jax.random.split(jax.random.key(0), 2)
  with pytest.raises(ValueError, match=r'^s_churn=3.0 must be 0 under a multivariate schedule'):
    sample(
      keys,
      heun(s_churn=3.0),
      denoiser_of(jnp.float32(EXACT)),
      times(4),
      SHAPE,
      schedule=path_of(PARAMS['1']),
    )


def test_the_flow_has_the_exact_density():
  schedule, z_0 = path_of(PARAMS['3']), jax.random.normal(jax.random.key(1), (5, 4))
  solution = ode.log_prob(
    denoiser_of(jnp.float32(EXACT)),
    z_0,
    *end_points(schedule),
    ode.exact_probes(5, SHAPE),
    rtol=1e-5,
    atol=1e-5,
    max_steps=500,
    schedule=schedule,
  )
  assert solution.finished.all()
  a2, s2 = 1 / (1 + np.exp(-MAX)), 1 / (1 + np.exp(MAX))
  covariance = a2 * EXACT + s2 * np.eye(4)
  square = np.einsum('bi,ij,bj->b', z_0, np.linalg.inv(covariance), z_0)
  want = -0.5 * (square + np.linalg.slogdet(2 * np.pi * covariance)[1])
  np.testing.assert_allclose(solution.log_prob, want, rtol=2e-3)


def test_truncated_noise_is_that_of_each_dimension():
  """With one level for all, arrays of it give what the number gives."""
  keys, u = jax.random.split(jax.random.key(0), 3), jnp.arange(12).reshape(3, 4)
  draw = lambda level: decoders.truncated_normal(keys, u, level, num_values=17)
  (y, log_q), (y_each, log_q_each) = draw(jnp.float32(6.0)), draw(jnp.full((1, 4), 6.0))
  np.testing.assert_allclose(y, y_each, rtol=1e-6)
  np.testing.assert_allclose(log_q, log_q_each, rtol=1e-6)


FIELDS = {
  'class': (dict(num_classes=3), {'label': jnp.array([0, 2, -1, 0])}),
  'vector': (dict(vector_size=2), {'vector': jnp.array([[1.0, 2], [3, -1], [np.nan] * 2, [1, 2]])}),
  'field': (dict(field_channels=2), {'field': jnp.array([0.5, 2, -1, 0.5]).reshape(4, 1, 1, 1)}),
}


@pytest.mark.parametrize('per', ['channel', 'dimension'])
@pytest.mark.parametrize('kind', FIELDS)
def test_a_conditional_schedule_is_each_examples_own(kind, per):
  """The first and the last example are told the same, all others something else."""
  sizes, told = FIELDS[kind]
  told = {k: v * jnp.ones((1, 2, 1, 2)) if k == 'field' else v for k, v in told.items()}
  none = dict(num_classes=0, vector_size=0, field_channels=0)
  learned = learned_conditional(MIN, MAX, (4, 4, 2), **(none | sizes), per=per)
  params = learned.init()
  t = jnp.full(4, 0.4)
  line = learned.as_schedule(params, told)(t)
  np.testing.assert_allclose(line, jnp.broadcast_to(net(0.4), line.shape), atol=1e-5)
  adds = jax.random.normal(jax.random.key(3), params['path']['adds'].shape)
  schedule = learned.as_schedule(params | {'path': params['path'] | {'adds': adds}}, told)
  log_snr, slope = log_snr_and_slope(schedule, t)
  assert np.shape(jnp.broadcast_to(log_snr, (4, 4, 4, 2))) == (4, 4, 4, 2)
  assert np.all(slope < 0)
  np.testing.assert_array_equal(log_snr[0], log_snr[3])
  apart = [np.abs(log_snr[i] - log_snr[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))]
  assert min(apart) > 0.05
  for end, want in zip(end_points(schedule), (MAX, MIN), strict=True):
    assert len(end) == 4
    np.testing.assert_allclose(end, want, rtol=1e-5)


def config_of(schedule, **model):
  """A perceptron for digits, small enough for seconds."""
  config = default.get_config('debug')
  with config.unlocked():
    config.schedule = ConfigDict(dict(log_snr_min=-5.0, log_snr_max=8.0) | schedule)
    config.model = ConfigDict(
      dict(
        name='mlp',
        output='eps',
        width=16,
        num_blocks=1,
        fourier_exponents=(),
        dropout=0.0,
        class_conditional=False,
        condition_on='live',
        dtype='float32',
      )
      | model
    )
    config.optimizer.schedule_rate = 10.0
  return config


MULTIVARIATE = config_of(dict(name='learned_multivariate'))
CONDITIONAL = config_of(dict(name='learned_conditional'), class_conditional=True)


@pytest.fixture(scope='module', params=['multivariate', 'conditional'])
def trained(request):
  """An experiment after four steps, and its state with a path far from the line."""
  exp = vdm.Experiment(MULTIVARIATE if request.param == 'multivariate' else CONDITIONAL)
  start = exp.init()
  *_, (state, _) = exp.fit(start, 4)
  before, after = (s.params['schedule'] for s in (start, state))
  moved = {
    f'{part}.{k}': float(jnp.abs(v - before[part][k]).max())
    for part in ('path', 'interior')
    for k, v in after[part].items()
    if k != 'reads'  # which waits for the layer above it
  }
  bent = dict(state.params['schedule']['path'])
  for number, name in enumerate(['a', *(['adds'] if 'adds' in bent else [])]):
    bent[name] += 0.5 * jax.random.normal(jax.random.key(number), bent[name].shape)
  params = state.params | {'schedule': state.params['schedule'] | {'path': bent}}
  return exp, state.replace(params=params), moved


def some_of(exp, count=4):
  batch = exp.source('eval').fetch(np.arange(count))
  told = {'label': batch['label']} if exp.model.conditional_schedule else {}
  return batch['image'], told


def test_the_bound_trains_the_path(trained):
  _, _, moved = trained
  assert min(moved.values()) > 1e-4


def test_a_model_is_evaluated_along_its_path(trained):
  """In one bound per example and in the mean over a split; and under other mean levels."""
  exp, state, _ = trained
  images, told = some_of(exp)
  given = {name: value[:2] for name, value in told.items()}
  one, two = (
    exp.log_prob(state, images[:n], draws=4, params='raw', **(given if n == 2 else told)).value
    for n in (4, 2)
  )
  np.testing.assert_allclose(one[:2], two, rtol=1e-4)
  own, fixed = (
    exp.bits_per_dim(state, 'raw', draws=8, schedule=dict(name=name))
    for name in ('schedule', 'linear')
  )
  assert abs(own.value - fixed.value) < 5 * (own.stderr + fixed.stderr)
  terms = {name: [r.terms[name]['value'] for r in (own, fixed)] for name in ('recon', 'prior')}
  for pair in terms.values():
    np.testing.assert_allclose(*pair, rtol=1e-3)


def test_the_ode_is_that_of_each_examples_path(trained):
  exp, state, _ = trained
  images, told = some_of(exp, 2)
  settings = dict(bound='ode', draws=1, params='raw', rtol=1e-2, atol=1e-2)
  both = exp.log_prob(state, images, **settings, **told).value
  first = exp.log_prob(state, images[:1], **settings, **{k: v[:1] for k, v in told.items()}).value
  np.testing.assert_allclose(both[:1], first, rtol=1e-3)


@pytest.mark.parametrize('grid', ['schedule', 'cosine'])
def test_samples_follow_the_path(trained, grid):
  """The denoiser is asked at each example's own log_snr, with the levels of the grid as means."""
  exp, state, _ = trained
  asked = []

  def spy(params, conditions=None, *args, **kwargs):
    denoise = model.denoiser(params, conditions, *args, **kwargs)

    def spied(z, log_snr):
      jax.debug.callback(lambda a: asked.append(np.asarray(a)), log_snr)
      return denoise(z, log_snr)

    return spied

  model = exp.model
  exp.model = model._replace(denoiser=spy)
  try:
    images = exp.sample(state, 8, vdm.samplers.ddim(), params='raw', grid=dict(name=grid))
    jax.effects_barrier()
  finally:
    exp.model = model
  assert images.shape == (8, 8, 8, 1)
  first = max(asked, key=lambda a: -a.mean())
  second = sorted(asked, key=lambda a: a.mean())[len(asked) // 2]
  np.testing.assert_allclose(first, -5.0, atol=0.01)
  assert second.shape[1:] == (8, 8, 1) and second.std() > 0.1
  if grid == 'cosine':
    np.testing.assert_allclose(np.ptp(second.mean(axis=(1, 2, 3))), 0, atol=1e-3)


def test_the_codec_gives_the_images_back(trained):
  exp, state, _ = trained
  images, told = some_of(exp, 3)
  settings = codec.Settings(6, group_size=2)
  blob = codec.compress(exp.model, state.params, images, settings, **told)
  back = codec.decompress(exp.model, state.params, blob, **told)
  np.testing.assert_array_equal(back, images)
  given = dict.fromkeys(('label', 'vector', 'condition', 'mask')) | told
  levels = share(exp.model, state.params, settings, 3, given).group(0).grid.log_snr
  own = exp.schedule(state, 'raw', **{k: v[:2] for k, v in told.items()})
  for number, t in enumerate(np.linspace(0, 1, 7, dtype=np.float32)):
    want = np.broadcast_to(own(jnp.full(2, t)), (2, 8, 8, 1))
    np.testing.assert_allclose(np.broadcast_to(levels[number], want.shape), want, atol=1e-4)


def test_every_likelihood_and_the_loss_take_the_path_of_the_label():
  """A denoiser that knows of no label has other values under another one: those of its path."""
  exp = vdm.Experiment(CONDITIONAL)
  params = exp.init().params
  path = params['schedule']['path']
  adds = jax.random.normal(jax.random.key(0), path['adds'].shape)
  params = params | {'schedule': params['schedule'] | {'path': path | {'adds': adds}}}

  def denoise(z, log_snr):
    eps = jnp.broadcast_to(z.mean(axis=(1, 2, 3), keepdims=True), z.shape)
    return Prediction((z - sigma(log_snr) * eps) / alpha(log_snr), eps)

  model = exp.model._replace(denoiser=lambda *_, **__: denoise)
  leaves = exp.config.eval.ode.to_dict() | dict(rtol=1e-3, atol=1e-3)
  solver = ode_bound.OdeSettings(**leaves)
  index = jnp.arange(8)
  image = jnp.asarray(exp.source('eval').fetch(np.arange(8))['image'])

  def values(label):
    batch = dict(image=image, index=index, mask=jnp.ones(8), label=jnp.full(8, label))
    key, probe = jax.random.key(0), (jnp.zeros(8), jnp.zeros(8))
    of_step = loss(recipe(exp.config, model), params, probe, {}, batch, key, key)[0]
    yield bound.make_eval_step(model, exp.config.eval)(params, batch, 8, 0)['terms'].sum()
    yield likelihood.jit_step(model, exp.mesh, 2)(params, batch, 0)['terms'].sum()
    yield ode_bound.make_step(model, solver)(params, batch, 0)['value'].sum()
    yield of_step

  for name, (one, same, other) in zip(
    ('bound', 'likelihood', 'ode', 'loss'), zip(*map(values, (1, 1, 2)), strict=True), strict=True
  ):
    assert one == same and abs(one - other) > 1e-3 * abs(one), name


def test_a_conditional_model_has_a_schedule_for_each_class():
  exp = vdm.Experiment(CONDITIONAL)
  state = exp.init()
  path = state.params['schedule']['path']
  adds = jax.random.normal(jax.random.key(0), path['adds'].shape)
  params = state.params | {'schedule': state.params['schedule'] | {'path': path | {'adds': adds}}}
  state = state.replace(params=params)
  t = jnp.full(3, 0.5)
  log_snr = exp.schedule(state, 'raw', label=np.array([1, 4, 1]))(t)
  assert log_snr.shape == (3, 8, 8, 1)
  np.testing.assert_array_equal(log_snr[0], log_snr[2])
  assert np.abs(log_snr[0] - log_snr[1]).max() > 0.1


def test_the_network_is_told_the_level_of_each_position():
  """A U-Net, which does not know where it is, reads it in a channel of its own."""
  config = default.get_config('debug')
  with config.unlocked():
    config.schedule.name = 'learned_multivariate'
  shapes = [
    jax.eval_shape(build.model(c).init, jax.random.key(0))['network']['conv_in']['kernel'].shape
    for c in (default.get_config('debug'), config)
  ]
  assert shapes[1][2] == shapes[0][2] + 1


@pytest.mark.parametrize(
  ('schedule', 'model', 'message'),
  [
    (dict(name='learned_multivariate', per='pixel'), {}, "config.schedule.per='pixel' must be"),
    (
      dict(name='learned_multivariate', per='channel'),
      {},
      "config.schedule.per='channel' must be one of several",
    ),
    (dict(name='learned_multivariate', shape=(8, 8, 1)), {}, 'config.schedule.shape=.* left out'),
    (dict(name='learned_multivariate', degree=5), {}, 'does not take degree'),
    (
      dict(name='learned_conditional'),
      {},
      "config.schedule.name='learned_conditional' must be of a",
    ),
    (
      dict(name='learned_conditional', width=0),
      dict(class_conditional=True),
      'config.schedule.width=0 must be 1 or more',
    ),
  ],
)
def test_what_cannot_be_is_refused_by_its_field(schedule, model, message):
  with pytest.raises(ValueError, match=message):
    build.model(config_of(schedule, **model))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'sample.sampler.name': 'heun', 'sample.sampler.s_churn': 5.0},
      'config.sample.sampler.s_churn=5.0 must be 0 under a multivariate schedule',
    ),
    ({'sample.grid.name': 'learned_multivariate'}, 'config.sample.grid.name'),
    ({'weighting.name': 'sigmoid'}, "config.weighting.name='sigmoid' must be 'elbo'"),
  ],
)
def test_what_does_not_go_with_a_path_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    vdm.Experiment(MULTIVARIATE, change)
