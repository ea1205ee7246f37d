"""Tells TensorBoard what each scalar is, and the config as text and as hyperparameters."""

import json
import re
from typing import Any

from vdm.workdir.config_file import changes, flat

# By a tag's name behind `train/`, or behind `eval/` and the parameters that are evaluated.
_MEANINGS = {
  r'bits_per_dim': 'The variational bound in bits per dimension; lower is better.',
  r'nats_per_dim': 'The variational bound in nats per dimension, of a density per unit of the '
  'data; lower is better.',
  r'ode_(bits|nats)_per_dim': 'The likelihood by the probability-flow ODE, in the unit of the '
  'bound; lower is better.',
  r'stderr': 'Standard error of the bound.',
  r'loss': 'The weighted loss that is trained on, in nats per dimension.',
  r'recon_(bpd|npd)': 'Term of the bound: the data given the least noisy latent.',
  r'prior_(bpd|npd)': 'Term of the bound: what the noisiest latent still tells of the data.',
  r'diffusion_(bpd|npd)': 'Term of the bound: denoising, from the noisiest latent to the least.',
  r'diffusion_cv': 'Standard deviation over mean of the diffusion loss of one example at one time, '
  'under the schedule in use: the lower, the less noisy the gradient.',
  r'diffusion_cv_linear': 'The same, had log-SNR been drawn uniformly.',
  r'square_reduction': 'Mean square of the diffusion loss under the schedule in use over that '
  'under a linear one: below 1, the schedule makes the loss less noisy.',
  r'square_reduction_predicted': 'The same, as the adaptive schedule predicts it.',
  r'grad_norm': 'Global norm of the gradient, before it is clipped.',
  r'log_snr_(max|min)': 'End point of the schedule, which may be learned.',
  r'images_per_second': 'Training speed since the last line, without evaluations.',
  r'data_wait': 'Share of the time in which this host waited for data: near 1, devices stand still '
  'for want of it.',
  r'minutes_left': 'Minutes to the last step at this speed, without evaluations.',
  r'skipped_in_a_row': 'Steps without an update in a row, since a term was not finite.',
  r'fid': 'Fréchet distance of Inception features between samples and real images; lower is '
  'better.',
  r'sfid': 'As fid, of spatial features: it sees where things are.',
  r'inception_score': 'How sure and how varied the classes of samples are; higher is better.',
  r'kid': 'Kernel distance of Inception features between samples and real images, without the bias '
  'of few samples; lower is better.',
  r'fd_(?!spatial)\w+': 'Fréchet distance of features of the network that is named, between '
  'samples and real images; lower is better. It is no FID.',
  r'fd_spatial_\w+': 'The same of spatial features, which see where things are.',
  r'score_\w+': 'As the Inception score, by the classes of the network that is named: how sure '
  'and how varied samples are; higher is better.',
  r'kd_\w+': 'As KID, of features of the network that is named: kernel distance between samples '
  'and real images, without the bias of few samples; lower is better.',
  r'precision(_\w+)?': 'Share of samples that lie among real images, by features: are they real?',
  r'recall(_\w+)?': 'Share of real images that lie among samples, by features: is any missing?',
  r'power_ratio_worst': 'Power spectrum of samples over that of the data, where it is farthest '
  'from 1.',
  r'coverage_(pixels|modes)_\d+': 'How often the central interval of so many per cent of the '
  'samples holds the truth, by pixels or by Fourier modes.',
}
_PARAMS = r'((?P<params>raw|ema|halflife_[\d.e+]+|std_[\d.]+)_)?'  # as config.eval.params has them


def describe(tag: str) -> str:
  """Returns what a scalar is, by its tag; '' if it is none of ours."""
  for name, meaning in _MEANINGS.items():
    if found := re.fullmatch(rf'(train|eval)/{_PARAMS}{name}', tag):
      return f'{meaning} Of {found["params"]} parameters.' if found['params'] else meaning
  return ''


def texts(tree: dict[str, Any]) -> dict[str, str]:
  """Returns a whole config as Markdown, by tag: what differs from the defaults, and all of it."""
  rows = [(leaf, _cell(value), _cell(usual)) for leaf, value, usual in changes(tree)]
  lines = [f'| {" | ".join(row)} |' for row in rows]
  head = '| differs from configs/default.py | here | default |\n|---|---|---|\n'
  whole = json.dumps(tree, indent=2)
  return {
    'config/differs': head + '\n'.join(lines),
    'config/whole': '\n'.join(f'    {line}' for line in whole.splitlines()),
  }


def _cell(value: Any) -> str:
  return '' if value is None else json.dumps(value).replace('|', '\\|')


def hparams(tree: dict[str, Any]) -> dict[str, bool | int | float | str]:
  """Returns the leaves of a whole config as hyperparameters; sequences become text."""
  plain = lambda value: isinstance(value, bool | int | float | str)
  return {leaf: v if plain(v) else json.dumps(v) for leaf, v in flat(tree).items()}
