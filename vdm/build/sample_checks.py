"""Refuses what a model cannot draw, before anything is compiled or written; needs no device."""

from ml_collections import ConfigDict

from vdm.build.conditioning import Takes
from vdm.build.factories import other_schedule, sampler, threshold
from vdm.diffusion.gaussian import Schedule, is_multivariate
from vdm.errors import require


def check_sampling(sample: ConfigDict, own: Schedule, takes: Takes):
  """Refuses a sampler, grid, guidance or condition of config.sample that a model cannot follow.

  Args:
    sample: config.sample.
    own: the model's schedule, concrete.
    takes: which conditions the model takes, and whether it learned their lack.
  """
  sampler(sample.sampler)
  threshold(sample.threshold)
  other_schedule(sample.grid, 'sample.grid', own)
  require(
    not sample.denoise_last or sample.num_steps > 1,
    'config.sample.num_steps',
    sample.num_steps,
    '2 or more with config.sample.denoise_last=True',
    'the last step only denoises',
  )
  churn = sample.sampler.s_churn if 's_churn' in sample.sampler else 0.0
  require(
    not (churn > 0 and is_multivariate(own)),
    'config.sample.sampler.s_churn',
    churn,
    '0 under a multivariate schedule, whose path it leaves',
    'ancestral and dpmpp_2m_sde add noise along the path',
  )
  guidance = sample.guidance
  told = ' and '.join(takes.names)
  whose = f'that was told its {told} of all examples' if told else 'that is told no condition'
  require(
    guidance.log_snr_min < guidance.log_snr_max,
    'config.sample.guidance.log_snr_min',
    guidance.log_snr_min,
    f'below config.sample.guidance.log_snr_max={guidance.log_snr_max}',
    'swap them',
  )
  require(
    guidance.kind != 'classifier_free' or takes.lack_learned,
    'config.sample.guidance.kind',
    guidance.kind,
    f"'none' or 'auto' for a model {whose}",
    'train with config.train.label_dropout=0.1'
    + ('' if told else ' and classes (config.model.class_conditional=True), vectors or fields'),
  )
  require(
    guidance.kind != 'auto' or guidance.checkpoint != '',
    'config.sample.guidance.checkpoint',
    guidance.checkpoint,
    'the workdir of the guiding run',
    'train a smaller or shorter run and name its --workdir',
  )
  require(
    guidance.kind != 'none' or guidance.weight == 1,
    'config.sample.guidance.weight',
    guidance.weight,
    "1 with config.sample.guidance.kind='none', which guides by nothing",
    "choose the kind 'classifier_free' or 'auto'",
  )
  require(
    sample.label == -1 or takes.num_classes > 0,
    'config.sample.label',
    sample.label,
    '-1 for a model that is told no class',
    'train with config.model.class_conditional=True',
  )
  require(
    sample.embeddings == '' or takes.vector_size > 0,
    'config.sample.embeddings',
    sample.embeddings,
    "'' for a model that is told no vector",
    'train with config.data.embedding_size',
  )
