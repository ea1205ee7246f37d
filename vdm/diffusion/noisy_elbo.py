"""A weighted loss bounds the likelihood of data with Gaussian noise added (VDM++ section 3).

Let L(log_snr) be the unweighted loss from log_snr down to the noisy end, prior term included: the
KL(q(z_t..1 | x) || p(z_t..1)) of all that happens after the time t of log_snr. It grows by
dL/dlog_snr = h / 2, h = E |eps_hat - eps|^2, and integration by parts turns any weighted loss into

  1/2 int w h dlog_snr = w(max) L(max) - w(min) L(min) + int (-w') L dlog_snr   (VDM++ theorem 1).

Where w falls (`weightings.is_monotone`), w(max) and -w' are the weights of a mixture: of the data
as it is at log_snr_max, and of the data with noise at every level below. Divided by w(min) they are
a probability, and the loss is, up to a constant, the mean bound of data augmented with that noise.
Where w rises the weights are negative: the equation holds still, the reading does not.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vdm.diffusion.weightings import Weighting

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)  # on [-1, 1], the weights sum to two


class Augmented(NamedTuple):
  """Holds a weighted loss as a mixture of unweighted ones, in nats; n bins have n + 1 edges.

  Here weighted = atom losses[-1] - total losses[0] + parts.sum(), and total = atom + mass.sum().
  """

  losses: Float[Array, ' edges']  # L at each edge
  mass: Float[Array, ' bins']  # int -w' dlog_snr over each bin: the weight of its noise levels
  parts: Float[Array, ' bins']  # int -w' L dlog_snr over each bin
  atom: Float[Array, '']  # w(log_snr_max), the weight of the data with the least noise
  total: Float[Array, '']  # w(log_snr_min), all weight there is
  weighted: Float[Array, '']  # 1/2 int w h dlog_snr, not by parts


def augmented(
  weighting: Weighting,
  edges: Float[Array, ' edges'],
  h: Float[Array, ' bins'],
  loss_min: float = 0.0,
) -> Augmented:
  """Returns the mixture of unweighted losses that a weighting means, from a measured table of h.

  It is exact for h constant in each bin and any w (16 Gauss-Legendre nodes per bin integrate it;
  let the kink of a weighting be an edge).

  Args:
    weighting: log_snr -> w.
    edges: of the bins of log_snr, rising, [n + 1].
    h: mean of |eps_hat - eps|^2, summed over dimensions, in each bin, [n].
    loss_min: L at the first edge, the prior term, which the weighting multiplies but `weighted`
      leaves out.
  """
  width, w = jnp.diff(edges), weighting(edges)
  low = loss_min + jnp.concatenate([jnp.zeros(1), jnp.cumsum(h * width / 2)])
  grid = edges[:-1, None] + width[:, None] * ((NODES + 1) / 2).astype(edges.dtype)[None]
  values = weighting(grid.ravel()).reshape(grid.shape)
  area = width * (values @ (NODE_WEIGHTS / 2).astype(edges.dtype))  # int w dlog_snr
  mass = w[:-1] - w[1:]
  # L is linear in a bin, and int -w' (log_snr - edge) = int w - width w(upper edge)
  parts = mass * low[:-1] + h / 2 * (area - width * w[1:])
  return Augmented(low, mass, parts, w[-1], w[0], jnp.sum(h / 2 * area))
