"""Measures an accelerator in minutes: `python -m benchmarks.accelerator --help`."""
