"""HTML: elements whose text is escaped, and pictures inside the page."""

import base64
import html
import io
from collections.abc import Iterable
from typing import Any

from etils import epath
from PIL import Image

from vdm.system import files

LARGEST_FILE = 200_000  # bytes of a picture that is taken as it is
LONGEST_SIDE = 1600  # pixels of any other
EMPTY = ('img', 'meta', 'br')  # elements that have no end


class Html(str):
  """Marks text that is HTML, and is not escaped again."""


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
  """Returns an element; children that are no Html are escaped, None is left out.

  Names of attributes lose a trailing underscore and have hyphens for others, so that `class_` and
  `http_equiv` can be given; True is an attribute without a value, False and None are none.
  """
  given = ''.join(
    f' {key.rstrip("_").replace("_", "-")}'
    + ('' if value is True else f'="{html.escape(str(value))}"')
    for key, value in attributes.items()
    if value is not None and value is not False
  )
  start = f'<{name}{given}>'
  return Html(start if name in EMPTY else f'{start}{joined(*children)}</{name}>')


def joined(*children: Any) -> Html:
  """Returns children one after the other, as `element` has them."""
  some = (child for child in children if child is not None)
  return Html(''.join(c if isinstance(c, Html) else html.escape(str(c)) for c in some))


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], kinds: Iterable[str] = ()) -> Html:
  """Returns a table that scrolls by itself.

  `kinds` are those of its columns, of which the last may be missing: 'number', 'short' or 'long'
  text; '' for any.
  """
  kinds, head = list(kinds), list(head)
  kind = lambda i: (kinds[i] or None) if i < len(kinds) else None
  cells = lambda name, row: (element(name, c, class_=kind(i)) for i, c in enumerate(row))
  body = element('tbody', *(element('tr', *cells('td', row)) for row in rows))
  top = element('thead', element('tr', *cells('th', head))) if head else None
  return element('div', element('table', top, body), class_='scroll')


def folded(title: Any, *children: Any, open_: bool = False) -> Html:
  """Returns what is shown when its title is clicked."""
  return element('details', element('summary', title), *children, open=open_)


def picture(path: epath.Path, text: str) -> Html:
  """Returns a picture of a file, in the page itself; large ones are made smaller.

  Raises:
    ValueError: it is no picture; the message names the file.
  """
  with files.reading(path, 'draw it again'):
    content, kind = path.read_bytes(), 'png'
    with Image.open(io.BytesIO(content), formats=['PNG']) as image:
      image.load()
      size = image.size
      if len(content) > LARGEST_FILE:
        image = image.convert('RGB')
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        smaller = files.content(lambda file: image.save(file, 'WEBP', quality=90))
        if len(smaller) < len(content):
          content, kind, size = smaller, 'webp', image.size
  source = f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
  return element('img', src=source, alt=text, width=size[0], height=size[1], loading='lazy')
