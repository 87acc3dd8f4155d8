"""In a CUDA graph a block adapter's mixture runs beside its block instead of after it.

The mixture needs the block's input and the adapter's parameters. Under capture without gradients a mark in the stream
says since when these are there, and the adapter's call, which comes after the block, lets its kernels wait for the mark
only, on a stream of their own; one addition to the block's output is left for after the block. A graph has edges and no
order of launches, so the one call forks and joins: no stream is left apart, whatever the block does. Eager kernels,
launched after those of the block, would start after them.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from . import ops
from .dispatch import load_module

IMPL = "cuda"  # the kernels that can leave the sum in fp32
DTYPE, RANK, OUTPUTS = torch.bfloat16, 16, 32  # of a group in whole runs: the calls whose bits a GPU has shown
MOST_TOKENS = 16  # decoding LLaMA-2-7B gains up to here, for 32 no more (csrc/cuda/README.md)
MARK = "mtlora_kernels_mark"


class Mark:
    """Since when a block's input and its parameters are there, and in which state they were."""

    def __init__(self, x: Tensor, block: nn.Module) -> None:
        self.event = torch.cuda.current_stream(x.device).record_event()
        there = (_owner(x), *block.parameters())
        self.states = {t: _state(t) for t in there if type(t) in (Tensor, nn.Parameter) and not t.is_inference()}

    def covers(self, tensors: Iterable[Tensor]) -> bool:
        """Whether each is one of them, or a view of one, and all are in that state: a view may lie over several, as
        that of experts which share a storage."""
        unchanged = all(_state(t) == state for t, state in self.states.items())
        return unchanged and all(_owner(t) in self.states for t in tensors)

    def __reduce__(self) -> tuple:
        return type(None), ()  # what a block keeps of its input is copied and pickled without the mark


def _captured(x: Tensor) -> bool:
    """By the current stream, which is one of the current device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing() and x.get_device() == torch._C._cuda_getDevice()


def _owner(t: Tensor) -> Tensor:
    return t._base if t._is_view() else t


def _state(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t._version


def mark_input(x: object, block: nn.Module) -> object:
    """x for block and for `routed_lora` with parameters of block, which then, in a CUDA graph captured without
    gradients, does not wait for what runs between this call and its own: up to 16 tokens in bf16 on the CUDA kernels,
    rank 16, groups of whole 32 outputs, without load, weights from outside or a sum that starts at the residual.
    `keep_input` does it.

    For forwards of layers that have an adapter: ``x = mark_input(x, self)`` before the layer's own products. Not for
    those that change x or their parameters where PyTorch does not count it (`.data`, kernels of their own): the adapter
    might read what they wrote. Changes that PyTorch counts are waited for.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or not _captured(x):
        return x
    if x.requires_grad or x.is_inference():  # the block may ask for gradients; changes would leave no trace
        return x
    if torch._C._are_functorch_transforms_active():  # what these hand around has no address
        return x
    view = x.view_as(x)
    setattr(view, MARK, Mark(x, block))
    return view


def serves(given: Tensor, inputs: tuple) -> bool:
    """Whether all that a call of the operator reads, except the residual, was there when given was marked."""
    mark = getattr(given, MARK, None)
    if mark is None or inputs[16] != IMPL or not 0 < inputs[0].shape[0] <= MOST_TOKENS:
        return False
    x, lora_a, lora_b, router, route_weights, _, expert_scale, seed = inputs[:8]
    num_groups, accumulates, returns_load = inputs[9], *inputs[14:16]
    _, d_out, rank = lora_b.shape
    return (
        (x.dtype, rank, d_out // num_groups % OUTPUTS) == (DTYPE, RANK, 0)
        and not (accumulates or returns_load)
        and route_weights is None
        and _captured(x)
        and mark.covers(t for t in (x, lora_a, lora_b, router, expert_scale, seed) if t is not None)
    )


def routed_lora(given: Tensor, inputs: tuple) -> Tensor:
    """out of a call that `serves`, with the bits of the operator."""
    residual, numerics = inputs[5], inputs[10]
    main = torch.cuda.current_stream(given.device)
    side = _side(main)
    wide = residual is not None and numerics == "fp32"  # which rounds once, after the addition
    side.wait_event(getattr(given, MARK).event)
    try:
        with torch.cuda.stream(side):
            mixture = ops.run_forward(*inputs[:5], None, *inputs[6:], wide=wide)[0]
    finally:
        main.wait_stream(side)  # also after an error: a capture must not end with a stream apart
    mixture.record_stream(main)  # not written again within this graph: another mark may be older than its last use
    if residual is None:
        return mixture
    if not wide:
        return torch.add(residual, mixture, out=residual.new_empty(residual.shape))  # contiguous
    return load_module("native.cuda").add(residual, mixture)


@cache
def _side(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each: a stream belongs to one capture at a time, until that ends."""
    return torch.cuda.Stream(main.device)
