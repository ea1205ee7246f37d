"""The look of everything that is drawn: colours, type, sizes, and how a figure is made and saved.

A function that draws is decorated with `paper`, takes its figure from `figure` and ends in `save`.
None of them needs pyplot, so importing this does not change a notebook's backend.
"""

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from scipy.optimize import isotonic_regression

from vdm.system import files

BLUE, RED, GREEN, ROSE, BROWN, SKY = COLOURS = (
  '#0b62a4',
  '#e05a10',
  '#00806a',
  '#d0569c',
  '#6e3c00',
  '#4597cc',
)
DATA, REFERENCE, PALE = '#1a1a1a', '#707070', '#d0d0d0'  # data; what others are held to; the rest
FRAME = 217  # grey around images of a grid, which is neither their black nor their white
DPI = 150
ROUND = ('-', (0, (4, 1.5)), (0, (1, 1.2)))  # the dashes of colours that come again
LEADER = {'arrowstyle': '-', 'linewidth': 0.6, 'relpos': (0, 0.5), 'shrinkA': 2, 'shrinkB': 2}
RC = {
  'figure.dpi': DPI,
  'savefig.dpi': 'figure',
  'font.family': 'DejaVu Sans',  # comes with matplotlib, so all machines draw the same
  'font.size': 9,
  'axes.labelsize': 9,
  'axes.titlesize': 9,
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.linewidth': 0.7,
  'axes.axisbelow': True,
  'axes.grid': True,
  'grid.color': '#e8e8e8',
  'grid.linewidth': 0.6,
  'axes.prop_cycle': matplotlib.cycler(linestyle=ROUND) * matplotlib.cycler(color=COLOURS),
  'lines.linewidth': 1.5,
  'lines.markersize': 5,
  'xtick.labelsize': 8,
  'ytick.labelsize': 8,
  'xtick.major.width': 0.7,
  'ytick.major.width': 0.7,
  'legend.fontsize': 8,
  'legend.title_fontsize': 8,
  'legend.frameon': False,
  'errorbar.capsize': 2.5,
  'image.cmap': 'viridis',
  'figure.constrained_layout.use': True,
  'figure.constrained_layout.w_pad': 0.08,  # inches
  'figure.constrained_layout.h_pad': 0.07,
}
paper = matplotlib.rc_context(RC)  # decorates a function that draws


def figure(
  columns: int, size: tuple[float, float], rows: int = 1, **kwargs: Any
) -> tuple[Figure, Any]:
  """Returns a figure of `size` inches, and its axes: one, or an array [columns] or [rows columns].

  A page is about seven inches wide.
  """
  made = Figure(size)
  FigureCanvasAgg(made)
  return made, made.subplots(rows, columns, **kwargs)


def save(drawn: Figure, path: pathlib.Path) -> np.ndarray:
  """Writes the figure as PNG and returns it as an image uint8 [H W 3]."""
  files.write(path, files.content(lambda file: drawn.savefig(file, format='png')))
  return _pixels(drawn)


def svg_of(drawn: Figure) -> str:
  """Returns a figure as SVG, transparent where nothing is drawn."""
  file = io.StringIO()
  drawn.savefig(file, format='svg', transparent=True, metadata={'Date': None})
  return file.getvalue()


def image_of(drawn: Figure) -> np.ndarray:
  """Returns the figure as an image uint8 [H W 3]."""
  drawn.canvas.draw()
  return _pixels(drawn)


def _pixels(drawn: Figure) -> np.ndarray:
  """Returns what was drawn last."""
  return np.asarray(drawn.canvas.buffer_rgba())[..., :3].copy()


def signed(number: float) -> str:
  """Returns a number with one decimal, and a minus as tick labels have it."""
  return f'{number:.1f}'.replace('-', '−')


def plain_numbers(axis: Axis):
  """Labels a logarithmic axis with plain numbers: at 1, 2 and 5, or everywhere within a factor 4.

  Beyond a factor of 1000 the decades alone have labels.
  """
  low, high = axis.get_view_interval()
  if high < 4 * low:  # less than a decade: equal steps, as on a linear axis
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(StrMethodFormatter('{x:g}'))
  elif high < 1000 * low:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter('{x:g}'))
  axis.set_minor_formatter(NullFormatter())


def label_ends(axes: Axes, lines: dict[str, Line2D]):
  """Writes each line's name at its right end, spread where they are close, in place of a legend.

  Lines that lie on each other have one label: 'a = b' where they agree to six digits, 'a ≈ b' where
  no eye tells them apart. Call it when all is drawn, and scales and limits are set.
  """
  axes.figure.draw_without_rendering()  # only now are positions known
  to_axes = axes.transData + axes.transAxes.inverted()
  groups = alike([to_axes.transform(line.get_xydata()) for line in lines.values()])
  names, drawn = list(lines), list(lines.values())
  parts = [f' {sign} '.join(names[i] for i in members) for members, sign in groups]
  ends = [to_axes.transform(drawn[members[0]].get_xydata()[-1]) for members, _ in groups]
  height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
  places = spread([y for _, y in ends], 10.5 / height)
  wide = 0.0
  for part, (members, _), (x, y), place in zip(parts, groups, ends, places, strict=True):
    colour = drawn[members[-1]].get_color()  # which lies on top
    name = axes.annotate(
      part,
      (x, y),
      (1.04, place),
      'axes fraction',
      'axes fraction',
      color=colour,
      va='center',
      fontsize=8,
      annotation_clip=False,
      arrowprops=LEADER | {'color': colour},
    )
    wide = max(wide, Text.get_window_extent(name).width / axes.figure.dpi)  # without the leader
  width, height = axes.figure.get_size_inches()
  axes.figure.set_size_inches(width + wide, height)


def spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> np.ndarray:
  """Returns the places closest to the wanted ones that are `gap` apart, within low and high.

  Closest are those of least squares: an isotonic regression. More than fit go below `low`.
  """
  order = np.argsort(wanted, kind='stable')
  steps = gap * np.arange(len(order))
  found = isotonic_regression(np.asarray(wanted, float)[order] - steps).x
  places = np.empty(len(order))
  places[order] = np.minimum(np.maximum(found, low), high - steps[-1:]) + steps
  return places


def alike(curves: list[np.ndarray]) -> list[tuple[list[int], str]]:
  """Returns which curves [N 2], in axes of height one, lie on each other, each group with its sign.

  '≈': their heights differ by less than 0.004, about a pixel; '=': by less than a millionth.
  """
  groups, curves = [], [curve[curve[:, 0].argsort()] for curve in curves]
  for number, curve in enumerate(curves):
    for group in groups:
      x, y = curves[group[0][0]].T
      apart = np.abs(np.interp(x, *curve.T) - y).max()
      if apart < 0.004:
        group[0].append(number)
        group[1] = '=' if group[1] == '=' and apart < 1e-6 else '≈'
        break
    else:
      groups.append([[number], '='])
  return [tuple(group) for group in groups]


@paper
def label_grid(
  blocks: dict[str, np.ndarray],
  columns: Sequence[str],
  rows: Sequence[str] = (),
  title: str = '',
) -> Figure:
  """Returns a figure of grids of images under one another, pixel for pixel, with names.

  Args:
    blocks: name -> a picture uint8 [H W 1 or 3], all of one width.
    columns: names above the first, over equal parts of its width.
    rows: names of equal parts of each block's height, if they have any.
    title: what the names of the columns are.
  """
  gap, top = 14, 26 + (22 if title else 0)
  left = 8 + (18 if any(blocks) else 0) + 14 * max(map(_width, rows), default=0)
  width = max(picture.shape[1] for picture in blocks.values())
  heights = [picture.shape[0] for picture in blocks.values()]
  size = np.array([left + width + 8, top + sum(heights) + gap * (len(heights) - 1) + 8])
  drawn = Figure(size / DPI, layout='none')
  FigureCanvasAgg(drawn)
  place = lambda x, y: (x / size[0], 1 - y / size[1])  # pixels from the upper left corner
  text = lambda x, y, words, **style: drawn.text(*place(x, y), words, fontsize=8, **style)
  text(left, 4, title, va='top')
  for number, name in enumerate(columns):
    x = left + (number + 0.5) * width / len(columns)
    text(x, top - 5, name, ha='center', va='bottom')
  for (name, picture), height in zip(blocks.items(), heights, strict=True):
    rgb = np.broadcast_to(picture, (*picture.shape[:2], 3))
    drawn.figimage(rgb, left, size[1] - top - height, origin='upper')
    text(4, top + height / 2, name, rotation=90, va='center')
    for number, row in enumerate(rows):
      text(left - 6, top + (number + 0.5) * height / len(rows), row, ha='right', va='center')
    top += height + gap
  return drawn


def _width(name: str) -> int:
  """Returns the letters of a name that are seen, mathematics counted as two."""
  return 2 if name.startswith('$') else len(name)
