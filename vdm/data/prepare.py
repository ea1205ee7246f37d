"""Looks at and converts prepared TFDS data sets."""

from vdm.data.load import load
from vdm.data.tfds import builder_of, has_array_record, open_records, require_features
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


def show(name: str, data_dir: str = '') -> str:
  """Returns the lines of config.data for a prepared data set; the choice of splits is a guess.

  Raises ValueError if the data set is not one that `load` takes.
  """
  from vdm.configs import default

  builder = builder_of(name, data_dir, '--name', '--data_dir')
  info = builder.info
  counts = {split: part.num_examples for split, part in info.splits.items()}
  train = 'train' if 'train' in counts else next(iter(counts))
  evaluate = next((split for split in ('test', 'validation') if split in counts), train)
  config = default.get_config().data.unlock()
  config.update(name=name, num_classes=0)
  require_features(info, config)
  records, image_of = open_records(builder, train, '--name')
  label = info.features['label'] if 'label' in info.features else None
  one_class = label is not None and label.shape == ()
  first = [image_of(records[i], i) for i in range(min(64, len(records)))]
  high = max(int(image.max()) for image in first)
  lines = {
    'name': name,
    'dir': data_dir,
    'train_split': train,
    'eval_split': evaluate,
    'train_images': counts[train],
    'eval_images': counts[evaluate],
    'image_shape': first[0].shape,
    'num_values': 256 if high > 127 else max(2, high + 1),
    'resize': len({image.shape for image in first}) > 1,
    'num_classes': (one_class and getattr(label, 'num_classes', None)) or 0,
  }
  config.update(lines)
  for split in ('train', 'eval'):
    load(config, split)  # what it refuses is not printed
  head = f'# {info.full_name}: {", ".join(f"{split} {n}" for split, n in counts.items())}'
  return '\n'.join([head, *(f'config.data.{field} = {value!r}' for field, value in lines.items())])
