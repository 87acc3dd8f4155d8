"""Launches whose every decision but the tensors' addresses is taken once.

A launcher is two functions: a `plan`, cached by sizes, strides and options, that chooses the tile and returns a
`Launch`; and one that allocates and calls it. Triton's own binder costs 40 to 100 us a launch; here only the first
launch for each dtype and 16-byte alignment of the tensors goes through it, which compiles, or finds that it has
compiled for this class of values already.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .configs import INTERPRET, Tile

plan = lru_cache(maxsize=4096)  # every T is a plan of its own; they are small, but not forever


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def on_device(t: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)


class Launch:
    """A kernel with its grid, its tile and all parameters but the tensors, which come first in every kernel."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], tile: Tile, **values: Any) -> None:
        self.kernel, self.grid, self.values = kernel, grid, values
        self.options = tile.launch
        self.compiled: dict[tuple, tuple] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Run on the current stream; tensors in the kernel's order, None where it reads nothing."""
        if 0 in self.grid:
            return
        if INTERPRET:
            self._through_triton(tensors)
            return
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        device = tensors[0].get_device()
        key = (device, *[t if t is None else t.dtype for t in tensors], *[address % 16 for address in addresses])
        known = self.compiled.get(key)
        if known is None:
            self.compiled[key] = self._through_triton(tensors)
            return
        run, function, metadata, values = known
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*self.grid, stream, function, metadata, None, None, None, *addresses, *values)

    def _through_triton(self, tensors: tuple) -> tuple:
        compiled = self.kernel[self.grid](*tensors, **self.values, **self.options)
        if INTERPRET:
            return ()
        values = [self.values[name] for name in self.kernel.arg_names[len(tensors) :]]
        return compiled.run, compiled.function, compiled.packed_metadata, values
