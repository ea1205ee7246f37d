"""Makes the site of what reads well in the checkout as it is: hooks of mkdocs.

* Every file outside docs/ that a page links becomes a page of the site, and the link leads there.
* A notebook of the checkout is a page, with what it shows.
* A link to the package's source, `elbo.diffusion_loss` to vdm/diffusion/elbo.py, leads to the
  reference of what its text names.
* The table of the config's leaves is made of configs/default.py.
* KaTeX is fetched by npm when the site is built, and is part of it.
"""

import ast
import functools
import io
import pathlib
import posixpath
import re
import subprocess
import tarfile
import tempfile
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(r'(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)')
LANGUAGES = {'.py': 'python', '.sh': 'bash'}
LEAVES = '<!-- the leaves of configs/default.py -->'  # in docs/reference/config.md


def uri_of(path: str) -> str:
  """Returns the name in the site of a file of the checkout: docs/x.md is x.md, LICENSE a page."""
  if path.startswith('docs/'):
    return path.removeprefix('docs/')
  path = path.replace('/README.md', '.md').replace('.ipynb', '.md')
  return path if path.endswith('.md') else f'{path}.md'


def path_of(uri: str) -> str:
  """Returns the file of the checkout that a page of the site is."""
  if (ROOT / 'docs' / uri).exists():
    return f'docs/{uri}'
  stem = uri.removesuffix('.md')
  found = (path for path in (uri, f'{stem}.ipynb') if (ROOT / path).exists())
  return next(found, f'{stem}/README.md')


def target_of(page: str, link: str) -> str | None:
  """Returns the file of the checkout, if any, that a link of a page leads to."""
  target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
  return target if '://' not in link and (ROOT / target).is_file() else None


def identifier(text: str, source: str) -> str:
  """Returns the name in Python of what a link's text says of a source file of the package."""
  module = source.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
  name = text.strip('`').removeprefix(f'{module.rpartition(".")[2]}.')
  return f'{module}.{name}' if re.fullmatch(r'[A-Za-z_][\w.]*', name) else module


def named_in(navigation) -> list[str]:
  """Returns the pages that a part of the navigation names."""
  if isinstance(navigation, str):
    return [navigation]
  parts = navigation.values() if isinstance(navigation, dict) else navigation
  return [page for part in parts for page in named_in(part)]


def content(path: str) -> str:
  """Returns a file of the checkout as Markdown; what is none is shown as it is."""
  text = (ROOT / path).read_text()
  if path.endswith('.md'):
    return text
  if path.endswith('.ipynb'):
    return notebook(path)[0]
  language = LANGUAGES.get(pathlib.PurePath(path).suffix, 'text')
  return f'# {path}\n\n````{language}\n{text}````\n'


@functools.cache
def notebook(path: str) -> tuple[str, dict[str, bytes]]:
  """Returns a notebook as Markdown, and its pictures by their names in the site."""
  from nbconvert import MarkdownExporter

  folder = f'{pathlib.PurePath(path).stem}_files'
  text, found = MarkdownExporter().from_filename(
    str(ROOT / path), resources={'output_files_dir': folder}
  )
  start = posixpath.dirname(path)
  return text, {posixpath.join(start, name): data for name, data in found['outputs'].items()}


@functools.cache
def katex() -> dict[str, bytes]:
  """Returns KaTeX's script, style and fonts, by their names in the site."""
  with tempfile.TemporaryDirectory() as folder:
    command = ['npm', 'pack', '--silent', 'katex@>=0.16']
    try:
      subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
      raise SystemExit(f'{" ".join(command)}: {error}; the site needs npm for KaTeX.') from None
    (packed,) = pathlib.Path(folder).glob('*.tgz')
    with tarfile.open(packed) as archive:
      wanted = re.compile(
        r'package/dist/(katex\.min\.(?:js|css)|contrib/auto-render\.min\.js|fonts/.*\.woff2)'
      )
      members = ((wanted.fullmatch(member.name), member) for member in archive)
      return {
        f'katex/{found[1]}': archive.extractfile(member).read()
        for found, member in members
        if found
      }


def on_config(config):
  """Gives headings the anchors that GitHub gives them."""
  from pymdownx.slugs import slugify

  config.mdx_configs['toc']['slugify'] = slugify(case='lower')
  return config


def on_files(files, config):
  """Adds KaTeX, and the files outside docs/ that the navigation names or a page links."""
  from mkdocs.structure.files import File, InclusionLevel

  for name, data in katex().items():
    files.append(File.generated(config, name, content=data))
  listed = [path_of(uri) for uri in named_in(config.nav)]
  todo = listed + [path_of(file.src_uri) for file in files.documentation_pages()]
  done = set()
  while todo:
    path = todo.pop()
    if path in done:
      continue
    done.add(path)
    if not path.startswith('docs/'):
      file = File.generated(config, uri_of(path), content=content(path))
      file.inclusion = InclusionLevel.INCLUDED if path in listed else InclusionLevel.NOT_IN_NAV
      files.append(file)
    if path.endswith('.ipynb'):
      for name, data in notebook(path)[1].items():
        files.append(File.generated(config, name, content=data))
    if path.endswith(('.md', '.ipynb')):
      for match in LINK.finditer(content(path)):
        target = target_of(path, match[3])
        if target and not target.startswith(('docs/', 'vdm/')):
          todo.append(target)
  return files


def on_page_markdown(markdown, page, **_):
  """Points links at what their files are on the site, and fills in the table of leaves."""
  path = path_of(page.file.src_uri)

  def changed(match):
    picture, text, link, anchor = match.groups()
    target = target_of(path, link)
    if target is None:
      return match[0]
    if target.startswith('vdm/'):
      return f'[{text}][{identifier(text, target)}]'
    start = posixpath.dirname(page.file.src_uri) or '.'
    return f'{picture}[{text}]({posixpath.relpath(uri_of(target), start)}{anchor or ""})'

  return LINK.sub(changed, markdown.replace(LEAVES, leaves() if LEAVES in markdown else ''))


def leaves() -> str:
  """Returns the tables of a config's leaves, with the comments of configs/default.py."""
  text = (ROOT / 'configs' / 'default.py').read_text()
  lines, comments = text.splitlines(), {}
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type == tokenize.COMMENT:
      comments[token.start[0]] = token.string.lstrip('# ')
  whole = {number for number in comments if lines[number - 1].lstrip().startswith('#')}

  def said(number):
    """Returns the comment lines right above a line, and the one at its end."""
    above = number
    while above - 1 in whole:
      above -= 1
    return ' '.join(comments[n] for n in range(above, number + 1) if n in comments)

  rows, tables = [], []

  def walk(name, value, number):
    inner = value.args[0] if isinstance(value, ast.Call) and value.args else value
    own = lines[number - 1].lstrip().startswith((f'{name.rpartition(".")[2]}=', f'{name} ='))
    meaning = said(number).replace('|', '\\|').replace('<', '&lt;') if own else ''
    if not isinstance(inner, ast.Call):
      rows.append(f'| `{name}` | `{ast.unparse(inner)}` | {meaning} |')
      return
    if meaning and name.count('.') > 1:
      rows.append(f'| `{name}` | | {meaning} |')
    for keyword in inner.keywords:
      walk(f'{name}.{keyword.arg}', keyword.value, keyword.lineno)

  (function,) = (
    node
    for node in ast.parse(text).body
    if isinstance(node, ast.FunctionDef) and node.name == 'get_config'
  )
  for node in function.body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      name = ast.unparse(node.targets[0])
      walk(name, node.value, node.lineno)
      if isinstance(node.value, ast.Call):
        above = f'{said(node.lineno)}\n\n' if node.lineno - 1 in whole else ''
        tables.append(f'## {name}\n\n{above}' + _table(rows))
      elif name == 'config.seed':
        tables.append('## config\n\n' + _table(rows))
      else:
        continue
      rows.clear()
  return '\n'.join(tables)


def _table(rows: list[str]) -> str:
  return '\n'.join(['| leaf | default | meaning |', '|---|---|---|', *rows, ''])
