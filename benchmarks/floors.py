"""The time no implementation can beat: compulsory bytes over copy bandwidth, operations over product rate.

Both rates are measured in the run that quotes them, because cards of one name differ and clocks move.
"""

from dataclasses import dataclass
from functools import cache

import torch

from .shapes import Shape
from .timing import time_call

COPY_BYTES = {
    "cuda": 1 << 30,
    "cpu": 1 << 28,
}  # well past the last cache: 50 MB on H200, tens of MB on CPUs
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}  # large enough that the rate no longer grows with it


@dataclass(frozen=True)
class Rates:
    """Measured ceilings of a device: bytes read plus written per second, and operations per second."""

    copy: float
    product: float

    def __str__(self) -> str:
        return f"copy {self.copy / 1e9:.0f} GB/s, product {self.product / 1e12:.3g} TFLOP/s"


@cache
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy_us = time_call(lambda: target.copy_(source), device).p50
    # A CPU without bf16 units multiplies fp32 faster, and a kernel may upcast: the floor takes the faster.
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    product = max(_product_rate(device, candidate) for candidate in dtypes)
    return Rates(2 * source.numel() / (copy_us * 1e-6), product)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = PRODUCT_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / (time_call(lambda: a @ b, device).p50 * 1e-6)


def compulsory_bytes(shape: Shape) -> tuple[int, int]:
    """(forward, backward) bytes. Forward: x, residual, out. Backward: dout, x, dx.

    The weights are counted instead when they are larger, as they are in decoding. At training sizes they are
    about 1 % and can stay in cache; taking the larger of the two keeps this a lower bound at any size.
    """
    activations = 3 * shape.tokens * shape.d
    weights = (shape.rank + shape.groups * shape.experts + shape.experts * shape.rank) * shape.d
    size = shape.dtype.itemsize
    return max(activations, weights) * size, max(activations, 2 * weights) * size


def operations(shape: Shape) -> tuple[int, int]:
    """(forward, backward) multiplications and additions of the products."""
    d, r, n, g = shape.d, shape.rank, shape.experts, shape.groups
    forward = 2 * (d * r + d * n * g + d * n * r)
    backward = 2 * (2 * d * n * r + 2 * d * (r + n * g))
    return forward * shape.tokens, backward * shape.tokens


def floor_us(shape: Shape, rates: Rates, measure: str) -> float:
    """Floor in microseconds of "forward+backward", or of any measure of the forward alone."""
    steps = zip(compulsory_bytes(shape), operations(shape), strict=True)
    forward, backward = (1e6 * max(moved / rates.copy, work / rates.product) for moved, work in steps)
    return forward + backward if measure == "forward+backward" else forward
