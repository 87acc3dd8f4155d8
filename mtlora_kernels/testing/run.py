"""Runs the list of checks, in this process or in several."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from ..dispatch import available_impls
from .listing import Check, checks_for


@dataclass
class Row:
    """One check: mismatches is empty when every output and gradient agrees to the last bit."""

    device: str
    impl: str
    kind: str
    case: str
    mismatches: list[str]
    seconds: float


def _run_check(task: tuple[str, str, Check]) -> Row:
    """An exception is a mismatch."""
    device, impl, check = task
    start = time.perf_counter()
    try:
        mismatches = check.run(impl, check.make(*check.shape, dtype=check.dtype, device=device, **check.options))
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
    tasks = [
        (device, impl, check)
        for device in devices
        for impl in available_impls(device)
        if impls is None or impl in impls
        for check in checks_for(impl, torch.device(device), quick)
    ]
    rows = []

    def collect(results: Iterator[Row]) -> None:
        for row in results:
            rows.append(row)
            progress(row)

    if jobs == 1:
        collect(map(_run_check, tasks))
    else:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as workers:
            collect(workers.map(_run_check, tasks))
    return rows
