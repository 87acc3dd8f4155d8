"""A loss term whose gradient travels with a layer's output."""

import torch
from torch import Tensor


class _AddToLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, term: Tensor) -> Tensor:
        ctx.dtype = term.dtype
        ctx.mark_dirty(out)  # otherwise autograd returns a view, which the model may not change in place
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.dtype)


def add_to_loss(out: Tensor, term: Tensor) -> Tensor:
    """out, unchanged; backward acts as if the scalar term had been added to the loss.

    A term kept on the module for the trainer to collect has no gradient under reentrant checkpointing and
    cannot leave a compiled checkpoint; backward finds this one wherever the forward ran. out must be an
    intermediate result, which is given back as the same tensor.
    """
    return _AddToLoss.apply(out, term)
