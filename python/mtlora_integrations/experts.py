"""A layer's experts: parameters of the host, slices of one storage, one tensor [N, ...] for the operator."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Stacked(torch.autograd.Function):
    """The tensor [N, ...] over slices that lie in a row; backward hands each its slice of the gradient."""

    @staticmethod
    def forward(ctx, *slices: Tensor) -> Tensor:
        return _over(slices)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.unbind()


def _over(slices: Sequence[Tensor]) -> Tensor:
    first = slices[0]
    return first.as_strided((len(slices), *first.shape), (first.numel(), *first.stride()))


def weight_of(linear: nn.Module) -> Tensor:
    """linear.weight, at a third of the time: a call asks for one per expert."""
    weight = linear._parameters.get("weight")
    return linear.weight if weight is None else weight


def in_a_row(slices: Sequence[Tensor]) -> bool:
    """Whether the tensors are consecutive slices of one storage, so that one tensor can lie over them."""
    first = slices[0]
    count, strides, at = first.numel(), first.stride(), first.data_ptr()
    step, storage = count * first.element_size(), first.untyped_storage()
    # Two storages may be neighbours in memory; all must lie inside the first one's.
    if not first.is_contiguous() or at + len(slices) * step > storage.data_ptr() + storage.nbytes():
        return False
    for s in slices:
        if s.data_ptr() != at or s.stride() != strides or s.numel() != count:
            return False
        at += step
    return True


def stacked(experts: Sequence[Tensor]) -> Tensor:
    """[N, ...], without a copy if the experts lie in a row. Gradients reach the separate parameters.

    Under torch.compile, which cannot see addresses, and where the parameters were moved apart (a child module
    cast by itself, load_state_dict(assign=True), a sharded parameter) they are stacked.
    """
    if torch.compiler.is_compiling() or not in_a_row(experts):
        return torch.stack(list(experts))
    return _Stacked.apply(*experts) if torch.is_grad_enabled() else _over(experts)


@torch.no_grad()
def share(experts: Sequence[nn.Parameter]) -> int:
    """Move the parameters into one storage, one after the other. They stay the same objects with the same values;
    optimizers, names and loading in place do not notice. Returns the bytes; 0 where it cannot be done."""
    first = experts[0]
    alike = all(e.shape == first.shape and e.dtype == first.dtype and e.device == first.device for e in experts)
    # A subclass (a sharded or quantised parameter) has its data elsewhere; one parameter twice has one place.
    plain = alike and not first.is_meta and all(type(e.data) is Tensor for e in experts)
    if not plain or len(set(map(id, experts))) < len(experts):
        return 0
    if not in_a_row(experts):
        for expert, place in zip(experts, torch.stack(list(experts)), strict=True):
            expert.data = place
    return len(experts) * first.nbytes


@torch.no_grad()
def separate(experts: Sequence[nn.Parameter]) -> None:
    """Give each parameter a storage of its own again."""
    for expert in experts:
        if expert.untyped_storage().nbytes() > expert.numel() * expert.element_size():
            expert.data = expert.data.clone()
