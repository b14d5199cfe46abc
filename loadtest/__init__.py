"""Fleets of simulated devices, and what they measure. `python -m loadtest.bench --help`."""
