"""Callers of the compiled module `_C`: they allocate outputs, pass pointers and sizes, and launch."""
