"""Converts Inception's weights, makes reference statistics, scores images.

  python -m vdm.fid convert FILE [OUT.npz]           Inception's weights, once: .pth or .pb -> ours
  python -m vdm.fid stats OUT.npz --config=FILE      statistics of the whole training split
  python -m vdm.fid stats OUT.npz IMAGES             or of a folder or NPZ of images
  python -m vdm.fid score IMAGES REFERENCE           metrics of IMAGES, as JSON

IMAGES is a folder of PNG files, an NPZ file with uint8 [N, H, W, C] as arr_0 or images, or a folder
of such files. REFERENCE is a file of `stats`, one of ADM's or EDM's, or images. Without --config it
is Inception on 8-bit images; any leaf can be overridden, --config.fid.num_images=10000.
"""

import pathlib
import sys

import jax
from absl import app, flags, logging

from vdm import cards, cli, data
from vdm.fid import extractor as extractors
from vdm.fid import images, metrics, references, streaming, weights
from vdm.system import files, logs, parallel

_ALLOW_UNKNOWN = flags.DEFINE_bool('allow_unknown', False, 'convert: take weights of any sha256.')
_SPLIT = flags.DEFINE_enum('split', 'train', ['train', 'eval'], 'stats: of config.data.')
_DEFAULTS = (
  '--config=configs/default.py',
  '--config.data.num_values=256',
  '--config.fid.features=inception',
)


def convert(settings, data_settings, path: str, out: str = '') -> str:
  """Converts weights as `weights.convert` does."""
  del settings, data_settings
  return weights.convert(path, out, _ALLOW_UNKNOWN.value)


def stats(settings, data_settings, out: str, path: str = '') -> str:
  """Writes the statistics of the split that the config names, or of the images in `path`."""
  if not out.endswith('.npz'):
    raise ValueError(f'{out} must end in .npz; stats takes OUT.npz, then IMAGES or --config=FILE.')
  source = images.load(path) if path else data.load(data_settings, _SPLIT.value)
  extractor = _extractor(settings, data_settings, source)
  streaming.check_count(settings, len(source), extractor)
  reference = references.of_source(source, extractor, settings.batch_size)
  references.write(pathlib.Path(out), reference)
  return f'wrote {out}: {reference.facts["num_images"]} images, {extractor.name}'


def score(settings, data_settings, path: str, reference_path: str) -> str:
  """Returns all metrics of the images in `path`, as JSON."""
  source = images.load(path)
  wanted = settings.num_images or len(source)
  if len(source) < wanted:
    raise ValueError(
      f'config.fid.num_images={wanted} must be at most the {len(source)} images of {path}; '
      f'draw more, or say --config.fid.num_images={len(source)}: that is another number.'
    )
  extractor = _extractor(settings, data_settings, source)
  streaming.check_count(settings, wanted, extractor)
  reference = references.read(reference_path, extractor, settings.batch_size)
  streaming.check_reference(settings, reference_path, reference.facts['num_images'], extractor)
  batches = data.eval_batches(
    source,
    batch_size=extractor.batch_size(settings.batch_size),
    max_images=wanted,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  samples = streaming.collect(extractor, batches, wanted)
  found = metrics.measure(samples, reference, extractor.label, settings.halves)
  if cli.OUT.value:
    for name, estimate in found.items():
      facts = metrics.card_fields(name, estimate, extractor, reference)
      facts |= {'samples': source.identity}
      made_of = {k: facts[k] for k in ('num_samples', 'extractor_sha256', 'reference', 'samples')}
      file = f'{name}_{wanted}_{files.short_hash(made_of)}.json'  # no other number's
      cards.write(files.path_of(cli.OUT.value) / file, facts)
  return files.json_text(found).rstrip()


def _extractor(settings, data_settings, source: data.Source) -> extractors.Extractor:
  return extractors.make(
    settings, data_settings, parallel.make_mesh(), source.identity['image_shape']
  )


COMMANDS = {'convert': (convert, 1, 2), 'stats': (stats, 1, 2), 'score': (score, 2, 2)}


def parse_flags(argv):
  """Parses the flags of all commands; without --config it is Inception on 8-bit images."""
  if not any(arg.startswith(('--config=', '-config=')) or arg == '--config' for arg in argv):
    sys.argv[1:1] = _DEFAULTS  # where ml_collections looks for overrides
    argv = sys.argv
  return cli.parse_flags(argv)


def _main(argv):
  logs.set_up_logging()
  name, arguments = (argv[1], argv[2:]) if len(argv) > 1 else ('', [])
  command, least, most = COMMANDS[name] if name in COMMANDS else (None, 0, 0)
  if command is None or not least <= len(arguments) <= most:
    sys.exit(__doc__.strip())

  def run(config, workdir):
    del workdir
    text = command(config.fid, config.data, *arguments)
    if jax.process_index() == 0:
      print(text)
    logging.flush()
    return 0

  cli.in_one_line(run, works_on=lambda *_: True)  # it fills batches up


if __name__ == '__main__':
  app.run(_main, flags_parser=parse_flags)
