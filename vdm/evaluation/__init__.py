"""What is measured and shown of a model."""

ORDER = ('bound', 'ode', 'distances', 'pictures', 'plots', 'evaluate', '__init__')
