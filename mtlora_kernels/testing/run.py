"""Which checks a device and an implementation get, and the loop that runs them."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from ..dispatch import UnsupportedCall, available_impls
from ..spectral_dispatch import available_spectral_impls
from . import cases
from .checks import against_float64, against_published, against_reference, batch_invariance, repeated, run_case, strided
from .inputs import LAYOUTS, random_inputs
from .lattice import lattice_inputs, rounding_inputs
from .rows import Check, Row
from .spectral_run import spectral_checks

BF16, FP32 = torch.bfloat16, torch.float32
FLOATS = (BF16, torch.float16, FP32)
NUMERICS = ("fp32", "eager")


def _random_checks(kind: str, quick: bool) -> Iterator[Check]:
    """Every kernel against the reference."""
    shapes = cases.CUDA_SHAPES if kind == "cuda" else cases.CPU_SHAPES
    for index, (*shape, letters) in enumerate(shapes[:: 4 if quick else 1]):
        for at, letter in enumerate(letters):
            # One backward serves both numerics: on large shapes they take turns.
            small = shape[0] * shape[2] < 2**16
            for numerics in NUMERICS if small else (NUMERICS[(index + at) % 2],):
                options = {"numerics": numerics}
                yield Check("random", shape, cases.DTYPES[letter], options, random_inputs, against_reference)
    for shape in cases.OPTION_SHAPES[kind]:
        for index, given in enumerate(cases.OPTIONS):
            for numerics in (given["numerics"],) if "numerics" in given else NUMERICS:
                options = {"numerics": numerics} | given
                fixed = options.pop("dtype", None)
                dtypes = (BF16,) if quick else (BF16, FLOATS[1 + index % 2]) if kind == "cuda" else FLOATS
                for dtype in (fixed,) if fixed else dtypes:
                    yield Check("options", shape, dtype, options, random_inputs, against_reference)
    for shape in cases.LAYOUT_SHAPES[kind]:
        for layout in LAYOUTS:
            for dtype in (BF16,) if quick or kind == "cuda" else (BF16, FP32):
                run, note = partial(strided, layout=layout), {"layout": layout}
                yield Check("strided", shape, dtype, {"expert_scale": True}, random_inputs, run, note)


def _self_checks(kind: str, quick: bool) -> Iterator[Check]:
    """One implementation against itself: repeated, and with fewer tokens in the call."""
    sizes = cases.BATCH_SIZES[kind]
    for dtype in (BF16,) if quick else (BF16, FP32):
        for shape in cases.REPEAT_SHAPES[kind]:
            yield Check("repeat", shape, dtype, {"load": True}, random_inputs, partial(repeated, run_case))
        for shape in cases.BATCH_SHAPES[kind]:
            for numerics in NUMERICS:
                run = partial(batch_invariance, sizes=sizes)
                yield Check("batch", (max(sizes), *shape), dtype, {"numerics": numerics}, random_inputs, run)


def _in_turn(options: Sequence[dict], dtypes: Sequence[torch.dtype], full: int) -> Iterator[tuple]:
    """(options, dtype): every dtype for the first `full` options, one in turn for each of the others."""
    for index, given in enumerate(options):
        for dtype in dtypes if index < full else (dtypes[index % len(dtypes)],):
            yield given, dtype


def _lattice_checks(kind: str, quick: bool, dtypes: Sequence[torch.dtype] = FLOATS) -> Iterator[Check]:
    """Exact inputs against float64 and the published layers; their arithmetic need not be this device's."""
    for shape in cases.LATTICE_SHAPES[kind][:: 3 if quick else 1]:
        for options, dtype in _in_turn(cases.LATTICE_OPTIONS, dtypes, full=2):
            yield Check("lattice", shape, dtype, options, lattice_inputs, against_float64)
        if (shape[0] * shape[5]).bit_count() == 1:
            yield Check("lattice", shape, dtypes[0], {"load": True}, lattice_inputs, against_float64)
    for shape in cases.PUBLISHED_SHAPES[kind][:: 3 if quick else 1]:
        for given, dtype in _in_turn(cases.PUBLISHED_OPTIONS, dtypes, full=1 if kind == "cuda" else 3):
            options, forward = {"numerics": "eager"} | given, partial(against_published, gradients=False)
            yield Check("published", shape, dtype, options, lattice_inputs, against_published)
            yield Check("rounding", shape, dtype, options, rounding_inputs, forward)


def _published_random_checks(quick: bool) -> Iterator[Check]:
    for shape in cases.PUBLISHED_RANDOM_SHAPES[:: 3 if quick else 1]:
        for dtype in FLOATS[:2]:
            run = partial(against_published, gradients=False)
            yield Check("published", shape, dtype, {"numerics": "eager"}, random_inputs, run, {"inputs": "random"})


def checks_for(impl: str, device: torch.device, quick: bool) -> Iterator[Check]:
    kind = device.type
    if impl == "triton" and kind == "cpu":
        # The interpreter follows CUDA's arithmetic, not this device's, and computes bf16 products wrongly.
        yield from _lattice_checks(kind, quick, FLOATS[1:])
        return
    yield from _lattice_checks(kind, quick)
    if kind == "cuda":
        yield from _published_random_checks(quick)
    if impl != "reference":
        yield from _random_checks(kind, quick)
        yield from _self_checks(kind, quick)


def _run_check(task: tuple[str, str, Check]) -> Row | None:
    """An exception is a mismatch; None if the implementation does not serve the call."""
    device, impl, check = task
    start = time.perf_counter()
    try:
        inputs = check.make(*check.shape, dtype=check.dtype, device=torch.device(device), **check.options)
        mismatches = check.run(impl, inputs)
    except UnsupportedCall:
        return None
    except Exception as error:
        mismatches = [f"{type(error).__name__}: {error}"]
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the other jobs need the device's memory too
    return Row(device, impl, check.kind, check.label(), mismatches, time.perf_counter() - start)


def run_checks(
    devices: Sequence[str], impls: Sequence[str] | None = None, quick: bool = False,
    progress: Callable[[Row], None] = lambda row: None, jobs: int = 1,
) -> list[Row]:  # fmt: skip
    """Every check of the available implementations, or the given among them, in the list's order.

    With jobs > 1 that many fresh processes share the list: most of a first check on a GPU is compiling.
    """
    suites = ((available_impls, checks_for), (available_spectral_impls, spectral_checks))
    tasks = [
        (device, impl, check)
        for device in devices
        for available, checks in suites
        for impl in available(device)
        if impls is None or impl in impls
        for check in checks(impl, torch.device(device), quick)
    ]
    rows = []

    def collect(results: Iterator[Row | None]) -> None:
        for row in filter(None, results):
            rows.append(row)
            progress(row)

    if jobs == 1:
        collect(map(_run_check, tasks))
    else:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as workers:
            collect(workers.map(_run_check, tasks))
    return rows
