"""Which checks an implementation of the spectral operators gets."""

from collections.abc import Iterator
from functools import partial

import torch

from .checks import repeated
from .inputs import Draw
from .rows import Check
from .spectral_checks import (
    factors,
    penalty_against_float64,
    penalty_against_reference,
    penalty_replayed,
    penalty_results,
    rsvd_against_best,
    rsvd_against_lapack,
    rsvd_against_reference,
    rsvd_alone,
)
from .spectral_inputs import make_adapters, make_matrices, trap_matrices, with_spectrum

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# batch, m, n, rank, oversampling, power iterations
MATRICES = {
    "cpu": (
        (3, 200, 16, 16, 0, 0), (2, 16, 16, 16, 8, 1), (2, 5, 70, 3, 2, 0), (1, 1, 1, 1, 1, 0), (2, 33, 3, 2, 0, 1),
        (2, 300, 40, 5, 8, 1), (1, 100, 64, 64, 0, 0), (1, 300, 256, 16, 8, 1), (0, 20, 4, 2, 1, 1),
        (1, 16384, 8, 8, 0, 0), (10000, 20, 4, 4, 0, 0),
    ),
    "cuda": (
        (512, 4096, 16, 16, 0, 0), (511, 768, 16, 16, 0, 0), (513, 100, 8, 8, 0, 0), (10000, 64, 4, 4, 0, 0),
        (64, 4096, 64, 16, 8, 1), (8, 16384, 256, 48, 16, 2), (1, 16384, 64, 64, 0, 0), (4, 64, 64, 64, 0, 0),
        (7, 70, 4096, 5, 8, 1), (3, 33, 3, 2, 0, 1), (2, 31, 31, 31, 0, 0), (1, 1, 1, 1, 1, 0), (0, 20, 4, 2, 1, 1),
    ),
}  # fmt: skip
TRAP_SHAPES = ((3, 200, 16), (2, 16, 16), (2, 12, 80), (1, 70, 64))
DECAY_SHAPES = ((2, 400, 64, 16), (1, 80, 300, 10))
# layers, experts, d, r
ADAPTERS = {
    "cpu": ((2, 3, 96, 8), (1, 15, 64, 16), (3, 2, 40, 5), (1, 1, 24, 4), (1, 2, 64, 64)),
    "cuda": (
        (4, 16, 4096, 16), (2, 25, 768, 16), (3, 15, 5120, 8), (1, 2, 4096, 64), (1, 100, 768, 4), (2, 3, 100, 5),
        (1, 1, 24, 4),
    ),
}  # fmt: skip
KINDS = ("pairwise", "gram")


def _decaying(
    batch: int, m: int, n: int, rank: int, *, dtype: torch.dtype, device: torch.device, ratio: float, **options
):
    inputs = make_matrices(batch, m, n, dtype=dtype, device=device, rank=rank, **options)
    powers = torch.arange(min(m, n), dtype=torch.float64, device=device)
    inputs.a = with_spectrum(Draw(0, device), batch, m, n, ratio**powers).to(dtype)
    return inputs


def _decomposition_checks() -> Iterator[Check]:
    for shape in TRAP_SHAPES:
        for trap in trap_matrices(1, 2, 2):
            yield Check("lapack", shape, torch.float32, {"trap": trap}, make_matrices, rsvd_against_lapack)
    for dtype in FLOATS[1:]:
        yield Check("lapack", TRAP_SHAPES[0], dtype, {}, make_matrices, rsvd_against_lapack)
    for shape in DECAY_SHAPES:
        for ratio in (0.95, 0.8, 0.5):
            run = partial(rsvd_against_best, allowed=1.02)
            yield Check("lapack", shape, torch.float32, {"ratio": ratio}, _decaying, run)


def _penalty_checks() -> Iterator[Check]:
    for kind in KINDS:
        for dtype in FLOATS:
            for scale in (4.0, 0.0):
                options = {"kind": kind, "scale": scale}
                for shape in ADAPTERS["cpu"][:3]:
                    yield Check("float64", shape, dtype, options, make_adapters, penalty_against_float64)


def _bit_checks(kind_of_device: str, quick: bool) -> Iterator[Check]:
    for index, (*shape, rank, oversampling, power_iterations) in enumerate(MATRICES[kind_of_device]):
        options = {"rank": rank, "oversampling": oversampling, "power_iterations": power_iterations}
        for dtype in FLOATS if not quick and index < 2 else (FLOATS[index % 3],):
            yield Check("rsvd", shape, dtype, options, make_matrices, rsvd_against_reference)
    for shape in TRAP_SHAPES[:2] if quick or kind_of_device == "cuda" else TRAP_SHAPES:
        for trap in trap_matrices(1, 2, 2):
            yield Check("rsvd", shape, torch.float32, {"trap": trap}, make_matrices, rsvd_against_reference)
    for index, shape in enumerate(ADAPTERS[kind_of_device]):
        for kind in KINDS:
            for dtype in FLOATS if not quick and index < 2 else (FLOATS[(index + 1) % 3],):
                for scale in (4.0, 0.0):
                    options = {"kind": kind, "scale": scale}
                    yield Check("penalty", shape, dtype, options, make_adapters, penalty_against_reference)


def _self_checks(kind_of_device: str) -> Iterator[Check]:
    options = {"rank": 4, "oversampling": 4}
    for shape in ((5, 300, 20), (4, 9, 100)):
        yield Check("rsvd", shape, torch.bfloat16, options, make_matrices, rsvd_alone, {"in": "batch"})
    yield Check("rsvd", (5, 300, 20), torch.float32, options, make_matrices, partial(repeated, factors))
    for kind in KINDS:
        shape, options = ADAPTERS[kind_of_device][0], {"kind": kind}
        yield Check("penalty", shape, torch.bfloat16, options, make_adapters, partial(repeated, penalty_results))
        if kind_of_device == "cuda":
            yield Check("penalty", shape, torch.bfloat16, options, make_adapters, penalty_replayed, {"in": "graph"})


def spectral_checks(impl: str, device: torch.device, quick: bool) -> Iterator[Check]:
    if impl != "reference" or device.type == "cpu":  # the reference's fp64 arithmetic has the same bits on any device
        yield from _decomposition_checks()
    yield from _penalty_checks()
    if impl != "reference":
        yield from _bit_checks(device.type, quick)
        yield from _self_checks(device.type)
