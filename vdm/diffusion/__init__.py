"""The papers: pure functions of arrays. No jit, config, files or log in here."""

ORDER = (
  'gaussian',
  'heads',
  'times',
  'schedules',
  'adaptive',
  'weightings',
  'averages',
  'decoders',
  'elbo',
  'noisy_elbo',
  'ode',
  'guidance',
  'samplers',
  '__init__',
)
