"""Our network, schedules and loss beside the public code's, google-research/vdm.

public_vdm.npz holds what that code, at commit dc27b98, made of random parameters in float64 (in
float32 its own eps_hat is up to 2e-5 of the largest away, its terms 1e-5), and in float32 its bits
per dimension of 16 images over 1,600 draws: for each case the paths and shapes of the parameters,
and the outputs. Parameters and inputs are too large to keep; `public_params` and `inputs` make them
from a seed by the rule by which they were made then.
"""

import functools
import itertools
import json
import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import checkpoint as clu_checkpoint
from vdm.configs import cifar10

from vdm import build
from vdm.diffusion.elbo import variational_bound
from vdm.diffusion.gaussian import log_snr_and_slope, q_sample
from vdm.evaluation.bound import make_evaluator
from vdm.workdir import import_public
from vdm.workdir.load import read_run

PUBLIC = np.load(pathlib.Path(__file__).parent / 'public_vdm.npz')
SEEDS = {'scalar': 1, 'net': 2, 'attention': 3}
GAMMA = {  # mean and standard deviation
  'gamma/w': (16.3, 1.0),
  'gamma/b': (-12.3, 0.3),
  'gamma/l1/kernel': (8.0, 0.1),
  'gamma/l1/bias': (-8.0, 0.1),
  'gamma/l2/kernel': (0.0, 5.0),
  'gamma/l2/bias': (0.0, 3.0),
  'gamma/l3/kernel': (0.0, 10.0),
}


@pytest.fixture(autouse=True)
def _libraries(rank_promotion_allowed):
  pass


def public_params(case, seed, width=128):
  """Standard normal draws, leaf after leaf in the order of the sorted paths, then scaled."""
  draws, leaves = np.random.RandomState(seed), {}
  of_width = {129: width + 1} | {128 * n: width * n for n in (1, 2, 4)}
  for path, shape in zip(PUBLIC[f'{case}/names'], PUBLIC[f'{case}/shapes'], strict=True):
    shape = [int(n) for n in shape.split(',')]
    a = draws.standard_normal([of_width.get(n, n) for n in shape])
    if path in GAMMA:
      a = GAMMA[path][0] + GAMMA[path][1] * a
    elif path.endswith('scale'):
      a = 1 + 0.1 * a
    elif path.endswith('bias'):
      a = 0.1 * a
    else:
      a = a / np.sqrt(np.prod(a.shape[:-1]))
    leaves[str(path)] = a.astype(np.float32)
  return flax.traverse_util.unflatten_dict(leaves, sep='/')


def inputs(seed):
  """Images, and the noise of the reconstruction and of the diffusion term."""
  draws = np.random.RandomState(100 + seed)
  images = draws.randint(0, 256, (2, 32, 32, 3))
  noise = (draws.standard_normal(images.shape) for _ in range(2))
  return jnp.asarray(images, jnp.int32), *(jnp.asarray(a, jnp.float32) for a in noise)


def config_of(case, width=128):
  config = cifar10.get_config()
  with config.unlocked():
    config.model.update(width=width, norm_groups=import_public.norm_groups(width))
    config.model.update(num_blocks=1, augmentation_flag=True, condition_on='configured')
    config.model.attention = case == 'attention'
    config.schedule.name = 'learned_net' if case == 'net' else 'learned_endpoints'
  return config


def to_ours(config, model, public):
  params = jax.eval_shape(model.init, jax.random.key(0))
  return import_public.convert(public, params, config.model, config.schedule.name)


def convert(case, params, width=128):
  config = config_of(case, width)
  model = build.model(config)
  return model, to_ours(config, model, params)


def public_network(p, z, t):
  """eps_hat of the public network, of 32 groups at any width, written out leaf by leaf."""
  product = functools.partial(jnp.einsum, precision='highest')

  def dense(p, x):
    return product('...i,io->...o', x, p['kernel']) + p.get('bias', jnp.zeros(()))

  def conv(p, x):
    height, width = x.shape[1:3]
    x, total = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), p['bias']
    for i, j in itertools.product(range(3), repeat=2):
      total = total + product(
        'bhwi,io->bhwo', x[:, i : i + height, j : j + width], p['kernel'][i, j]
      )
    return total

  def norm(p, x):
    groups = x.reshape(*x.shape[:3], 32, -1)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    variance = (centred**2).mean((1, 2, 4), keepdims=True)
    return (centred / jnp.sqrt(variance + 1e-6)).reshape(x.shape) * p['scale'] + p['bias']

  def block(p, x):
    h = conv(p['conv1'], jax.nn.swish(norm(p['GroupNorm_0'], x)))
    h += dense(p['cond_proj'], cond)[:, None, None]
    h = conv(p['conv2'], jax.nn.swish(norm(p['GroupNorm_1'], h)))
    return h + (dense(p['nin_shortcut'], x) if 'nin_shortcut' in p else x)

  def attention(p, x):
    h = norm(p['GroupNorm_0'], x).reshape(len(x), -1, x.shape[-1])
    q, k, v = (dense(p[name], h) for name in 'qkv')
    weights = jax.nn.softmax(product('bqc,bkc->bqk', q, k) / np.sqrt(x.shape[-1]))
    return x + dense(p['proj_out'], product('bqk,bkc->bqc', weights, v)).reshape(x.shape)

  half = (p['dense0']['kernel'].shape[0] - 1) // 2
  angles = 1000 * t[:, None] * jnp.exp(-np.log(10_000) / (half - 1) * jnp.arange(half))
  cond = jnp.concatenate([jnp.sin(angles), jnp.cos(angles), jnp.zeros((len(t), 1))], axis=-1)
  cond = jax.nn.swish(dense(p['dense1'], jax.nn.swish(dense(p['dense0'], cond))))
  scaled = jnp.stack([z * 2.0**n for n in (6, 7)], axis=-1).reshape(*z.shape[:3], -1)
  angles = 2 * np.pi * (scaled - jnp.round(scaled))
  first = conv(p['conv_in'], jnp.concatenate([z, jnp.sin(angles), jnp.cos(angles)], axis=-1))
  h = second = block(p['down.block_0'], first)
  h = block(p['mid.block_2'], attention(p['mid.attn_1'], block(p['mid.block_1'], h)))
  h = block(p['up.block_0'], jnp.concatenate([h, second], axis=-1))
  h = block(p['up.block_1'], jnp.concatenate([h, first], axis=-1))
  return z + conv(p['conv_out'], jax.nn.swish(norm(p['GroupNorm_0'], h)))


@pytest.mark.parametrize('width', [32, 64, 128])
def test_network_and_gradient_are_those_of_32_groups_at_any_width(width):
  public = public_params('scalar', 1, width)
  model, params = convert('scalar', public, width)
  draws = np.random.RandomState(7)
  z, weights = (jnp.asarray(draws.standard_normal((2, 8, 8, 3)), jnp.float32) for _ in range(2))
  t, ends = jnp.array([0.3, 0.8]), cifar10.get_config().schedule
  log_snr = ends.log_snr_max + t * (ends.log_snr_min - ends.log_snr_max)

  @functools.partial(jax.jit, static_argnums=0)
  def of(network, params):
    said, pullback = jax.vjp(network, params, z)
    return said, *pullback(weights)

  want, *slopes = of(lambda p, z: public_network(p, z, t), public['score_model'])
  ours = lambda p, z: model.denoiser(params | {'network': p})(z, log_snr).eps
  eps_hat, gradient, slope_in_z = of(ours, params['network'])
  assert np.abs(want - z).max() > 1
  np.testing.assert_allclose(eps_hat, want, atol=1e-5 * np.abs(want).max(), rtol=0)
  np.testing.assert_allclose(slope_in_z, slopes[1], atol=1e-5 * np.abs(slopes[1]).max(), rtol=0)
  _, wanted = convert('scalar', {'score_model': slopes[0], 'gamma': public['gamma']}, width)
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted['network']))
  for (path, leaf), want in zip(
    jax.tree.leaves_with_path(gradient), jax.tree.leaves(wanted['network']), strict=True
  ):
    np.testing.assert_allclose(leaf, want, atol=1e-5 * largest, rtol=1e-4, err_msg=str(path))


def test_the_written_out_network_is_that_of_the_public_code():
  public = public_params('scalar', 1)
  model, params = convert('scalar', public)
  images, _, eps = inputs(1)
  t = (jnp.float32(0.3) + jnp.arange(2) / 2) % 1
  log_snr = model.schedule(params)(t)
  x = jnp.float32(2 * (images + 0.5) / 256 - 1)
  z = q_sample(x, eps, log_snr)
  ends = cifar10.get_config().schedule
  seen = (ends.log_snr_max - log_snr) / (ends.log_snr_max - ends.log_snr_min)
  said = jax.jit(public_network)(public['score_model'], z, seen)
  want = PUBLIC['scalar/eps_hat']
  np.testing.assert_allclose(said, want, atol=1e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize('case', SEEDS)
def test_network_and_bound_are_those_of_the_public_code(case):
  model, params = convert(case, public_params(case, SEEDS[case]))
  images, eps_recon, eps = inputs(SEEDS[case])

  @jax.jit
  def bound_and_eps_hat(params):
    denoiser, seen = model.denoiser(params), []

    def recording(z, log_snr):
      seen.append((z, denoiser(z, log_snr)))
      return seen[-1][1]

    t = (jnp.float32(0.3) + jnp.arange(2) / 2) % 1
    schedule = model.schedule(params)
    bound = variational_bound(
      recording, schedule, model.decoder, model.weighting, images, t, eps_recon, eps
    )
    return bound, seen[0][0], seen[0][1].eps

  bound, z, eps_hat = bound_and_eps_hat(params)
  want = PUBLIC[f'{case}/eps_hat']
  assert np.abs(want - z).max() > 1  # the network does say something
  np.testing.assert_allclose(eps_hat, want, atol=1e-4 * np.abs(want).max(), rtol=0)
  for name, term in (('recon', bound.recon), ('klz', bound.prior), ('diff', bound.diffusion.elbo)):
    np.testing.assert_allclose(term, PUBLIC[f'{case}/{name}'], rtol=1e-5)


@pytest.mark.parametrize('case', ['scalar', 'net'])
def test_schedule_and_its_slope_are_those_of_the_public_code(case):
  model, params = convert(case, public_params(case, SEEDS[case]))
  t = jnp.asarray(np.linspace(0, 1, 17), jnp.float32)
  log_snr, slope = jax.jit(lambda p: log_snr_and_slope(model.schedule(p), t))(params)
  np.testing.assert_allclose(log_snr, -PUBLIC[f'{case}/gamma'], rtol=1e-7, atol=3e-6)
  np.testing.assert_allclose(slope, -PUBLIC[f'{case}/slope'], rtol=1e-6)


def test_a_public_net_without_curvature_is_a_line():
  """Kernels of zero, which no softplus reaches."""
  public = public_params('net', 2)
  for layer in ('l2', 'l3'):
    public['gamma'][layer]['kernel'] *= 0
  model, params = convert('net', public)
  w, b = (public['gamma']['l1'][name].item() for name in ('kernel', 'bias'))
  t = jnp.linspace(0.0, 1.0, 9)
  log_snr = jax.jit(lambda t: model.schedule(params)(t))(t)
  np.testing.assert_allclose(log_snr, -(b + w * t), atol=1e-5)


def save(directory, params, ema_params, step):
  """As the public code saves its state; returns what was saved."""
  optimizer = optax.adamw(1.0, mask=lambda params: jax.tree.map(lambda _: True, params))
  opt_state = flax.serialization.to_state_dict(optimizer.init(params))
  state = dict(step=np.int32(step), params=params, ema_params=ema_params, opt_state=opt_state)
  clu_checkpoint.MultihostCheckpoint(str(directory)).save(state)
  return state


def names(tree):
  return sorted(flax.traverse_util.flatten_dict(tree, sep='/', keep_empty_nodes=True))


@pytest.mark.slow
def test_an_imported_run_has_the_bits_per_dim_that_the_public_code_says(tmp_path):
  """The averaged parameters of the newest checkpoint, through a workdir, on 16 images."""
  config = config_of('scalar')
  with config.unlocked():
    config.data.image_shape = (8, 8, 3)
    config.eval.update(batch_size=16, draws=32)
  ema_params = public_params('scalar', 4)
  save(tmp_path / 'public', ema_params, ema_params, 6)
  state = save(tmp_path / 'public', public_params('scalar', 5), ema_params, 7)
  assert names(state) == list(PUBLIC['saved/names'])

  workdir = tmp_path / 'run'
  assert import_public.run(config, workdir, str(tmp_path / 'public-0')) == 0
  with pytest.raises(ValueError, match=r'--workdir=.* holds a run; choose another'):
    import_public.run(config, workdir, str(tmp_path / 'public-0'))

  _, model, mesh, state, _ = read_run(config, workdir)
  assert int(state.step) == 7
  kernel = public_params('scalar', 5)['score_model']['conv_out']['kernel']
  np.testing.assert_array_equal(state.params['network']['conv_out']['kernel'], kernel)
  moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
  assert moments and not any(np.asarray(a).any() for a in moments)

  images = np.random.RandomState(104).randint(0, 256, (16, 8, 8, 3)).astype(np.uint8)
  batch = {
    'image': images,
    'label': np.zeros(16, np.int32),
    'index': np.arange(16, dtype=np.int32),
    'mask': np.ones(16, np.float32),
  }
  result = make_evaluator(model, mesh, config.eval)(state.averages['ema'], [batch], 16)
  error = np.hypot(result.stderr, PUBLIC['bpd/stderr'])
  assert error < 0.01 * result.value
  assert abs(result.value - PUBLIC['bpd/mean']) < 4 * error
  prior, recon = (result.terms[name]['value'] for name in ('prior', 'recon'))
  np.testing.assert_allclose(prior, PUBLIC['bpd/terms'][1], rtol=1e-4)
  np.testing.assert_allclose(recon, PUBLIC['bpd/terms'][0], rtol=0.03)


@pytest.mark.slow
def test_an_import_of_a_narrow_network_sets_its_groups(tmp_path):
  public = public_params('scalar', 1, 32)
  save(tmp_path / 'public', public, public, 3)
  config = config_of('scalar', 32)
  config.model.norm_groups = 0
  assert import_public.run(config, tmp_path / 'run', str(tmp_path / 'public-0')) == 0
  assert json.loads((tmp_path / 'run/config.json').read_text())['model']['norm_groups'] == 32
  config.model.norm_groups = 0
  with pytest.raises(ValueError, match=r'norm_groups=0 must be 32 .*; give --config.model.norm_gr'):
    to_ours(config, build.model(config), public)


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
  for number in (2, 9, 10, 11):
    (tmp_path / f'ckpt-{number}.flax').touch()
    if number < 11:  # clu's last file: 11 was cut short
      (tmp_path / f'ckpt-{number}.index').touch()
  assert import_public.newest(str(tmp_path)).name == 'ckpt-10.flax'
  for named in ('ckpt-2', 'ckpt-2.flax'):
    assert import_public.newest(f'{tmp_path}/{named}').name == 'ckpt-2.flax'
  for nothing in ('', f'{tmp_path}/ckpt-3', '/nowhere'):
    with pytest.raises(ValueError, match=f'--checkpoint={nothing} holds no ckpt-<number>.flax'):
      import_public.newest(nothing)


def test_a_file_cut_short_is_refused(tmp_path):
  whole = flax.serialization.msgpack_serialize({'step': 1, 'params': {}, 'ema_params': {}})
  path = import_public.epath.Path(tmp_path / 'ckpt-1.flax')
  path.write_bytes(whole)
  assert import_public.read(path)['step'] == 1
  for cut in (whole[:-1], flax.serialization.msgpack_serialize({'step': 1}), b''):
    path.write_bytes(cut)
    with pytest.raises(
      ValueError, match=f'--checkpoint={path} cannot be read .*; give a whole one'
    ):
      import_public.read(path)


def change(path, leaf):
  def apply(public):
    *block, name = path.split('/')
    for key in block:
      public = public[key]
    if leaf is None:
      del public[name]
    else:
      public[name] = leaf

  return apply


DAMAGES = {
  'missing': ('score_model/dense1/bias', None, 'nothing for network/conditioning/dense_1/bias'),
  'left over': ('score_model/more', np.ones(2, np.float32), r'score_model/more, \(2,\), for which'),
  'of another shape': (
    'score_model/mid.attn_1/q/bias',
    np.ones(5, np.float32),
    r'mid.attn_1/q/bias, \(5,\), where this config has \(128,\)',
  ),
  'not finite': ('gamma/w', np.float32([np.nan]), 'schedule/slope, .* not finite'),
  'no schedule': ('gamma/b', None, 'of gamma it holds gamma/w'),
  'no network': ('score_model/conv_in/kernel', None, 'must hold score_model/conv_in'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_every_leaf_must_fit_and_is_named(damage):
  path, leaf, message = DAMAGES[damage]
  public = public_params('scalar', 1)
  change(path, leaf)(public)
  with pytest.raises(ValueError, match=message) as error:
    convert('scalar', public)
  assert '\n' not in str(error.value)


def test_a_config_of_another_model_is_told_what_to_set():
  public = public_params('attention', 3)
  config = cifar10.get_config()
  config.model.fourier_exponents = (5, 6)
  config.schedule.name = 'learned_net'
  with pytest.raises(ValueError) as error:
    to_ours(config, build.model(config), public)
  for field, value in (
    ('model.num_blocks', '1'),
    ('model.attention', 'True'),
    ('model.fourier_exponents', '(6,7)'),
    ('model.augmentation_flag', 'True'),
    ('model.condition_on', 'configured'),
    ('schedule.name', 'learned_endpoints'),
  ):
    assert f' --config.{field}={value}' in str(error.value)
  assert str(error.value).count('--config.') == 6
  assert "config.model.condition_on='live' must be 'configured'" in str(error.value)
