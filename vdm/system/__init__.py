"""The machine: processes, devices, files, logs."""

ORDER = (
  'packages',
  'files',
  'logs',
  'writers',
  'profile',
  'hosts',
  'parallel',
  'runners',
  '__init__',
)
