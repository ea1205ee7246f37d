"""Keeps a run in its folder, and reads it."""

ORDER = (
  'released',
  'config_file',
  'data_file',
  'lock',
  'layouts',
  'integrity',
  'checkpoint',
  'load',
  'release',
  'posthoc_ema',
  'import_public',
  '__init__',
)
