"""Benchmarks of velopath, each beside the baseline that a sceptic would choose: `python -m benchmarks --help`."""
