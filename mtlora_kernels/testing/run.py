"""Which checks a device and an implementation get, and the loop that runs them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ..dispatch import available_impls
from . import cases
from .checks import against_float64, against_published, against_reference, batch_invariance, repeats, strided
from .inputs import LAYOUTS, Inputs, random_inputs
from .lattice import lattice_inputs, rounding_inputs

BF16, FP32 = torch.bfloat16, torch.float32
FLOATS = (BF16, torch.float16, FP32)
NUMERICS = ("fp32", "eager")


@dataclass
class Check:
    kind: str
    shape: Sequence[int]  # (T, d_in, d_out, r, N, G)
    dtype: torch.dtype
    options: dict  # of the maker and of routed_lora
    make: Callable[..., Inputs]
    run: Callable[[str, Inputs], list[str]]
    note: dict = field(default_factory=dict)

    def label(self) -> str:
        given = {"dtype": self.dtype} | self.options | self.note
        values = {name: str(value).removeprefix("torch.") for name, value in given.items()}
        return f"{','.join(map(str, self.shape))} " + " ".join(
            f"{name}={value}" for name, value in values.items()
        )


@dataclass
class Row:
    """One check: mismatches is empty when every output and gradient agrees to the last bit."""

    device: str
    impl: str
    kind: str
    case: str
    mismatches: list[str]
    seconds: float


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
        for given in cases.OPTIONS:
            for numerics in NUMERICS:
                options = {"numerics": numerics} | given
                for dtype in (options.pop("dtype"),) if "dtype" in options else (BF16,) if quick else FLOATS:
                    yield Check("options", shape, dtype, options, random_inputs, against_reference)
                if "numerics" in given:
                    break
    for shape in cases.LAYOUT_SHAPES[kind]:
        for layout in LAYOUTS:
            for dtype in (BF16,) if quick else (BF16, FP32):
                run, note = partial(strided, layout=layout), {"layout": layout}
                yield Check("strided", shape, dtype, {"expert_scale": True}, random_inputs, run, note)


def _self_checks(kind: str, quick: bool) -> Iterator[Check]:
    """One implementation against itself: repeated, and with fewer tokens in the call."""
    sizes = cases.BATCH_SIZES[kind]
    for dtype in (BF16,) if quick else (BF16, FP32):
        for shape in cases.REPEAT_SHAPES[kind]:
            yield Check("repeat", shape, dtype, {"load": True}, random_inputs, repeats)
        for shape in cases.BATCH_SHAPES[kind]:
            for numerics in NUMERICS:
                run = partial(batch_invariance, sizes=sizes)
                yield Check("batch", (max(sizes), *shape), dtype, {"numerics": numerics}, random_inputs, run)


def _lattice_checks(kind: str, quick: bool, dtypes: Sequence[torch.dtype] = FLOATS) -> Iterator[Check]:
    """Exact inputs against float64 and the published layers; their arithmetic need not be this device's."""
    for shape in cases.LATTICE_SHAPES[:: 3 if quick else 1]:
        for index, options in enumerate(cases.LATTICE_OPTIONS):
            # All dtypes for the first two, one in turn for the others: the loops in float64 are slow.
            for dtype in dtypes if index < 2 else (dtypes[index % len(dtypes)],):
                yield Check("lattice", shape, dtype, options, lattice_inputs, against_float64)
        if (shape[0] * shape[5]).bit_count() == 1:
            yield Check("lattice", shape, dtypes[0], {"load": True}, lattice_inputs, against_float64)
    for shape in cases.PUBLISHED_SHAPES[kind][:: 3 if quick else 1]:
        for dtype in dtypes:
            for given in cases.PUBLISHED_OPTIONS:
                options = {"numerics": "eager"} | given
                yield Check("published", shape, dtype, options, lattice_inputs, against_published)
                forward = partial(against_published, gradients=False)
                yield Check("rounding", shape, dtype, options, rounding_inputs, forward)


def _published_random_checks(quick: bool) -> Iterator[Check]:
    for shape in cases.PUBLISHED_RANDOM_SHAPES[:: 3 if quick else 1]:
        for dtype in FLOATS[:2]:
            run = partial(against_published, gradients=False)
            yield Check(
                "published", shape, dtype, {"numerics": "eager"}, random_inputs, run, {"inputs": "random"}
            )


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


def run_checks(
    devices: Sequence[str], impls: Sequence[str] | None = None, quick: bool = False,
    progress: Callable[[Row], None] = lambda row: None,
) -> list[Row]:  # fmt: skip
    """Every check of the given, or all available, implementations; an exception is a mismatch of its row."""
    rows = []
    for device in map(torch.device, devices):
        for impl in impls or available_impls(device):
            for check in checks_for(impl, device, quick):
                start = time.perf_counter()
                try:
                    inputs = check.make(*check.shape, dtype=check.dtype, device=device, **check.options)
                    mismatches = check.run(impl, inputs)
                except Exception as error:
                    mismatches = [f"{type(error).__name__}: {error}"]
                seconds = time.perf_counter() - start
                rows.append(Row(str(device), impl, check.kind, check.label(), mismatches, seconds))
                progress(rows[-1])
    return rows
