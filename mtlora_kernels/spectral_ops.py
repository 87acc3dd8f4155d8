"""torch.library contracts of the spectral operators; what `ops.py` says of its own holds here.

Matrices arrive validated: tall for `batched_rsvd`, lora_b stacked to [L, N, d, r] for the others. Singular values and
vectors are constants of the penalty, as published, so only spectral_penalty_fwd has a derivative.
"""

import torch
from torch import Tensor

from .device import on_device
from .spectral_dispatch import batched_rsvd_kernel, spectral_kernels

_lib = torch.library.Library("mtlora_kernels", "FRAGMENT")
for _schema in (
    "batched_rsvd(Tensor matrices, int rank, int sketch, int power_iterations, int seed, str impl) "
    "-> (Tensor u, Tensor s, Tensor v)",
    "spectral_weights(Tensor lora_b, str kind, str impl) -> Tensor",
    "spectral_penalty_fwd(Tensor lora_b, Tensor weights, str kind, str impl) -> (Tensor loss, Tensor x, Tensor c)",
    "spectral_penalty_bwd(Tensor dloss, Tensor lora_b, Tensor weights, Tensor x, Tensor c, str kind, str impl) "
    "-> Tensor",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _batched_rsvd(matrices, rank, sketch, power_iterations, seed, impl):
    with on_device(matrices):
        factors = batched_rsvd_kernel(impl)(matrices, rank, sketch, power_iterations, seed)
    return tuple(factor.contiguous() for factor in factors)


def _batched_rsvd_fake(matrices, rank, sketch, power_iterations, seed, impl):
    batch, m, n = matrices.shape
    return tuple(
        matrices.new_empty(shape, dtype=torch.float32) for shape in ((batch, m, rank), (batch, rank), (batch, n, rank))
    )


def _spectral_weights(lora_b, kind, impl):
    with on_device(lora_b):
        return spectral_kernels(impl).spectral_weights(lora_b, kind).contiguous()


def _spectral_weights_fake(lora_b, kind, impl):
    layers, experts, _, rank = lora_b.shape
    return lora_b.new_empty((layers, experts, *(rank,) * (1 + (kind == "pairwise"))), dtype=torch.float32)


def _spectral_penalty_fwd(lora_b, weights, kind, impl):
    with on_device(lora_b):
        loss, x, c = spectral_kernels(impl).spectral_penalty_fwd(lora_b, weights, kind)
    return loss, x.contiguous(), c.contiguous()


def _spectral_penalty_fwd_fake(lora_b, weights, kind, impl):
    layers, experts, d, rank = lora_b.shape
    pairwise, width = kind == "pairwise", experts * rank
    return (
        lora_b.new_empty((), dtype=torch.float32),
        lora_b.new_empty((layers, d, width) if pairwise else 0),
        lora_b.new_empty((layers, width, width) if pairwise else (layers, experts, rank, rank), dtype=torch.float32),
    )


def _spectral_penalty_bwd(dloss, lora_b, weights, x, c, kind, impl):
    with on_device(lora_b):
        return spectral_kernels(impl).spectral_penalty_bwd(dloss, lora_b, weights, x, c, kind).contiguous()


def _spectral_penalty_bwd_fake(dloss, lora_b, weights, x, c, kind, impl):
    return lora_b.new_empty(lora_b.shape)


def setup_context(ctx, inputs, output) -> None:
    lora_b, weights, ctx.kind, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(lora_b, weights, *output[1:])


def gradients(ctx, dloss: Tensor | None, backward) -> tuple[Tensor | None, None, None, None]:
    """Of the inputs of spectral_penalty_fwd; backward is the operator spectral_penalty_bwd or its function."""
    grad = None if dloss is None else backward(dloss, *ctx.saved_tensors, ctx.kind, ctx.impl)
    return grad, None, None, None


def _autograd_backward(ctx, dloss: Tensor | None, _dx, _dc):
    return gradients(ctx, dloss, operator("spectral_penalty_bwd"))


def operator(name: str):
    return getattr(torch.ops.mtlora_kernels, name).default


def _no_derivative(name: str, what: str):
    def backward(ctx, *grads):
        raise RuntimeError(f"{name} has no {what}derivative: its results are constants of the loss, detach its input")

    return backward


# What the operators run, for callers that have no use for the dispatcher.
RUN = {
    "batched_rsvd": _batched_rsvd,
    "spectral_weights": _spectral_weights,
    "spectral_penalty_fwd": _spectral_penalty_fwd,
    "spectral_penalty_bwd": _spectral_penalty_bwd,
}
for _name, _fake, _backward in (
    ("batched_rsvd", _batched_rsvd_fake, _no_derivative("batched_rsvd", "")),
    ("spectral_weights", _spectral_weights_fake, _no_derivative("spectral_weights", "")),
    ("spectral_penalty_fwd", _spectral_penalty_fwd_fake, _autograd_backward),
    (
        "spectral_penalty_bwd",
        _spectral_penalty_bwd_fake,
        _no_derivative("spectral_penalty", "second "),
    ),
):
    _lib.impl(_name, RUN[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"mtlora_kernels::{_name}", _fake, lib=_lib)
    _setup = {"setup_context": setup_context} if _name == "spectral_penalty_fwd" else {}
    torch.library.register_autograd(f"mtlora_kernels::{_name}", _backward, lib=_lib, **_setup)
