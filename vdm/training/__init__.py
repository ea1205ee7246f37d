"""The train step and the loop around it."""

ORDER = ('step', 'tags', 'meter', 'loop', '__init__')
