"""One file per experiment: `default.py` explains every leaf, the others state what differs."""
