"""The machine: processes, devices, files, logs."""

ORDER = (
  'packages',
  'stopping',
  'files',
  'logs',
  'progress',
  'writers',
  'profile',
  'hosts',
  'parallel',
  'runners',
  '__init__',
)
