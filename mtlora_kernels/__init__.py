"""Fused kernels for mixture-of-LoRA-experts adapters (mtLoRA, arXiv 2603.01526)."""

from . import analysis, nn, testing
from .dispatch import available_impls
from .functional import balance_loss, routed_lora
from .spectral import SpectralWeights, batched_rsvd, spectral_penalty
from .spectral_dispatch import available_spectral_impls

__version__ = "0.1.0"
__all__ = [
    "SpectralWeights", "analysis", "available_impls", "available_spectral_impls", "balance_loss", "batched_rsvd", "nn",
    "routed_lora", "spectral_penalty", "testing",
]  # fmt: skip
