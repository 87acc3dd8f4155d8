"""One set of spectral kernels, a module of `mtlora_kernels.native`, against the reference on the tensors' device."""

from types import ModuleType

import torch

from mtlora_kernels.reference import rsvd, spectral
from mtlora_kernels.testing import assert_bitwise_equal


def check_rsvd(kernels: ModuleType, a: torch.Tensor, *settings: int) -> None:
    """settings: rank, sketch, power iterations."""
    results = zip(kernels.batched_rsvd(a, *settings, 7), rsvd.batched_rsvd(a, *settings, 7), strict=True)
    for name, (actual, expected) in zip("usv", results, strict=True):
        assert_bitwise_equal(actual, expected, name)


def check_penalty(kernels: ModuleType, lora_b: torch.Tensor, kind: str) -> None:
    weights = spectral.spectral_weights(lora_b, kind)
    assert_bitwise_equal(kernels.spectral_weights(lora_b, kind), weights, "weights")
    expected = spectral.spectral_penalty_fwd(lora_b, weights, kind)
    actual = kernels.spectral_penalty_fwd(lora_b, weights, kind)
    for name, a, e in zip(("loss", "x", "c"), actual, expected, strict=True):
        assert_bitwise_equal(a, e, name)
    saved = (torch.tensor(1.7, device=lora_b.device), lora_b, weights, *expected[1:], kind)
    assert_bitwise_equal(kernels.spectral_penalty_bwd(*saved), spectral.spectral_penalty_bwd(*saved), "gradient")
