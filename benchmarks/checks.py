"""The gate in front of every time: routed_lora must equal its reference bit for bit on the same inputs."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .registry import Contender, routed_lora
from .shapes import Inputs, Shape, make_inputs

# On a CPU the reference walks every dot product one k at a time; 64 tokens of it take seconds, 1024 minutes.
CPU_CHECK_TOKENS = 64
RESULT_NAMES = ("out", "d(x)", "d(lora_a)", "d(lora_b)", "d(router)", "d(residual)")


def mismatches(contender: Contender, shape: Shape, device: torch.device) -> list[str]:
    """Results of a routed_lora contender that differ from impl="reference", with the largest difference."""
    if device.type == "cpu":
        shape = replace(shape, tokens=min(shape.tokens, CPU_CHECK_TOKENS))
    inputs = make_inputs(shape, device, seed=1)
    expected = _reference_results(shape, device, contender.numerics)
    results = _results(contender, shape, inputs)
    return [
        f"{name} (largest difference {(ours.float() - theirs.float()).abs().max():.3g})"
        for name, ours, theirs in zip(RESULT_NAMES, results, expected, strict=False)
        if not torch.equal(ours, theirs)
    ]


@cache
def _reference_results(shape: Shape, device: torch.device, numerics: str) -> tuple[Tensor, ...]:
    return _results(routed_lora("reference", numerics), shape, make_inputs(shape, device, seed=1))


def _results(contender: Contender, shape: Shape, inputs: Inputs) -> tuple[Tensor, ...]:
    return contender.forward_backward(inputs) if shape.backward else (contender.forward(inputs),)


def forget_reference() -> None:
    """Free the cached reference results, which are large on a GPU."""
    _reference_results.cache_clear()
