"""The machine: processes, devices, files, logs."""

ORDER = (
  'packages',
  'stopping',
  'files',
  'logs',
  'writers',
  'profile',
  'hosts',
  'parallel',
  'runners',
  '__init__',
)
