"""The specification: plain PyTorch, every rounding and every order explicit. Imports torch only."""
