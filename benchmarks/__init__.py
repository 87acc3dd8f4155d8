"""Benchmarks of mtlora_kernels: `python -m benchmarks adapter | accuracy | kernels | train | plot`."""
