"""Inception's resize, its names and its weights; the classifier."""

import jax
import numpy as np
import pytest
from vdm.configs import default

from vdm import fid
from vdm.fid import inception, weights
from vdm.system import parallel


def test_resize_is_tensorflows_of_old():
  import tensorflow as tf

  for height, width in ((32, 32), (40, 56), (299, 299), (600, 301)):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    want = tf.raw_ops.ResizeBilinear(
      images=images, size=(299, 299), align_corners=False, half_pixel_centers=False
    )
    np.testing.assert_allclose(jax.jit(inception.resize)(images), want, atol=1e-4)
  assert float(inception.prepare(np.full((1, 8, 8, 3), 255, np.uint8)).max()) == 127 / 128


@pytest.fixture(scope='module')
def params():
  random = np.random.default_rng(0)
  return {k: np.float32(random.normal(0, 0.1, shape)) for k, shape in weights.shapes().items()}


def test_params_are_nested_as_the_network_has_them(params):
  assert len(inception.conv_names()) == 94
  x = jax.ShapeDtypeStruct((2, 299, 299, 3), np.float32)
  tree = {'params': weights.nested(params)}
  out = jax.eval_shape(inception.Inception().apply, tree, x)
  shapes = {name: leaf.shape for name, leaf in out.items()}
  assert shapes == {'features': (2, 2048), 'spatial': (2, 2023), 'logits': (2, 1008)}


@pytest.mark.parametrize('gamma_counts', [True, False])
def test_a_frozen_graph_converts(gamma_counts, params, tmp_path):
  """A graph of constants with the published one's names; the normalisation is folded in float64."""
  import tensorflow as tf

  graph = tf.compat.v1.GraphDef()

  def constant(name, value):
    node = graph.node.add(name=name, op='Const')
    node.attr['value'].tensor.CopyFrom(tf.make_tensor_proto(np.float32(value)))

  for conv in inception.conv_names():
    constant(f'{conv}/conv2d_params', params[f'{conv}/kernel'])
    size = len(params[f'{conv}/scale'])
    for number, part in enumerate(('gamma', 'beta', 'moving_mean', 'moving_variance')):
      constant(f'{conv}/batchnorm/{part}', np.full(size, number + 2))
    norm = graph.node.add(name=f'{conv}/batchnorm', op='BatchNormWithGlobalNormalization')
    norm.attr['scale_after_normalization'].b = gamma_counts
  constant('softmax/weights', params['softmax'])
  path = tmp_path / 'graph.pb'
  path.write_bytes(graph.SerializeToString())
  with pytest.raises(ValueError, match=r'has sha256 .* cut short, or another file.*allow_unknown'):
    weights.convert(str(path), str(tmp_path / 'out.npz'))
  weights.convert(str(path), str(tmp_path / 'out.npz'), allow_unknown=True)
  got, facts = weights.inception(str(tmp_path / 'out.npz'))
  assert facts['name'] == f'inception-{facts["sha256"][:8]}' and facts['source'] == 'graph.pb'
  scale = (2 if gamma_counts else 1) / np.sqrt(5 + 1e-3)
  for conv in inception.conv_names():
    np.testing.assert_array_equal(got[f'{conv}/kernel'], params[f'{conv}/kernel'])
    np.testing.assert_allclose(got[f'{conv}/scale'], scale, rtol=1e-7)
    np.testing.assert_allclose(got[f'{conv}/bias'], 3 - 4 * scale, rtol=1e-6)
  np.testing.assert_array_equal(got['softmax'], params['softmax'])


def make(config, *more):
  return fid.make(config.fid, config.data, *more)


def settings(**leaves):
  config = default.get_config()
  config.data.num_values = 256
  config.fid.update(features='inception', **leaves)
  return config


def test_wrong_weights_are_refused_in_one_line(params, tmp_path):
  mesh, shape = parallel.make_mesh(), (32, 32, 3)
  path = tmp_path / 'inception.npz'
  with pytest.raises(ValueError, match=r'needs its weights in .*; fetch .* vdm.fid convert FILE'):
    make(settings(weights=str(path)), mesh, shape)
  weights.write(path, params, {'name': 'inception-test'})
  with pytest.raises(ValueError, match=r'given RGB images, not 1 channel.*replicate_grey=True'):
    make(settings(weights=str(path)), mesh, (28, 28, 1))
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=r'cannot be read \(.*; fetch'):
    make(settings(weights=str(path)), mesh, shape)
  wrong = params | {'mixed/conv/kernel': params['mixed/conv/kernel'][..., 1:]}
  weights.write(path, wrong, {'name': 'inception-test'})
  with pytest.raises(ValueError, match='has no mixed/conv/kernel of Inception'):
    make(settings(weights=str(path)), mesh, shape)
  config = settings()
  config.fid.features = 'nowhere.network'
  with pytest.raises(ValueError, match=r"'nowhere.network' must be 'inception', 'classifier' or"):
    fid.make(config.fid, config.data, mesh)
  with pytest.raises(ValueError, match=r'missing.pth is no file; fetch'):
    weights.convert(str(tmp_path / 'missing.pth'), '')
  (tmp_path / 'cut.pb').write_bytes(b'nonsense')
  with pytest.raises(ValueError, match='is no frozen TensorFlow graph'):
    weights.convert(str(tmp_path / 'cut.pb'), '', allow_unknown=True)


def test_the_classifier_is_trained_once_and_told_apart(
  tmp_path, monkeypatch, rank_promotion_allowed
):
  monkeypatch.setitem(fid.classifier.RECIPE, 'num_steps', 150)
  config = default.get_config()
  config.fid.weights = str(tmp_path / 'classifier.npz')
  mesh = parallel.make_mesh()
  first = fid.make(config.fid, config.data, mesh)
  params, facts = weights.read(tmp_path / 'classifier.npz', '')
  assert facts['train_accuracy'] > 0.9
  assert first.name == f'classifier-{first.sha256[:16]}' and first.sha256 == facts['sha256']
  assert first(np.zeros((3, 8, 8, 1), np.uint8))['features'].shape == (
    3,
    fid.classifier.NUM_FEATURES,
  )
  monkeypatch.setattr(fid.classifier, '_train', None)  # not again
  assert fid.make(config.fid, config.data, mesh).name == first.name
  config.data.num_classes = 0
  with pytest.raises(
    ValueError, match=r"config.fid.features='classifier' must be trained on labels"
  ):
    fid.make(config.fid, config.data, mesh)
  config.data.num_classes = 10
  monkeypatch.setitem(fid.classifier.RECIPE, 'num_steps', 151)
  with pytest.raises(ValueError, match='is a classifier of other data or recipe; remove it'):
    fid.make(config.fid, config.data, mesh)
  weights.write(tmp_path / 'classifier.npz', params, facts)
