"""What is measured and shown of a model."""

ORDER = ('study', 'bound', 'ode', 'distances', 'plots', 'pictures', 'evaluate', '__init__')
