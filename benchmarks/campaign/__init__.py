"""Breaks runs on purpose, and says what was lost: `python -m benchmarks.campaign --help`."""
