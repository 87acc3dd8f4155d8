"""`python -m benchmarks spectral`: decompositions and penalties against their rivals, correctness first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import mtlora_kernels as mk
from mtlora_kernels.testing import differences, make_adapters

from .floors import measure_rates
from .results import PROVENANCE, RESULTS, append, provenance
from .shapes import DTYPE_NAMES
from .small_batch import captured
from .spectral_accuracy import ACCURACY_FIELDS, accuracy
from .spectral_contenders import Contender, decompositions, penalties, values
from .timing import SlowCall, time_call

SPEED_FIELDS = (
    *PROVENANCE, "task", "shape", "dtype", "contender", "impl", "p20_us", "p50_us", "p80_us", "floor_us", "copy_gb_s",
)  # fmt: skip
LOOP_REPEATS = 2  # on a GPU, of what takes half a second a call
CHECKED = 4  # matrices, or layers, on which ours must equal the reference: results do not depend on the batch
FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Task:
    """passes counts how often the input's bytes have to move: read for values, read and written for a gradient."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    contenders: Callable[[Sequence[str]], list[Contender]]
    rank: int = 0
    passes: int = 1


def tasks(device: torch.device, quick: bool) -> list[Task]:
    on_gpu, large = device.type == "cuda", device.type == "cuda" and not quick
    batch, d = (512 if large else 64 if not quick else 8), 4096 if not quick else 512
    layers = 32 if large else 4 if not quick else 1

    def rsvd(impls: Sequence[str]) -> list[Contender]:
        return decompositions(device, impls)

    def truncated(impls: Sequence[str]) -> list[Contender]:
        return [c for c in rsvd(impls) if not (on_gpu and c.loops and "svd" in c.name and "low" not in c.name)]

    def without_loops(impls: Sequence[str]) -> list[Contender]:
        return [c for c in values(device, impls) if not c.loops]

    dtypes = (FP32, BF16) if on_gpu else (FP32,)
    ways = (partial(values, device), without_loops)  # solvers in a loop take ten seconds a task: one dtype shows them
    found = [Task("values and V", (batch, d, 16), t, way, 16) for t, way in zip(dtypes, ways, strict=False)]
    found += [
        Task("U, S, V", (batch, d, 16), FP32, rsvd, 16),
        Task("U, S, V to rank 16", (batch if on_gpu else batch // 4, d, 64), FP32, truncated, 16),
    ]
    for kind in ("pairwise", "gram"):
        found += [
            Task(f"penalty {kind}", (layers, 16, d, 16), t, partial(penalties, kind, device), passes=2)
            for t in dtypes[::-1]
        ]
    return found


def _inputs(task: Task, device: torch.device) -> tuple:
    if task.rank:
        generator = torch.Generator(device).manual_seed(0)
        return torch.randn(task.shape, generator=generator, device=device).to(task.dtype), task.rank
    return (make_adapters(*task.shape, dtype=task.dtype, device=device).lora_b,)


def _mismatches(task: Task, contender: Contender, inputs: tuple) -> list[str]:
    """Ours against the reference, on the first matrices or layers."""
    reference = next(c for c in task.contenders(("reference",)) if c.impl)
    few = (inputs[0][:CHECKED] if task.rank else inputs[0][:1], *inputs[1:])
    results = (dict(zip("abc", c.call(*few), strict=False)) for c in (contender, reference))
    return differences(*results)


def _times(task: Task, contender: Contender, inputs: tuple, device: torch.device) -> tuple[dict[str, str], str | None]:
    """Quantiles in microseconds, or why there are none."""
    wrong = _mismatches(task, contender, inputs) if contender.impl else []
    if wrong:
        return {}, f"DIFFERS FROM THE REFERENCE, not timed: {', '.join(wrong)}"

    def call() -> object:
        return contender.call(*inputs)

    try:
        repeats = LOOP_REPEATS if contender.loops and device.type == "cuda" else None
        timing = time_call(captured(call) if contender.in_graph else call, device, repeats)
    except (SlowCall, RuntimeError) as reason:
        return {}, f"skipped: {str(reason).splitlines()[0]}"
    return {f"{name}_us": f"{getattr(timing, name):.2f}" for name in ("p20", "p50", "p80")}, None


def _spread(times: dict[str, str]) -> str:
    return f"{times['p50_us']:>14} us  [{times['p20_us']}, {times['p80_us']}]"


def run(
    device: torch.device, *, quick: bool = False, impls: Sequence[str] = (), save: bool = True, folder: Path = RESULTS
) -> int:
    """Exit status 0, or 1 if a result differed from the reference. Rows are saved task by task."""
    source, failed = provenance(device), False
    available = mk.available_spectral_impls(device)
    impls = impls or tuple(impl for impl in available if impl != "reference") or available
    print("  ".join(f"{key} {value}" for key, value in source.items() if value))
    errors = accuracy(device, impls, source)
    if save:
        append(folder / "spectral_accuracy.csv", ACCURACY_FIELDS, errors)
    for task in tasks(device, quick):
        inputs, copy, rows = _inputs(task, device), measure_rates(device, FP32).copy, []
        floor = 1e6 * task.passes * inputs[0].numel() * inputs[0].element_size() / copy
        shape, dtype = "x".join(map(str, task.shape)), DTYPE_NAMES[task.dtype]
        print(f"\n{task.name}, {shape} {dtype}  (its bytes at {copy / 1e9:.0f} GB/s: {floor:.1f} us)", flush=True)
        of_task = {"task": task.name, "shape": shape, "dtype": dtype, "floor_us": f"{floor:.2f}"}
        for contender in task.contenders(impls):
            times, refusal = _times(task, contender, inputs, device)
            print(f"  {contender.name:<28}" + (refusal or _spread(times)), flush=True)
            failed |= contender.impl != "" and refusal is not None
            if times:
                who = {"contender": contender.name, "impl": contender.impl, "copy_gb_s": f"{copy / 1e9:.1f}"}
                rows.append(source | of_task | who | times)
        if save:
            append(folder / "spectral.csv", SPEED_FIELDS, rows)
    if save:
        print(f"\nrows appended to {folder / 'spectral.csv'} and {folder / 'spectral_accuracy.csv'}")
    return int(failed)
