"""Launches whose every decision but the tensors' addresses is taken once.

A launcher is two functions: a `plan`, cached by sizes, strides and options, that chooses the tile and returns a
`Launch`; and one that allocates and calls it. Triton's own binder costs 40 to 100 us a launch; here only the first
launch of each specialisation goes through it.
"""

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..memo import MOST
from .configs import INTERPRET, Tile

plan = lru_cache(maxsize=MOST)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Launch:
    """A kernel with its grid, its tile and all parameters but the tensors, which come first in every kernel."""

    _compiled: ClassVar[dict[tuple, tuple]] = {}  # shared, so that another number of tokens compiles nothing

    def __init__(self, kernel: Any, grid: tuple[int, int, int], tile: Tile, **values: Any) -> None:
        self.kernel, self.grid, self.tile, self.values = kernel, grid, tile, values
        self.ready: dict[tuple, tuple] = {}
        if not INTERPRET:
            parameters = kernel.params[-len(values) :]
            self.arguments = [values[p.name] for p in parameters]
            decisive = [_decides(p, value) for p, value in zip(parameters, self.arguments, strict=True)]
            self.code = (kernel.fn, tile, *decisive)

    def __call__(self, *tensors: Tensor | None) -> None:
        """Run on the current stream; tensors in the kernel's order, None where it reads nothing."""
        if 0 in self.grid:
            return
        if INTERPRET:
            self.kernel[self.grid](*tensors, **self.values, **self.tile.launch)
            return
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        device = tensors[0].get_device()
        key = (device, *[t if t is None else t.dtype for t in tensors], *[address % 16 for address in addresses])
        ready = self.ready.get(key)
        if ready is None:
            ready = self.ready[key] = self._compile(key, tensors)
        run, function, metadata = ready
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*self.grid, stream, function, metadata, None, None, None, *addresses, *self.arguments)

    def _compile(self, key: tuple, tensors: tuple[Tensor | None, ...]) -> tuple:
        code = (*self.code, *key)
        if code not in self._compiled:
            compiled = self.kernel.warmup(*tensors, grid=self.grid, **self.values, **self.tile.launch)
            self._compiled[code] = compiled.run, compiled.function, compiled.packed_metadata
        return self._compiled[code]


def _decides(parameter: Any, value: Any) -> Any:
    """What of a value decides the machine code: only its type, where Triton is told not to specialise on it."""
    if isinstance(value, float):
        return float
    return value.bit_length() > 31 if parameter.do_not_specialize else value
