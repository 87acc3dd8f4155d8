"""A block's input, saved before the block runs instead of by the adapter after it.

A checkpoint that is not reentrant reruns its region up to the last tensor that backward asks for. An adapter that adds
to a block's output saves after the block, and makes it rerun the block's last layer, whose own saved tensors need no
rerun of that layer, and itself: most of what adapters add to a checkpointed step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .beside import mark_input

PLAIN = (Tensor, nn.Parameter)
SMALLER = 8  # than x: h and pi are held past the checkpoint, which is there to save memory, only where they are small


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.lent = False  # to one call at the most: a checkpoint gives a saved tensor once per backward
        return x.detach()  # the same memory, but no view to autograd: the block may still change it in place

    @staticmethod
    def backward(ctx, grad):
        return grad


def keep(x: object) -> object:
    """x for the block and for a call of `routed_lora` on it, which need not save it again."""
    if not isinstance(x, Tensor) or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    # Not the same x either: the gradients of the block and its adapters add up in the same order, with the same bits.
    apart = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return x.view_as(x) if apart or type(x) not in PLAIN else _Keep.apply(x)


def keep_input(block: nn.Module) -> RemovableHandle:
    """Let block save its input for an adapter on it, which then saves nothing after it: a checkpoint that is not
    reentrant reruns neither it nor the block's last layer. `add_block_adapter` does it. In a CUDA graph without
    gradients, an adapter that is a child of block then runs beside it (`mark_input`).

    The input comes first or as hidden_states=. The first `routed_lora` on it that holds little makes use of this, any
    other saves as usual. Compiled autograd after an eager forward does not know of it: backward raises and says so.
    Removing the handle that is returned undoes it.
    """
    return block.register_forward_pre_hook(_keep_input, with_kwargs=True)


def _keep_input(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if args:
        return (mark_input(keep(args[0]), block), *args[1:]), kwargs
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": mark_input(keep(kwargs["hidden_states"]), block)}
    return None


def keeper_of(x: Tensor) -> object | None:
    """The autograd node that saved x, if `keep` made x."""
    node = x.grad_fn
    return node if type(node) is _Keep._backward_cls else None


class Kept:
    """What `autograd.needed` names: x from its keeper, the rest held here; no tensor is saved after the block."""

    def __init__(self, keeper: object, tensors: tuple[Tensor | None, ...]) -> None:
        keeper.lent = True
        self.keeper, (_, *self.rest) = keeper, tensors
        self.versions = [t if t is None else t._version for t in self.rest]

    @staticmethod
    def serves(keeper: object | None, tensors: tuple[Tensor | None, ...]) -> bool:
        """Parameters and views of them take no memory; what was computed from them is for autograd to hold."""
        if keeper is None or keeper.lent:
            return False
        x, a, b, router, h, pi, scale, _ = tensors
        weights = [w for w in (a, b, router, scale) if w is not None]
        small = (h.numel() + pi.numel()) * SMALLER <= x.numel()
        return small and all(w.is_leaf or (w._is_view() and w._base.is_leaf) for w in weights)

    def __call__(self) -> tuple[Tensor | None, ...]:
        if self.rest is None:
            raise RuntimeError("backward of routed_lora a second time, the first must have had retain_graph=True")
        try:
            (x,), rest = self.keeper.saved_tensors, self.rest
        except RuntimeError as error:
            raise RuntimeError(
                "backward of routed_lora cannot read the input that keep_input saved, as compiled autograd after an "
                f"eager forward never can: {error}"
            ) from error
        if self.versions != [t if t is None else t._version for t in rest]:
            raise RuntimeError(
                "lora_a, lora_b, router, expert_scale or dropout_seed, which backward needs, was changed in place"
            )
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.rest = None  # as autograd frees what it saved, though the graph may live on
        return x.reshape(-1, x.shape[-1]), *rest
