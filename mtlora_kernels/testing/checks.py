"""One input, one question: an implementation against the reference, float64, a published layer or itself."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ..functional import routed_lora
from ..reference.cublas import one_accumulator
from .compare import differences
from .inputs import Inputs, with_layout
from .oracle import float64_results, published_layer


def run_case(impl: str | None, inputs: Inputs) -> dict[str, Tensor]:
    """out, load and the gradient of every tensor argument, named out, load, dx, dlora_a, ..."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.arguments().items()}
    outputs = routed_lora(**leaves, **inputs.options, impl=impl)
    upstream = (inputs.dout, inputs.dload)
    if isinstance(outputs, Tensor):
        outputs, upstream = (outputs,), upstream[:1]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    results = {name: t.detach() for name, t in zip(("out", "load"), outputs, strict=False)}
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def against_reference(impl: str, inputs: Inputs) -> list[str]:
    """Every bit of the reference on the same device."""
    return differences(run_case(impl, inputs), run_case("reference", inputs))


def against_float64(impl: str, inputs: Inputs) -> list[str]:
    """For lattice inputs: the exact answer."""
    return differences(run_case(impl, inputs), float64_results(inputs), cast=True)


def against_published(impl: str, inputs: Inputs, *, gradients: bool = True) -> list[str]:
    """numerics="eager" against the published layer; on CUDA under the reference's cuBLAS settings."""
    with one_accumulator() if inputs.x.is_cuda else nullcontext():
        expected = published_layer(inputs)
    expected = expected if gradients else {"out": expected["out"]}
    return differences(run_case(impl, inputs), expected, cast=True)


def repeated(results: Callable[[str, object], dict[str, Tensor]], impl: str, inputs: object) -> list[str]:
    """Three runs give the same bits."""
    first = results(impl, inputs)
    return [message for _ in range(2) for message in differences(results(impl, inputs), first)]


def batch_invariance(impl: str, inputs: Inputs, *, sizes: Sequence[int]) -> list[str]:
    """A token's out and dx do not depend on how many tokens share its call."""
    messages, first = [], None
    for size in sizes:
        part = replace(inputs, x=inputs.x[:size], residual=inputs.residual[:size], dout=inputs.dout[:size])
        results = run_case(impl, part)
        row = {name: results[name][0] for name in ("out", "dx")}
        first = first or row
        messages += [f"T = {size}: {message}" for message in differences(row, first)]
    return messages


def strided(impl: str, inputs: Inputs, *, layout: str) -> list[str]:
    """Inputs and dout in another memory layout give the bits of contiguous ones."""
    moved = inputs.map(lambda t: with_layout(t, layout))
    return differences(run_case(impl, moved), run_case("reference", moved.map(Tensor.contiguous)))
