"""`python -m benchmarks kernels`: device time of every kernel of a call, replayed from a CUDA graph.

The profiler reads the times, so the list is whatever the implementation launches, in its order.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import torch
from torch.autograd import DeviceType

from .registry import default_impls, routed_lora
from .results import KERNEL_FIELDS, RESULTS, append, provenance
from .shapes import make_inputs, shape_table, small_batch_table
from .small_batch import captured
from .timing import Timing, quantiles, time_call

REPLAYS = 20
WHOLE_GRAPH = "whole graph, cold cache"  # timed as `adapter` times a call, gaps between kernels included


def run(
    device: torch.device,
    *,
    quick: bool = False,
    impls: Sequence[str] = (),
    shapes: str = "*",
    numerics: Sequence[str] = ("fp32", "eager"),
    save: bool = True,
    folder: Path = RESULTS,
) -> int:
    if device.type != "cuda":
        raise SystemExit(f"--device is {str(device)!r}, it must be cuda: kernels are read from a CUDA graph")
    rows = []
    for shape in shape_table(device, quick) + (() if quick else small_batch_table(device, quick)):
        if not fnmatch(shape.name, shapes):
            continue
        inputs = make_inputs(shape, device)
        for impl, kind in product(impls or default_impls(device), numerics):
            for measure in ("forward", "forward+backward")[: 1 + shape.backward]:
                try:
                    with torch.set_grad_enabled(measure != "forward"):
                        replay = captured(routed_lora(impl, kind).call(inputs, measure))
                except ValueError as reason:  # impl does not serve the call
                    print(f"\n{shape.name} {impl} {kind} {measure}: skipped: {reason}")
                    continue
                times = [*kernel_times(replay), (WHOLE_GRAPH, time_call(replay, device))]
                _print(f"{shape.name} {impl} {kind} {measure}", times)
                about = {"shape": shape.name, "impl": impl, "numerics": kind, "measure": measure}
                rows += [about | {"step": step} | _cells(*time) for step, time in enumerate(times)]
    if save:
        append(folder / "kernels.csv", KERNEL_FIELDS, (provenance(device) | row for row in rows))
    return 0


def _print(title: str, times: list[tuple[str, Timing]]) -> None:
    print(f"\n{title}: kernels {sum(timing.p50 for _, timing in times[:-1]):.1f} us")
    for kernel, timing in times:
        print(f"  {timing.p50:>9.1f} us  [{timing.p20:.1f}, {timing.p80:.1f}]  {kernel}", flush=True)


def _cells(kernel: str, timing: Timing) -> dict[str, str]:
    return {"kernel": kernel} | {f"{name}_us": f"{value:.2f}" for name, value in asdict(timing).items()}


def kernel_times(replay: Callable[[], None]) -> list[tuple[str, Timing]]:
    """Name and time of each kernel of one replay, in order of launch."""
    replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    if not events or len(events) % REPLAYS:
        raise RuntimeError(f"the profiler saw {len(events)} kernels in {REPLAYS} replays of one graph")
    steps = [events[step :: len(events) // REPLAYS] for step in range(len(events) // REPLAYS)]
    return [(short_name(step[0].name), quantiles([e.time_range.elapsed_us() for e in step])) for step in steps]


def short_name(kernel: str) -> str:
    """
    >>> short_name("void at::native::(anonymous namespace)::fill<4, float>(int, float*)")
    'fill'
    """
    plain = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", plain)[0].strip().split("::")[-1]
