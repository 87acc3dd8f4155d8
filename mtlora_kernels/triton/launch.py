"""Launch of a compiled kernel without Triton's per-call binder.

Triton binds, specializes and formats a key with strings on every call. The key here holds what decides its answer,
dtype and 16-byte alignment of tensors and the value of everything else; only its first launch goes through Triton,
which compiles, or finds that it has compiled for this class of values already.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .configs import INTERPRET, Tile

MAX_KEYS = 4096  # every T is a key of its own; they are small, but not forever
_compiled: dict[tuple, Any] = {}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def launch(kernel, grid: tuple[int, int, int], tile: Tile, **arguments: Any) -> None:
    """Run kernel on the current stream; arguments are all its parameters by name."""
    if 0 in grid:
        return
    if INTERPRET:
        kernel[grid](**arguments, **tile.launch)
        return
    values = [arguments[name] for name in kernel.arg_names]
    device = torch.cuda.current_device()
    facts = [(v.dtype, v.data_ptr() % 16 == 0) if isinstance(v, Tensor) else v for v in values]
    key = (kernel.fn, device, tile, *facts)
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= MAX_KEYS:
            _compiled.clear()
        _compiled[key] = kernel[grid](**arguments, **tile.launch)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def on_device(t: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)
