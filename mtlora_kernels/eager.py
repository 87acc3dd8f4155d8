"""The operators in eager mode: an autograd Function of their own, and no dispatcher where nobody listens to it.

For operators written in Python, torch.library's autograd more than doubles the host time of a call, and the dispatcher
is a fifth of the rest (figures in triton/README.md). Compilers, tracers, profilers, dispatch modes and tensor
subclasses get the operators.
"""

import torch
from torch import Tensor

from . import autograd, beside, ops
from .kept import PLAIN, Kept, keeper_of

_forward_op = torch.ops.mtlora_kernels.routed_lora_fwd.default
_backward_op = torch.ops.mtlora_kernels.routed_lora_bwd.default
_PLAIN = (*PLAIN, type(None))


def nobody_listens(tensors: tuple[Tensor | None, ...], x: Tensor) -> bool:
    return (
        (x.is_cuda or x.is_cpu)
        and all([type(t) in _PLAIN for t in tensors])
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._get_tracing_state()
        and not torch.autograd._profiler_enabled()
    )


def _forward(*inputs):
    """Below autograd: the caller records, or nothing does."""
    if nobody_listens(inputs[:8], inputs[0]):
        return ops.run_forward(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*inputs)


def _backward(*inputs):
    if not torch.is_grad_enabled() and nobody_listens(inputs[:10], inputs[2]):
        return ops.run_backward(*inputs)
    return _backward_op(*inputs)  # with create_graph its registration refuses the second derivative


class _RoutedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # of the operator, and the node of a kept x or None
        *inputs, keeper = inputs
        output = _forward(*inputs)
        tensors = autograd.needed(inputs, output)
        if Kept.serves(keeper, tensors):
            ctx.saved = Kept(keeper, tensors)
        else:
            ctx.saved = None
            ctx.save_for_backward(*tensors)
        autograd.remember_rest(ctx, inputs, output[0])
        return output[:2]

    @staticmethod
    def backward(ctx, dout, dload):
        return *autograd.gradients(ctx, dout, dload, _backward, ctx.saved or (lambda: ctx.saved_tensors)), None


# Function.apply is this after a look at every argument for what a functorch transform may have left: 15 % of a call.
_apply = super(torch.autograd.Function, _RoutedLora).apply


def routed_lora(given: Tensor, *inputs) -> tuple[Tensor, Tensor | None]:
    """(out, load) of the operator routed_lora_fwd, differentiable; what load is without return_load is left open.
    given is x before it was flattened to tokens."""
    if torch.compiler.is_compiling():
        return _forward_op(*inputs)[:2]
    if not torch.is_grad_enabled():
        if beside.serves(given, inputs) and nobody_listens(inputs[:8], inputs[0]):
            return beside.routed_lora(given, inputs), None
        return _forward(*inputs)[:2]
    return (_RoutedLora.apply if torch._C._are_functorch_transforms_active() else _apply)(*inputs, keeper_of(given))
