"""What a run keeps in its folder, and how it is read."""

ORDER = (
  'released',
  'config_file',
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
