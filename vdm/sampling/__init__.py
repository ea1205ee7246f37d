"""Images of a model: drawn, stored, shown."""

ORDER = ('labels', 'draw', 'folder', 'picture', 'run', '__init__')
