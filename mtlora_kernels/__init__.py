"""Fused kernels for mixture-of-LoRA-experts adapters (mtLoRA, arXiv 2603.01526)."""

from . import nn, testing
from .dispatch import available_impls
from .functional import balance_loss, routed_lora

__version__ = "0.1.0"
__all__ = ["available_impls", "balance_loss", "nn", "routed_lora", "testing"]
