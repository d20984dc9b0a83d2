"""Benchmarks: pytest-benchmark suites, scaling runs, peers and a regression check."""
