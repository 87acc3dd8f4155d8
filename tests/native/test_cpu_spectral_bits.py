"""The spectral CPU kernels against the reference: every factor, weight, loss and gradient equal to the last bit."""

import hashlib
from functools import partial

import pytest
import spectral_bits
import torch
from instruction_sets import digest_with

_C = pytest.importorskip("mtlora_kernels._C", reason="the extension is not built")

from mtlora_kernels.native import cpu_spectral  # noqa: E402
from mtlora_kernels.testing import with_layout  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, m, n, rank, sketch, power iterations
MATRICES = [
    (3, 200, 16, 16, 16, 0), (2, 16, 16, 16, 16, 0), (2, 7, 5, 3, 5, 0), (1, 1, 1, 1, 1, 0), (2, 33, 3, 2, 2, 1),
    (2, 300, 40, 5, 13, 1), (2, 100, 64, 64, 64, 0), (1, 70, 64, 20, 28, 2), (1, 1000, 9, 9, 9, 0),
    (1, 300, 256, 16, 24, 1), (2, 64, 12, 4, 7, 0), (2, 5000, 12, 12, 12, 0), (0, 20, 4, 2, 3, 1),
]  # fmt: skip
# layers, experts, d, r
ADAPTERS = [
    (2, 3, 40, 8), (1, 2, 60, 5), (1, 1, 4, 1), (2, 15, 50, 16), (1, 40, 33, 3), (1, 25, 130, 16), (40, 2, 8, 4),
    (1, 2, 64, 64),
]  # fmt: skip
KINDS = ("pairwise", "gram")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


check_rsvd = partial(spectral_bits.check_rsvd, cpu_spectral)
check_penalty = partial(spectral_bits.check_penalty, cpu_spectral)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_batched_rsvd(shape, dtype):
    check_rsvd(randn(*shape[:3], dtype=dtype), *shape[3:])


@pytest.mark.parametrize("settings", [(8, 8, 0), (3, 4, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batched_rsvd_without_full_rank(dtype, settings):
    """Where directions are null, singular values are rounding noise: the last bits of fp64 show."""
    for rank in (0, 1, 2, 7):
        a = torch.randn(3, 40, rank) @ torch.randn(3, rank, 8)
        check_rsvd(a.to(dtype), *settings)
    zero_column = randn(2, 40, 8, dtype=dtype)
    zero_column[:, :, 3] = 0
    check_rsvd(zero_column, *settings)


@pytest.mark.parametrize("layout", ["padded", "sliced", "offset", "transposed", "expanded"])
def test_layouts(layout):
    a = with_layout(randn(3, 24, 24, dtype=torch.bfloat16), layout)
    check_rsvd(a, 24, 24, 0)
    for kind in KINDS:
        check_penalty(a[None], kind)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_nan_alone(value):
    a = randn(3, 40, 8)
    a[1, 3, 4] = value
    check_rsvd(a, 8, 8, 0)
    for factor in cpu_spectral.batched_rsvd(a, 8, 8, 0, 7):
        assert factor[1].isnan().all() and factor[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ADAPTERS, ids=str)
def test_spectral_penalty(shape, dtype, kind, scale):
    check_penalty((randn(*shape) * scale).to(dtype), kind)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_spectral_penalty_not_finite(kind, value):
    lora_b = randn(2, 3, 40, 8)
    lora_b[1, 1, 2, 3] = value
    check_penalty(lora_b, kind)


def test_threads_and_batch_change_nothing():
    a, lora_b, threads = randn(9, 70, 20), randn(3, 4, 70, 8), torch.get_num_threads()
    runs = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        weights = cpu_spectral.spectral_weights(lora_b, "pairwise")
        saved = cpu_spectral.spectral_penalty_fwd(lora_b, weights, "pairwise")
        grad = cpu_spectral.spectral_penalty_bwd(torch.tensor(1.7), lora_b, weights, *saved[1:], "pairwise")
        runs.append([*cpu_spectral.batched_rsvd(a, 4, 9, 1, 0), weights, *saved, grad])
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))
    alone = cpu_spectral.batched_rsvd(a[5:6], 4, 9, 1, 0)
    assert all(torch.equal(x[0], y[5]) for x, y in zip(alone, runs[0], strict=False))


def digest() -> str:
    results = [t for b, m, n, *rest in MATRICES for t in cpu_spectral.batched_rsvd(randn(b, m, n), *rest, 7)]
    for shape in ADAPTERS:
        for dtype in DTYPES:
            for kind in KINDS:
                lora_b = randn(*shape, dtype=dtype)
                weights = cpu_spectral.spectral_weights(lora_b, kind)
                saved = cpu_spectral.spectral_penalty_fwd(lora_b, weights, kind)
                grad = cpu_spectral.spectral_penalty_bwd(torch.tensor(1.7), lora_b, weights, *saved[1:], kind)
                results += [weights, *saved, grad]
    return hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in results)).hexdigest()


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
def test_instruction_sets_agree(isa):
    assert digest_with(isa, "test_cpu_spectral_bits") == digest()
