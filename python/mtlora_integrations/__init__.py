"""Adapters from host libraries to `mtlora_kernels`, one module per host.

`swap_in` serves the code that came with the papers; importing this package imports no host.
"""

from .swap import SwapReport, swap_in, swap_out

__all__ = ["SwapReport", "swap_in", "swap_out"]
