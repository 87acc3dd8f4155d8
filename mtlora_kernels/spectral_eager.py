"""The spectral operators in eager mode; see `eager.py`."""

import torch
from torch import Tensor

from . import spectral_ops
from .eager import nobody_listens


def _run(name: str, *inputs):
    """Below autograd: the caller records, or nothing does."""
    tensors = tuple(value for value in inputs if isinstance(value, Tensor))
    if nobody_listens(tensors, tensors[0]):
        return spectral_ops.RUN[name](*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return spectral_ops.operator(name)(*inputs)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _run("spectral_penalty_fwd", *inputs)
        spectral_ops.setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():  # create_graph: the operator's registration refuses the second derivative
            return spectral_ops.gradients(ctx, dloss, spectral_ops.operator("spectral_penalty_bwd"))
        return spectral_ops.gradients(ctx, dloss, lambda *inputs: _run("spectral_penalty_bwd", *inputs))


_apply = super(torch.autograd.Function, _Penalty).apply  # see eager.py


def weights(lora_b: Tensor, kind: str, impl: str) -> Tensor:
    """The operator spectral_weights of a tensor that needs no gradient."""
    if torch.compiler.is_compiling():
        return spectral_ops.operator("spectral_weights")(lora_b, kind, impl)
    return _run("spectral_weights", lora_b, kind, impl)


def penalty(lora_b: Tensor, held: Tensor, kind: str, impl: str) -> Tensor:
    """The loss of the operator spectral_penalty_fwd, differentiable by lora_b."""
    if torch.compiler.is_compiling():
        return spectral_ops.operator("spectral_penalty_fwd")(lora_b, held, kind, impl)[0]
    if torch.is_grad_enabled() and lora_b.requires_grad:
        return (_Penalty.apply if torch._C._are_functorch_transforms_active() else _apply)(lora_b, held, kind, impl)
    return _run("spectral_penalty_fwd", lora_b, held, kind, impl)[0]
