"""The papers as pure functions of arrays, without jit, config, files or log."""

ORDER = (
  'gaussian',
  'heads',
  'times',
  'schedules',
  'multivariate',
  'adaptive',
  'weightings',
  'averages',
  'decoders',
  'continuous',
  'elbo',
  'noisy_elbo',
  'ode',
  'guidance',
  'samplers',
  '__init__',
)
