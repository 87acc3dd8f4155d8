"""Adapters from host libraries to `mtlora_kernels`, one module per host."""
