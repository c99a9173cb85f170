"""Benchmarks: each prints ratios measured in one run, with the machine and the versions."""
