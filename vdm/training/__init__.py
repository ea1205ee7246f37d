"""The train step and the loop around it."""

ORDER = ('step', 'meter', 'loop', '__init__')
