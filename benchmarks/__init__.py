"""Benchmarks of mtlora_kernels: `python -m benchmarks adapter | train | plot`."""
