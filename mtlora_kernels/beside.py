"""In a CUDA graph a block adapter's mixture runs beside its block instead of after it.

The mixture needs the block's input alone. Under capture without gradients `keep` marks that input with an event, and
the adapter's call, which comes after the block, lets its kernels wait for that event only, on a stream of their own;
one addition to the block's output is what remains after the block. A graph has edges and no order of launches, so the
one call forks and joins: no stream is left apart, whatever the block does. Eager kernels would start too late for it.
"""

import threading
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops

IMPL = "cuda"  # the kernels that can leave the sum in fp32
MOST_TOKENS = 64  # more would take multiprocessors from the block, and what they compute stays in the graph's pool
MARK = "mtlora_kernels_mark"


class Mark(NamedTuple):
    """There the block's input was written; version tells whether the block has changed it since."""

    event: torch.cuda.Event
    version: int


def marked(x: Tensor) -> Tensor:
    """x for a block and the adapter after it: its alias with a mark, where a stream is captured without gradients."""
    # Changes of an inference tensor leave no trace.
    if not x.is_cuda or type(x) is not Tensor or x.is_inference() or not torch.cuda.is_current_stream_capturing():
        return x
    alias = x.detach()
    setattr(alias, MARK, Mark(torch.cuda.current_stream(x.device).record_event(), x._version))
    return alias


def serves(given: Tensor, inputs: tuple) -> bool:
    """Whether all that a call of the operator reads, except the residual, was there when given was marked."""
    mark = getattr(given, MARK, None)
    if mark is None or inputs[16] != IMPL or not 0 < inputs[0].shape[0] <= MOST_TOKENS:
        return False
    x, *weights, route_weights, _, expert_scale = inputs[:7]
    accumulates, returns_load = inputs[14:16]
    return (
        mark.version == given._version
        and x.data_ptr() == given.data_ptr()  # not a copy, made just now
        and route_weights is None
        and not (accumulates or returns_load)
        and all(_is_parameter(w) for w in (*weights, expert_scale) if w is not None)
        and torch.cuda.is_current_stream_capturing()
    )


def _is_parameter(w: Tensor) -> bool:
    return isinstance(w._base if w._is_view() else w, nn.Parameter)


def routed_lora(given: Tensor, inputs: tuple) -> Tensor:
    """out of a call that `serves`, with the bits of the operator."""
    residual, numerics = inputs[5], inputs[10]
    main, side = torch.cuda.current_stream(given.device), _side(given.device, threading.get_ident())
    side.wait_event(getattr(given, MARK).event)
    try:
        with torch.cuda.stream(side):
            wide = residual is not None and numerics == "fp32"  # rounded once, after the addition
            mixture = ops.run_forward(*inputs[:5], None, *inputs[6:], wide=wide)[0]
    finally:
        main.wait_stream(side)  # also after an error: a capture must not end with a stream apart
    mixture.record_stream(main)  # not written again within this graph: another mark may be older than its last use
    return mixture if residual is None else torch.add(residual, mixture, out=residual.new_empty(residual.shape))


@cache
def _side(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for each thread, as one capture cannot use the stream of another. First where a multiprocessor is free: its
    kernels are small."""
    return torch.cuda.Stream(device, priority=-1)
