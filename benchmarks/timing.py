"""Time and memory of one call.

On a GPU a repeat is: overwrite a buffer larger than L2, record an event, call, record an event. In a model
other layers evict an adapter's tensors between its calls, so cold caches are what users see. On a CPU a
repeat is the call between two reads of the host clock. Both warm up first and report quantiles.
"""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # five times the L2 of an H200
BUDGET_S = {"cuda": 0.15, "cpu": 1.0}  # time of the repeats of one measurement
REPEATS = {"cuda": (10, 200), "cpu": (5, 200)}
SLOW_CALL_S = {"cuda": 2.0, "cpu": 15.0}  # a call above this is not worth repeating: the suite has to end


class SlowCall(Exception):
    """One call took longer than SLOW_CALL_S."""


@dataclass(frozen=True)
class Timing:
    """20, 50 and 80 % quantiles in microseconds."""

    p20: float
    p50: float
    p80: float


def quantiles(samples_us: list[float]) -> Timing:
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Timing(*torch.tensor(samples_us, dtype=torch.float64).quantile(points).tolist())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], object], device: torch.device, repeats: int | None = None) -> Timing:
    """Quantiles of the time of call(); given repeats follow one call to warm up, else they fill the budget."""
    if repeats is None:
        repeats = _repeats(call, device)
    else:
        call()
    return _cuda_quantiles(call, device, repeats) if device.type == "cuda" else _cpu_quantiles(call, repeats)


def _repeats(call: Callable[[], object], device: torch.device) -> int:
    """Warm up, so that compiles and first launches stay out of the samples, and fill the budget."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    once = time.perf_counter() - start
    if once > SLOW_CALL_S[device.type]:
        raise SlowCall(f"one call takes {once:.1f} s")
    fewest, most = REPEATS[device.type]
    return min(most, max(fewest, int(BUDGET_S[device.type] / once)))


def _cuda_quantiles(call: Callable[[], object], device: torch.device, repeats: int) -> Timing:
    flush = _flush_buffer(device)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    with torch.cuda.device(device):
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    return quantiles([1e3 * start.elapsed_time(end) for start, end in events])


def _cpu_quantiles(call: Callable[[], object], repeats: int) -> Timing:
    return quantiles([_host_us(call) for _ in range(repeats)])


def host_time(call: Callable[[], object], device: torch.device) -> Timing:
    """Time until call() returns, without waiting for the device: what an eager model pays per launch."""
    samples = []
    for _ in range(_repeats(call, device)):
        synchronize(device)  # an empty queue: a full one would block the host and show device time
        samples.append(_host_us(call))
    synchronize(device)
    return quantiles(samples)


def _host_us(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


@cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak of the memory that call() adds to what is held before it, its results included.

    On a GPU: PyTorch's allocator. On Linux: the process's peak resident set, which also counts what native
    kernels allocate for themselves; it is accurate to about a megabyte. Elsewhere: None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory kept by malloc would hide the next allocations
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # sets the peak to the present resident set
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) << 10
