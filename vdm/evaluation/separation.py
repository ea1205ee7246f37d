"""How well likelihoods tell two data sets apart."""

import io
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from vdm import data, style
from vdm.system import files

AT_ONCE = 256  # images that are read at once


def auroc(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
  """Returns the area under the receiver operating characteristic, and its standard error.

  That is the share of pairs in which `other` has the higher score, of equal ones half. The error is
  that of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988): of the shares by each example.

  Args:
    own: scores of N examples.
    other: scores of M examples.
  """

  def share_above(of, among):
    """Returns for each of `of` the share of `among` that is below it, of equal ones half."""
    ordered = np.sort(among)
    low, high = (np.searchsorted(ordered, of, side) for side in ('left', 'right'))
    return (low + high) / (2 * len(among))

  by_other, by_own = share_above(other, own), 1 - share_above(own, other)
  variances = (shares.var(ddof=1) / len(shares) for shares in (by_other, by_own) if len(shares) > 1)
  return float(by_other.mean()), float(np.sqrt(sum(variances)))


def png_bits(
  source: data.Source, count: int, to_pixels: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
  """Returns the length in bits of the first `count` pictures of a source, as optimised PNG, [N]."""
  lengths = []
  for start in range(0, count, AT_ONCE):
    for pixels in to_pixels(source.fetch(np.arange(start, min(count, start + AT_ONCE)))['image']):
      file = io.BytesIO()
      picture = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
      Image.fromarray(picture).save(file, format='png', optimize=True)
      lengths.append(8 * file.tell())
  return np.array(lengths, np.float64)


def write(
  folder: pathlib.Path, scores: dict[str, list[np.ndarray]], names: list[str], unit: str
) -> dict[str, tuple[float, float]]:
  """Writes against.json and histograms.png; returns the AUROC of each score with its error.

  Args:
    folder: of both.
    scores: by the name of a score, those of both sets: [N] and [M].
    names: of the sets.
    unit: of the scores.
  """
  found, plain = {name: auroc(*pair) for name, pair in scores.items()}, {'sets': names}
  for name, (value, error) in found.items():
    interval = [max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)]
    plain[name] = {'auroc': value, 'stderr': error, 'interval_95': interval}
  files.write(folder / 'against.json', files.json_text(plain))
  plot(scores, names, found, unit, folder / 'histograms.png')
  return found


@style.paper
def plot(
  scores: dict[str, list[np.ndarray]],
  names: list[str],
  found: dict[str, tuple[float, float]],
  unit: str,
  path: pathlib.Path,
) -> np.ndarray:
  """Plots the histograms of two sets, a panel for each score; returns the picture."""
  figure, panels = style.figure(len(scores), (3.6 * len(scores), 2.8), squeeze=False)
  for axes, (name, pair) in zip(panels[0], scores.items(), strict=True):
    joined = np.concatenate(pair)
    edges = np.linspace(*np.quantile(joined, (0.002, 0.998)), 41)
    for values, label, colour in zip(pair, names, style.COLOURS, strict=False):
      look = dict(color=colour, alpha=0.55, density=True, label=label)
      axes.hist(np.clip(values, edges[0], edges[-1]), edges, **look)
    value, error = found[name]
    axes.set_title(f'AUROC {value:.3f} ± {error:.3f}')
    axes.set(xlabel=f'{name} ({unit})', yticks=[])
    axes.spines['left'].set_visible(False)
  panels[0][0].set_ylabel('share of the examples')
  panels[0][0].legend()
  return style.save(figure, path)
