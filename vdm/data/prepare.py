"""Looks at data sets, and converts prepared TFDS data sets."""

from vdm.data.load import KINDS, load
from vdm.data.settle import FOUND, STATISTICS, settle
from vdm.data.tfds import builder_of, has_array_record, require_features
from vdm.errors import confirm
from vdm.system.packages import require_tensorflow


def convert(name: str, data_dir: str = '') -> str:
  """Writes ArrayRecord shards beside the TFRecord shards of a prepared data set.

  The serialized examples are copied as they are, in order, shard by shard: nothing is decoded. A
  shard gets its name when it is complete, and dataset_info.json is replaced last, so a conversion
  that was killed leaves the set as it was, and the next one goes on from the finished shards.

  Args:
    name: TFDS name, e.g. 'imagenet_resized/64x64'.
    data_dir: as config.data.dir.

  Returns:
    A sentence that says what was done.
  """
  from rich.progress import Progress
  from tensorflow_datasets.core import dataset_info, file_adapters

  builder = builder_of(name, data_dir, '--name', '--data_dir')
  info, again = builder.info, 'copy or prepare the data set again'
  if has_array_record(info):
    return f'{info.full_name} is in ArrayRecord already: {builder.data_path}'
  require_tensorflow(f'--name={name!r}: reading TFRecord files')
  reader = file_adapters.ADAPTER_FOR_FORMAT[info.file_format]
  writer = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.ARRAY_RECORD]
  with Progress() as progress:
    for split in info.splits.values():
      task = progress.add_task(split.name, total=split.num_examples)
      sources = split.filename_template.sharded_filepaths(split.num_shards)
      template = split.filename_template.replace(filetype_suffix='array_record')
      targets = template.sharded_filepaths(split.num_shards)
      for source, target, length in zip(sources, targets, split.shard_lengths, strict=True):
        if target.exists():
          progress.advance(task, length)
          continue
        confirm(source.exists(), '--name', name, f'lacks {source}', again)
        incomplete = target.parent / f'incomplete.{target.name}'
        examples = reader.make_tf_data(source).as_numpy_iterator()
        writer.write_examples(incomplete, progress.track(enumerate(examples), task_id=task))
        count = writer.num_examples(incomplete)
        if count != length:
          incomplete.unlink()
        fact = f'has {count} examples in {source}, but dataset_info.json says {length}'
        confirm(count == length, '--name', name, fact, again)
        incomplete.replace(target)
  info.add_alternative_file_format('array_record')
  path = dataset_info.dataset_info_path(builder.data_path)
  incomplete = path.parent / f'incomplete.{path.name}'
  incomplete.write_text(dataset_info.get_dataset_info_json(info.as_proto))
  incomplete.replace(path)
  return f'{info.full_name} is in ArrayRecord now, beside the old files: {builder.data_path}'


def show(
  name: str, data_dir: str = '', path: str = '', image_shape: tuple[int, ...] | None = None
) -> str:
  """Returns the lines of config.data for a data set; of a TFDS set the choice of splits is a guess.

  Args:
    name: a kind of data, or the name of a TFDS set.
    data_dir: as config.data.dir.
    path: as config.data.path.
    image_shape: as config.data.image_shape, to which pictures of any size are scaled and cropped;
      for `gaussian_field` what it is.

  Raises:
    ValueError: the data set is not one that `load` takes.
  """
  from vdm.configs import default

  data = default.get_config().data.unlock()
  data.update(name=name, dir=data_dir, path=path, as_found=True)
  if image_shape:
    sizes_vary = name in ('folder', 'huggingface') or name not in KINDS
    data.update(image_shape=image_shape, resize=sizes_vary)
  if name not in KINDS:
    info = builder_of(name, data_dir, '--name', '--data_dir').info
    require_features(info, data, conditions=False)
    splits = list(info.splits)
    data.train_split = 'train' if 'train' in splits else splits[0]
    data.eval_split = next((s for s in ('test', 'validation') if s in splits), data.train_split)
  settled = settle(data, continuous=False)
  if not settled.num_values:
    settled = settle(settled.copy_and_resolve_references(), continuous=True)
  for split in ('train', 'eval'):
    load(settled, split)  # what it refuses is not printed
  chosen = ('name', 'path', 'dir', 'train_split', 'eval_split', 'resize')
  blank = default.get_config().data
  lines = {leaf: settled[leaf] for leaf in (*chosen, *FOUND)}
  for leaf in (leaf for pair in STATISTICS.values() for leaf in pair):
    lines |= {leaf: settled[leaf]} if settled[leaf] != blank[leaf] else {}
  return '\n'.join(f'config.data.{leaf} = {value!r}' for leaf, value in lines.items())
