"""Eight CPU devices, jaxtyping checked, rank promotion an error."""

import collections
import os
import pathlib
import tempfile

os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # as the commands have it (vdm.system.hosts): eight devices on few cores wait for each other
    '--xla_cpu_collective_call_terminate_timeout_seconds=600',
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
    # what a test runs is small: to compile it as for a run takes two to three times as long
    '--xla_backend_optimization_level=1',
  ]
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# Nothing is kept in, or found in, the cache of whoever runs the tests.
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp()

from jaxtyping import install_import_hook

MATHS = pathlib.Path(__file__).parents[1] / 'vdm' / 'diffusion'
# averages are plain numbers on the host
STEMS = {path.stem for path in MATHS.glob('[a-z]*.py')} - {'averages'}
NAMES = [f'vdm.diffusion.{stem}' for stem in sorted(STEMS)]
install_import_hook([*NAMES, 'vdm.fid.metrics', 'vdm.fid.statistics'], 'beartype.beartype')

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Many tests compile the same small programs, in this process and in pytest-xdist's others.
CACHE = os.path.join(tempfile.gettempdir(), f'vdm_tests_{jax.__version__}_{os.getuid()}')
jax.config.update('jax_compilation_cache_dir', CACHE)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


# Files whose tests compile much and run little: less is optimised than even the flag above says.
COMPILING = (
  'adm_unet axes blocks conditions configs evaluate experiment multivariate nn parallel reading '
  'second_order train'
).split()
assert all(pathlib.Path(__file__).with_name(f'test_{name}.py').exists() for name in COMPILING)


@pytest.fixture(autouse=True, scope='module')
def _little_optimized(request):
  jax.config.update('jax_disable_most_optimizations', request.path.stem[5:] in COMPILING)


def pytest_collection_modifyitems(items):
  """Takes the files with the most slow tests first: no worker is to end alone."""
  slow = collections.Counter(item.path for item in items if item.get_closest_marker('slow'))
  items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture
def rank_promotion_allowed():
  """For code of libraries (flax, optax) that broadcasts."""
  jax.config.update('jax_numpy_rank_promotion', 'allow')
  yield
  jax.config.update('jax_numpy_rank_promotion', 'raise')
