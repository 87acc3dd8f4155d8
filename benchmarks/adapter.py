"""`python -m benchmarks adapter`: routed_lora against its rivals and its floor, forward and backward."""

import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch

from .checks import forget_reference, mismatches
from .registry import Contender, contenders, default_impls
from .report import Report
from .results import RESULTS
from .shapes import Inputs, Shape, make_inputs, shape_table
from .small_batch import small_batch_suite
from .timing import SlowCall, peak_extra_bytes, time_call

COMPILE_BUDGET_S = 60.0  # compiling takes seconds a shape; past this, compiled rivals are skipped


def run(
    device: torch.device,
    *,
    quick: bool = False,
    impls: Sequence[str] = (),
    shapes: str = "*",
    numerics: Sequence[str] = ("fp32", "eager"),
    with_compile: bool = False,
    small_batch: bool = False,
    save: bool = True,
    folder: Path = RESULTS,
) -> int:
    """Exit status 0, or 1 if a result differed from the reference."""
    report = Report(device, save, folder)
    field = contenders(impls or default_impls(device), numerics, with_compile)
    compile_left = COMPILE_BUDGET_S
    for shape in shape_table(device, quick):
        if not fnmatch(shape.name, shapes):
            continue
        report.begin(shape)
        inputs = make_inputs(shape, device)
        for contender in field:
            if contender.compiled and compile_left <= 0:
                report.note(contender, f"skipped: {COMPILE_BUDGET_S:.0f} s of compiling are spent")
                continue
            start = time.perf_counter()
            measure_contender(report, contender, shape, inputs)
            compile_left -= (time.perf_counter() - start) if contender.compiled else 0
        forget_reference()
    if small_batch:
        small_batch_suite(report, [c for c in field if not c.compiled], quick)
    return report.finish()


def measure_contender(report: Report, contender: Contender, shape: Shape, inputs: Inputs) -> None:
    """Check, then time and measure memory. What cannot run prints a line and leaves the others to run."""
    try:
        if contender.compiled:
            report.note(contender, "compiling")
        wrong = mismatches(contender, shape, report.device) if contender.impl else []
        if wrong:
            report.mismatch(contender, wrong)
            return
        for measure in ("forward", "forward+backward")[: 1 + shape.backward]:
            call = contender.call(inputs, measure)
            timing = time_call(call, report.device)
            peak = peak_extra_bytes(call, report.device)
            report.record(shape, contender, measure, timing, peak=peak, has_floor=True)
    except (SlowCall, torch.OutOfMemoryError, ValueError) as reason:  # ValueError: impl does not serve the call
        report.note(contender, f"skipped: {str(reason).splitlines()[0]}")
    except Exception as error:  # a compiler that fails on one rival must not end the run
        if not contender.compiled:
            raise
        report.note(contender, f"skipped: {type(error).__name__} while compiling")
