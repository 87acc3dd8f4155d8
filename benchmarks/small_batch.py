"""Decoding-size forwards: device time inside a CUDA graph, and host time of an eager call."""

from collections.abc import Callable, Sequence

import torch

from .checks import forget_reference, mismatches
from .registry import Contender
from .report import Report
from .shapes import Inputs, Shape, make_inputs, small_batch_table
from .timing import host_time, time_call


def small_batch_suite(report: Report, field: Sequence[Contender], quick: bool) -> None:
    for shape in small_batch_table(report.device, quick):
        report.begin(shape)
        inputs = make_inputs(shape, report.device)
        for contender in field:
            wrong = mismatches(contender, shape, report.device) if contender.impl else []
            if wrong:
                report.mismatch(contender, wrong)
            else:
                _measure(report, contender, shape, inputs)
        forget_reference()


def _measure(report: Report, contender: Contender, shape: Shape, inputs: Inputs) -> None:
    forward = contender.call(inputs, "forward")
    if report.device.type == "cuda":
        with torch.no_grad():
            replay = captured(forward)
        timing = time_call(replay, report.device)
        report.record(shape, contender, "forward in a graph", timing, peak=None, has_floor=True)
    timing = host_time(forward, report.device)
    report.record(shape, contender, "host, grad", timing, peak=None, has_floor=False)
    with torch.inference_mode():
        timing = host_time(forward, report.device)
    report.record(shape, contender, "host, inference", timing, peak=None, has_floor=False)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Replay of one call() in a CUDA graph; warmed up on a side stream first, as capture requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda keep=call: graph.replay()  # what the graph reads lives as long as it
