"""Where the time of a GPU's program goes, by class of kernel, from a trace of the profiler."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

# The first that is found in a kernel's name decides.
CLASSES = {
  'attention': r'flash|fmha|sdpa|mha_',
  'convolutions': r'conv|fprop|dgrad|wgrad|implicit|cudnn.*(nhwc|nchw)|winograd',
  'matrix products': r'gemm|nvjet|cublas|dot|splitk|matmul',
  'copies': r'memcpy|memset|copy|transpose',
  'reductions': r'reduce',
  'random bits': r'rng|threefry|random',
  'other fusions': r'fusion|wrapped|loop|triton',
}


def by_class(run: Callable[[], Any], steps: int) -> dict[str, Any]:
  """Milliseconds per step of each class of kernel, over `steps` calls of `run`.

  Returns:
    {'ms': class -> milliseconds per step, 'longest': the ten longest kernels by name}; both are
    empty on a CPU, whose trace has no kernels.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        out = run()
      jax.block_until_ready(out)
    totals = collections.Counter()
    for path in pathlib.Path(folder).rglob('*.xplane.pb'):
      for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if plane.name.startswith('/device:GPU'):
          for line in plane.lines:
            if line.name.startswith('Stream'):
              for event in line.events:
                totals[event.name] += event.duration_ns / 1e6 / steps
  classes = collections.Counter()
  for name, ms in totals.items():
    classes[class_of(name)] += ms
  return {'ms': dict(classes.most_common()), 'longest': dict(totals.most_common(10))}


def class_of(kernel: str) -> str:
  """The class of a kernel by its name; 'rest' where no pattern is found."""
  found = (name for name, pattern in CLASSES.items() if re.search(pattern, kernel.lower()))
  return next(found, 'rest')
