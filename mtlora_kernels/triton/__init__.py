"""Triton backend: the portable GPU path, and the interpreter on a CPU for tests."""
