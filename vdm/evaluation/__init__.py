"""These modules measure a model, and show it."""

ORDER = (
  'study',
  'bound',
  'likelihood',
  'inference',
  'ode',
  'distances',
  'fields',
  'plots',
  'field_plots',
  'curve_plots',
  'grids',
  'field_report',
  'pictures',
  'evaluate',
  'separation',
  'likelihood_table',
  '__init__',
)
