"""Shows docstrings and comments as they are meant: an extension of Griffe, for the reference."""

import ast
import functools
import io
import textwrap
import tokenize

import griffe


@functools.cache
def comments(path) -> dict[int, tuple[str, bool]]:
  """Returns the comments of a file by line, and whether each has its line for itself."""
  found = {}
  for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
    if token.type == tokenize.COMMENT:
      found[token.start[0]] = token.string.lstrip('# '), token.line.lstrip().startswith('#')
  return found


def is_code(paragraph: str) -> bool:
  """Returns whether a paragraph of a docstring is indented, or Python that does something."""
  if paragraph.startswith('  '):
    return True
  try:
    return '(' in paragraph and bool(ast.parse(paragraph).body)
  except SyntaxError:
    return False


class Formulas(griffe.Extension):
  """Makes code blocks of what is code in docstrings, and descriptions of the comments on fields."""

  def on_object(self, *, obj: griffe.Object, **_):
    """Changes the docstring of each object that Griffe has read."""
    if obj.docstring:
      paragraphs = obj.docstring.value.split('\n\n')
      obj.docstring.value = '\n\n'.join(
        textwrap.indent(textwrap.dedent(part), '    ') if is_code(part) else part
        for part in paragraphs
      )

  def on_attribute(self, *, attr: griffe.Attribute, **_):
    """Takes the comment above a field or a constant, and the one beside it, for its docstring."""
    if attr.docstring or attr.lineno is None:
      return
    found, above = comments(attr.filepath), attr.lineno
    while found.get(above - 1, ('', False))[1]:
      above -= 1
    text = ' '.join(found[n][0] for n in range(above, attr.lineno + 1) if n in found)
    if text.strip():
      text = text.removeprefix('type: ignore[assignment]').strip()
      attr.docstring = griffe.Docstring(text, parent=attr)
