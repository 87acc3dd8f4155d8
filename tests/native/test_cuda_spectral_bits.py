"""The spectral CUDA kernels against the reference on the same GPU: every result equal to the last bit."""

from functools import partial

import pytest
import spectral_bits
import torch

from mtlora_kernels import available_spectral_impls

if not torch.cuda.is_available() or "cuda" not in available_spectral_impls("cuda"):
    pytest.skip("no GPU, or no CUDA kernels for it", allow_module_level=True)

from mtlora_kernels.native import cuda_spectral
from mtlora_kernels.testing import with_layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("pairwise", "gram")
F32, BF16, F16 = DTYPES
# dtype, batch, m, n, rank, sketch, power iterations; few, as the reference takes most of the time on a GPU
MATRICES = [
    (F32, 3, 200, 16, 16, 16, 0), (F32, 1, 1, 1, 1, 1, 0), (BF16, 2, 33, 3, 2, 2, 1), (F16, 2, 300, 40, 5, 13, 1),
    (BF16, 2, 2048, 16, 16, 16, 0), (F32, 1, 300, 256, 64, 64, 0), (F32, 2, 130, 24, 8, 24, 0),
    (BF16, 2, 512, 64, 16, 24, 1), (F32, 0, 20, 4, 2, 3, 1), (F32, 2, 2050, 8, 8, 8, 0), (BF16, 2, 90, 56, 9, 16, 0),
    (F32, 1, 150, 100, 4, 8, 1), (F32, 2, 60, 32, 20, 28, 1),
]  # fmt: skip
# dtype, layers, experts, d, r, scale
ADAPTERS = [
    (BF16, 2, 16, 512, 16, 0.1), (BF16, 2, 15, 50, 16, 0.0), (F16, 1, 2, 60, 5, 1.0), (F32, 2, 3, 40, 8, 1.0),
    (F32, 1, 1, 4, 1, 1.0), (F16, 1, 3, 300, 6, 1e-3), (BF16, 1, 2, 70, 64, 1.0),
    (F32, 2, 16, 512, 16, 0.1), (F32, 1, 33, 50, 4, 1.0),
]  # fmt: skip


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)


check_rsvd = partial(spectral_bits.check_rsvd, cuda_spectral)
check_penalty = partial(spectral_bits.check_penalty, cuda_spectral)


@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_batched_rsvd(case):
    dtype, *shape = case
    check_rsvd(randn(*shape[:3], dtype=dtype), *shape[3:])


@pytest.mark.parametrize("settings", [(8, 8, 0), (3, 4, 1)], ids=str)
def test_batched_rsvd_without_full_rank(settings):
    """Where directions are null, singular values are rounding noise: the last bits of fp64 show."""
    check_rsvd(torch.cat([randn(1, 40, rank) @ randn(1, rank, 8) for rank in (0, 1, 2, 7)]), *settings)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_batched_rsvd_of_extreme_and_graded_values(scale):
    check_rsvd(randn(2, 50, 16) * scale, 16, 16, 0)
    check_rsvd(randn(2, 50, 16) * torch.logspace(0, -12, 16, device="cuda"), 4, 8, 1)


@pytest.mark.parametrize("layout", ["padded", "sliced", "offset", "transposed", "expanded"])
def test_layouts(layout):
    a = with_layout(randn(3, 12, 12, dtype=torch.bfloat16), layout)
    check_rsvd(a, 12, 12, 0)
    check_penalty(a[None], "pairwise")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_nan_alone(value):
    a = randn(3, 40, 8)
    a[1, 3, 4] = value
    check_rsvd(a, 8, 8, 0)
    for factor in cuda_spectral.batched_rsvd(a, 8, 8, 0, 7):
        assert factor[1].isnan().all() and factor[[0, 2]].isfinite().all()
    for kind in KINDS:
        check_penalty(a[None], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_spectral_penalty(case, kind):
    dtype, *shape, scale = case
    check_penalty((randn(*shape) * scale).to(dtype), kind)


def test_calls_that_follow_each_other():
    """What is remembered of a kind of call is not taken for another's."""
    lora_b = randn(2, 3, 40, 8)
    for changed in (lora_b, lora_b.bfloat16(), lora_b.half(), lora_b[:1], lora_b[:, :2], lora_b[..., 1:7].bfloat16()):
        for kind in KINDS:
            check_penalty(changed, kind)
            check_penalty(lora_b, kind)


def test_pieces_and_batch_change_nothing(monkeypatch):
    a = randn(9, 70, 20)
    whole = cuda_spectral.batched_rsvd(a, 4, 9, 1, 0)
    monkeypatch.setattr(cuda_spectral, "WORKSPACE", 1)
    for factor, pieces in zip(whole, cuda_spectral.batched_rsvd(a, 4, 9, 1, 0), strict=True):
        assert torch.equal(factor, pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_in_a_graph(kind):
    lora_b, dloss = randn(2, 3, 40, 8, dtype=torch.bfloat16), torch.tensor(1.7, device="cuda")

    def step():
        weights = cuda_spectral.spectral_weights(lora_b, kind)
        saved = cuda_spectral.spectral_penalty_fwd(lora_b, weights, kind)
        gradient = cuda_spectral.spectral_penalty_bwd(dloss, lora_b, weights, *saved[1:], kind)
        return weights, *saved, gradient, *cuda_spectral.batched_rsvd(lora_b[0], 4, 6, 1, 0)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lora_b.copy_(lora_b * 3)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))
