"""One file per experiment; `default.py` is complete and commented, the others state what differs."""
