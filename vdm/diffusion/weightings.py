"""Weightings of the diffusion loss: log_snr -> w(log_snr), which multiplies the integrand of

  L_w(x) = 1/2 int w(log_snr) E |eps_hat - eps|^2 dlog_snr          (VDM++ eq. 7)

so that w = 1 is the evidence lower bound. A published loss is one of these once its sampling of
times and the head that it compares are counted in: w = p(log_snr) `loss_ratio(head, log_snr)`,
times the weight it has on top (VDM++ table 1). Constants do not matter.

  published loss                               name             where w rises as log_snr does
  VDM, NCSN (sigma^2 times the score's error)  elbo             nowhere
  DDPM, linear beta, eps                       ddpm             below -0.92
  improved DDPM, cosine, eps                   iddpm            below 0
  EDM                                          edm              below -3.31
  VDM++, EDM made monotone                     edm_monotonic    nowhere
  cosine, v                                    v_cosine         nowhere
  flow matching, optimal transport path        flow_matching    nowhere
  InDI                                         indi             nowhere
  P2                                           p2               below -1.10 (gamma 1)
  min-SNR                                      min_snr          below 0
  VDM++, simple diffusion 2                    sigmoid          nowhere
  Stable Diffusion 3, logit-normal t           sd3              below -3.38

Where w rises nowhere (`is_monotone`) the loss is a bound for data with noise added (VDM++
theorem 1; `vdm.diffusion.noisy_elbo`). One of your own takes five lines of your config file:

  def my_weighting(power=2.0):
    return lambda log_snr: jax.nn.sigmoid(-log_snr) ** power
  WEIGHTINGS['mine'] = my_weighting

Any of them moves to another resolution by `config.weighting.image_size`: see `shifted`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import special

from vdm.diffusion.heads import HEADS, log_loss_ratio
from vdm.errors import require

Weighting = Callable[[Float[Array, '*b']], Float[Array, '*b']]


def elbo() -> Weighting:
  """Returns w = 1, of VDM's variational bound: the likelihood weighting of score matching."""
  return jnp.ones_like


def ddpm(beta_min: float = 0.1, beta_max: float = 20.0) -> Weighting:
  """Returns w = sigmoid(-log_snr) / sqrt(b0^2 + 2 (b1 - b0) log(1 + e^-log_snr)) (VDM++ table 1).

  It is that of the eps loss at uniform times of the schedule `ddpm`, whose p(log_snr) this is.
  """
  _check_positive(beta_min=beta_min, beta_max=beta_max)

  def w(log_snr):
    root = jnp.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * jax.nn.softplus(-log_snr))
    return jax.nn.sigmoid(-log_snr) / root

  return w


def iddpm() -> Weighting:
  """Returns the weighting w = sech(log_snr / 2) (VDM++ table 1).

  It is that of the eps loss at uniform times of the cosine schedule.
  """
  return lambda log_snr: _sech(log_snr / 2)


def edm(mean: float = 2.4, std: float = 2.4, sigma_data: float = 0.5) -> Weighting:
  """Returns the weighting w = N(log_snr; mean, std^2) (e^-log_snr + sigma_data^2) (VDM++ table 1).

  In EDM's loss log sigma = -log_snr / 2 is normal, of mean -1.2 and deviation 1.2, and the error of
  x_hat weighs (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM table 1).
  """
  _check_positive(std=std, sigma_data=sigma_data)
  log_variance = 2 * math.log(sigma_data)
  # in the logarithm: e^-log_snr is large where the density is small
  return lambda log_snr: jnp.exp(
    _log_normal(log_snr, mean, std) + jnp.logaddexp(-log_snr, log_variance)
  )


def edm_monotonic(mean: float = 2.4, std: float = 2.4, sigma_data: float = 0.5) -> Weighting:
  """Returns `edm`, held at its maximum's value below its maximum, log_snr = -3.30778 (VDM++)."""
  w = edm(mean, std, sigma_data)
  # d log w = 0 where log_snr = mean - std^2 sigmoid(-log_snr - log sigma_data^2). Iterated from
  # above, this falls to the largest solution; from there on w falls, whatever the arguments.
  peak = mean
  for _ in range(1000):
    peak = mean - std**2 * float(special.expit(-peak - 2 * math.log(sigma_data)))
  return lambda log_snr: w(jnp.maximum(log_snr, peak))


def v_cosine() -> Weighting:
  """Returns the weighting w = e^(-log_snr / 2) (VDM++ table 1).

  It is that of the v loss at uniform times of the cosine schedule.
  """
  return lambda log_snr: jnp.exp(-log_snr / 2)


def flow_matching() -> Weighting:
  """Returns the weighting w = e^(-log_snr / 2) (VDM++ table 1), the same as `v_cosine`.

  It is that of the loss |o_hat - o|^2 of o = eps - x at uniform t, for z = (1 - t) x + t eps.
  """
  return v_cosine()


def indi() -> Weighting:
  """Returns the weighting w = e^-log_snr sech^2(log_snr / 4) (VDM++ table 1).

  It is that of InDI's loss, the loss of x at uniform t, for z = (1 - t) x + t eps.
  """

  def w(log_snr):
    half = jnp.abs(log_snr) / 2
    # one exponent: e^-log_snr is large where sech is small
    return 4 * jnp.exp(-log_snr - half) / (1 + jnp.exp(-half)) ** 2

  return w


def p2(gamma: float = 1.0) -> Weighting:
  """Returns w = sech(log_snr / 2) / (1 + e^log_snr)^gamma (VDM++ table 1, k = 1).

  This is P2's weight on iddpm.
  """
  return lambda log_snr: _sech(log_snr / 2) * jnp.exp(gamma * jax.nn.log_sigmoid(-log_snr))


def min_snr(gamma: float = 5.0) -> Weighting:
  """Returns the weighting w = sech(log_snr / 2) min(1, gamma e^-log_snr) (VDM++ table 1).

  It is that of the x loss weighted with min(snr, gamma), at uniform times of the cosine schedule.
  """
  _check_positive(gamma=gamma)
  log_gamma = math.log(gamma)
  return lambda log_snr: _sech(log_snr / 2) * jnp.exp(jnp.minimum(0.0, log_gamma - log_snr))


def sigmoid(bias: float = 2.0) -> Weighting:
  """Returns the weighting w = sigmoid(bias - log_snr) (VDM++ section 4, bias 2 at 64 x 64).

  As a weight on the error of x it is e^bias sigmoid(log_snr - bias) (simple diffusion 2, eq. 4).
  """
  return lambda log_snr: jax.nn.sigmoid(bias - log_snr)


def sd3(mean: float = 0.0, std: float = 2.0, head: str = 'o') -> Weighting:
  """Returns the weighting w = N(log_snr; mean, std^2) `loss_ratio(head, log_snr)`.

  It is that of the loss |out_hat - out|^2 of a head's output, at log_snr drawn from the normal.
  Since log_snr = 2 logit(t) for z = t x + (1 - t) eps, the default, N(log_snr; 0, 2^2)
  (1 + e^(-log_snr / 2))^2, is that of flow matching with logit(t) ~ N(0, 1), Stable Diffusion 3's
  rf/lognorm(0, 1) (arXiv 2403.03206). JiT (2511.13720) has the mean -1.6 and std 1.6.
  """
  _check_positive(std=std)
  require(head in HEADS, 'head', head, f'one of {", ".join(HEADS)}', 'choose one of these')
  return lambda log_snr: jnp.exp(_log_normal(log_snr, mean, std) + log_loss_ratio(head, log_snr))


def shifted(weighting: Weighting, image_size: int, noise_size: int = 64) -> Weighting:
  """Returns w_d(log_snr) = w(log_snr - 2 log(noise_size / d)), for images of d x d (VDM++).

  The mean of k x k neighbouring pixels has k^2 times their signal-to-noise ratio, so that a model
  at d has to be given log_snr lower by 2 log(d / noise_size) for the same picture: the shift of the
  schedule `shifted_cosine`. At d = noise_size it is w itself.
  """
  _check_positive(image_size=image_size, noise_size=noise_size)
  shift = 2 * math.log(noise_size / image_size)
  return lambda log_snr: weighting(log_snr - shift)


def is_monotone(weighting: Weighting, log_snr_min: float, log_snr_max: float) -> bool:
  """Returns whether w falls or stays as log_snr rises from end to end (as VDM++ theorem 1 asks).

  The function itself is asked, on a grid of 4,097 points up to a relative rise of 1e-5, so that the
  answer holds for a weighting of your own, for a shifted one, and for `edm` on the range where it
  falls.
  """
  w = np.asarray(weighting(jnp.linspace(log_snr_min, log_snr_max, 4097)))
  highest_above = np.maximum.accumulate(w[::-1])[::-1]
  return bool(np.all(highest_above <= w * (1 + 1e-5)))


def _check_positive(**arguments):
  for name, value in arguments.items():
    require(value > 0, name, value, 'positive', 'the docstring says what it is')


def _sech(a):
  """Returns sech(a) = 2 / (e^a + e^-a), in a form that never overflows."""
  return 2 * jnp.exp(-jnp.abs(a)) / (1 + jnp.exp(-2 * jnp.abs(a)))


def _log_normal(a, mean: float, std: float):
  """Returns log N(a; mean, std^2)."""
  return -0.5 * ((a - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


WEIGHTINGS = {
  'elbo': elbo,
  'ddpm': ddpm,
  'iddpm': iddpm,
  'edm': edm,
  'edm_monotonic': edm_monotonic,
  'v_cosine': v_cosine,
  'flow_matching': flow_matching,
  'indi': indi,
  'p2': p2,
  'min_snr': min_snr,
  'sigmoid': sigmoid,
  'sd3': sd3,
}
