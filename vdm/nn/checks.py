"""Checks of what networks take: their fields, of `config.model`, and the shape of z.

An error names the field, its value, the rule and a remedy.
"""

from vdm.errors import require


def require_field(valid, name, value, rule, remedy):
  """Raises ValueError with the name of the network's field unless it is valid."""
  require(valid, f'config.model.{name}', value, rule, f'try {remedy}')


def axis_paddings(padding, num_axes):
  """Returns 'zero' or 'periodic' for each of the spatial axes, of a network's field `padding`.

  Raises ValueError unless the field is one of these, for all axes, or a list with one per axis.
  """
  kinds = tuple(padding.split(',')) if isinstance(padding, str) else ()
  kinds = kinds * num_axes if len(kinds) == 1 else kinds
  valid = len(kinds) == num_axes and set(kinds) <= {'zero', 'periodic'}
  rule = f"'zero', 'periodic', or a list of these with one for each of the {num_axes} spatial axes"
  remedy = repr(','.join(('zero', *['periodic'] * (num_axes - 1))))
  require_field(valid, 'padding', padding, rule, remedy)
  return kinds


def told_sizes(sizes, kinds):
  """Returns the sizes of a table of what positions are told: a periodic axis has one for all."""
  return tuple(1 if kind == 'periodic' else n for n, kind in zip(sizes, kinds, strict=True))


def check_fields(width, num_blocks, dropout, num_classes, width_field='width'):
  """Raises ValueError if a field that all networks have is out of its range."""
  valid = width >= 4 and width % 2 == 0
  require_field(valid, width_field, width, 'even and at least 4', max(4, width + 1))
  require_field(num_blocks >= 1, 'num_blocks', num_blocks, 'at least 1', 1)
  require_field(0 <= dropout < 1, 'dropout', dropout, 'in [0, 1)', 0.1)
  require_field(num_classes >= 0, 'num_classes', num_classes, 'zero or more', 0)


def check_heads(num_heads, width):
  """Raises ValueError if attention cannot split the width into that many heads."""
  divisors = [n for n in range(1, min(width, 17)) if width % n == 0]
  remedy = ' or '.join(map(str, divisors[1:3] or divisors))
  valid = num_heads >= 1 and width % num_heads == 0
  require_field(valid, 'num_heads', num_heads, f'a divisor of the width {width}', remedy)


def check_head_width(head_width, width):
  """Raises ValueError if attention cannot split the width into heads of that width."""
  valid = head_width >= 1 and width % head_width == 0
  require_field(valid, 'head_width', head_width, f'a divisor of the width {width}', min(width, 64))


def check_axes(name, shape):
  """Raises ValueError unless z has one, two or three spatial axes between batch and channels."""
  if not 3 <= len(shape) <= 5:
    raise ValueError(
      f'{name} takes [B, *space, C] with one to three axes of space, but z has shape {shape}.'
    )


def check_image_shape(name, shape, divisor, field, padding, fit_size):
  """Raises ValueError unless the levels can divide each spatial axis of z [B, *space, C].

  With `fit_size` an axis that is padded with zeros may have any size, for `fit` adds what it lacks.
  """
  check_axes(name, shape)
  sizes = shape[1:-1]
  kinds = axis_paddings(padding, len(sizes))
  bad = [bool(n % divisor) for n in sizes]
  if fit_size:
    bad = [wrong and kind == 'periodic' for wrong, kind in zip(bad, kinds, strict=True)]
  if any(bad):
    larger = [
      -(-n // divisor) * divisor if wrong else n for n, wrong in zip(sizes, bad, strict=True)
    ]
    where = ' along its periodic axes' if fit_size else ''
    zero = all(kind == 'zero' for kind, wrong in zip(kinds, bad, strict=True) if wrong)
    remedy = ', or config.model.fit_size=True' if zero else ''
    raise ValueError(
      f'config.data.image_shape={shape[1:]} must have sizes divisible by {divisor}{where} for this '
      f'{name}; try {(*larger, shape[-1])}, or fewer config.model.{field}{remedy}.'
    )
