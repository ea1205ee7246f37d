"""Says what a network's output means for the data and the noise in z: one table of heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdm.diffusion.gaussian import Prediction, alpha, expand_to, sigma

SIGMA_DATA = 0.5  # the standard deviation of the data that the head F reckons with (EDM table 1)


def _edm_norm(a, s):
  """Returns the root mean square of z = a x + s eps, for data of mean square SIGMA_DATA^2."""
  return jnp.sqrt(s**2 + SIGMA_DATA**2 * a**2)


def _edm_head(out, z, a, s):
  """Returns x_hat = c_skip z / a + c_out F (EDM eq. 7) and its eps_hat, without cancellation."""
  norm = _edm_norm(a, s)
  return Prediction(
    SIGMA_DATA * (SIGMA_DATA * a * z / norm + s * out) / norm,
    (s * z / norm - SIGMA_DATA * a * out) / norm,
  )


# Each head maps (output, z, alpha, sigma) to (x_hat, eps_hat), given z = alpha x + sigma eps.
HEADS = {
  'eps': lambda out, z, a, s: Prediction((z - s * out) / a, out),
  'x': lambda out, z, a, s: Prediction(out, (z - a * out) / s),
  'v': lambda out, z, a, s: Prediction(a * z - s * out, s * z + a * out),
  'o': lambda out, z, a, s: Prediction((z - s * out) / (a + s), (z + a * out) / (a + s)),
  'score': lambda out, z, a, s: Prediction((z + s**2 * out) / a, -s * out),
  'F': _edm_head,
}


def network_input(
  head: str, z: Float[Array, 'b ...'], log_snr: Float[Array, 'b ...']
) -> Float[Array, 'b ...']:
  """Returns what a network with this head reads, which is z except for F.

  For F it is EDM's c_in z / alpha = z / sqrt(sigma^2 + sigma_data^2 alpha^2), of mean square one
  at every log_snr for data of mean square sigma_data^2. EDM's other input, the noise level
  c_noise = -log_snr / 8, is affine in log_snr, as is the t that every network here reads.
  """
  if head != 'F':
    return z
  return z / _edm_norm(expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z))


def loss_ratio(head: str, log_snr: Float[Array, '*b']) -> Float[Array, '*b']:
  """Returns r(log_snr) = |out_hat - out|^2 / |eps_hat - eps|^2, a head's own loss over that of eps.

  It is 1 for eps; e^-log_snr for x; 1 + e^-log_snr for v; (1 + e^(-log_snr / 2))^2 for o;
  1 + e^log_snr for score; e^-log_snr / sigma_data^2 + 1 for F. A head is affine in its output, so r
  is what one unit of output does to eps_hat, to the power of -2.
  """
  return jnp.exp(log_loss_ratio(head, log_snr))


def log_loss_ratio(head: str, log_snr: Float[Array, '*b']) -> Float[Array, '*b']:
  """Returns log r(log_snr), the logarithm of `loss_ratio`, also where r is beyond float32."""
  one, root = jnp.ones_like(log_snr), lambda a: jnp.exp(jax.nn.log_sigmoid(a) / 2)
  # alpha and sigma by these roots, whose squares may be below float32
  of_eps = HEADS[head](one, jnp.zeros_like(one), root(log_snr), root(-log_snr)).eps
  return -2 * jnp.log(jnp.abs(of_eps))


def to_prediction(
  head: str, output: Float[Array, 'b ...'], z: Float[Array, 'b ...'], log_snr: Float[Array, 'b ...']
) -> Prediction:
  """Returns what a network's output says of x and eps; nothing else knows what it predicts.

  Args:
    head: a name in HEADS: 'eps'; 'x'; 'v' = alpha eps - sigma x; 'o' = eps - x, flow matching's;
      'score' = -eps / sigma; 'F', EDM's preconditioned output (see `network_input`).
    output: the network's output, of z's shape.
    z: the noisy data [B ...].
    log_snr: [B].

  Returns:
    Prediction(x, eps) with z = alpha x + sigma eps.
  """
  return HEADS[head](output, z, expand_to(alpha(log_snr), z), expand_to(sigma(log_snr), z))
