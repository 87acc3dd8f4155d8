"""The reference decomposition against LAPACK, torch.svd_lowrank and known values of its random numbers."""

from functools import partial

import pytest
import torch

from mtlora_kernels.reference.rsvd import SKETCH, batched_rsvd, normal, signed
from mtlora_kernels.testing.inputs import Draw
from mtlora_kernels.testing.rows import Check
from mtlora_kernels.testing.spectral_checks import rsvd_against_lapack, rsvd_alone
from mtlora_kernels.testing.spectral_inputs import make_matrices, trap_matrices, with_spectrum
from mtlora_kernels.testing.spectral_run import spectral_checks

CHECKS = [check for check in spectral_checks("reference", torch.device("cpu"), False) if check.kind == "lapack"]


@pytest.mark.parametrize("check", CHECKS, ids=Check.label)
def test_accuracy(check):
    inputs = check.make(*check.shape, dtype=check.dtype, device="cpu", **check.options)
    assert check.run("reference", inputs) == []


@pytest.mark.parametrize("trap", trap_matrices(1, 2, 2))
@pytest.mark.parametrize("shape", [(9, 9), (24, 64), (300, 33)], ids=str)
def test_traps_at_other_shapes(shape, trap):
    inputs = make_matrices(3, *shape, dtype=torch.float32, device="cpu", trap=trap)
    assert rsvd_against_lapack("reference", inputs) == []


def test_square_rank_deficient_matrices_get_a_whole_basis():
    """The vectors that complete U are random: one of 16 must keep a component outside the 15 others."""
    a = torch.randn(2000, 16, 15) @ torch.randn(2000, 15, 16)
    u, _, v = batched_rsvd(a, 16, 16, 0, 0)
    for factor in (u, v):
        assert (factor.mT @ factor - torch.eye(16)).abs().max() < 1e-5


@pytest.mark.parametrize("power_iterations", [0, 1, 2])
@pytest.mark.parametrize("ratio", [0.97, 0.9, 0.7])
def test_truncated_is_not_worse_than_svd_lowrank(ratio, power_iterations):
    values = ratio ** torch.arange(64, dtype=torch.float64)
    a = with_spectrum(Draw(0, "cpu"), 4, 300, 64, values)
    u, s, v = batched_rsvd(a, 16, 24, power_iterations, 0)
    lowrank_u, lowrank_s, lowrank_v = (f[..., :16] for f in torch.svd_lowrank(a, 24, niter=power_iterations))
    error = torch.linalg.matrix_norm(a - (u * s[:, None]) @ v.mT)
    rival = torch.linalg.matrix_norm(a - (lowrank_u * lowrank_s[:, None]) @ lowrank_v.mT)
    assert (error <= 1.01 * rival).all()


def test_graded_columns_do_not_lose_the_range():
    """Power iterations square the singular values: without orthonormalisation between them, 1e-4 would vanish."""
    values = 10 ** -torch.linspace(0, 7, 40, dtype=torch.float64)
    a = with_spectrum(Draw(0, "cpu"), 2, 200, 40, values)
    _, s, _ = batched_rsvd(a, 24, 32, 4, 0)
    assert ((s.double() - values[:24]).abs() / values[:24]).max() < 2e-3


@pytest.mark.parametrize("shape", [(4, 300, 20), (4, 12, 12)], ids=str)
@pytest.mark.parametrize("oversampling", [0, 3])
def test_each_matrix_alone(shape, oversampling):
    options = {"rank": 8, "oversampling": oversampling}
    assert rsvd_alone("reference", make_matrices(*shape, dtype=torch.float32, device="cpu", **options)) == []


def test_sign_of_the_short_side():
    v = torch.tensor([[1.0, -3.0, 2.0], [-1.0, 3.0, -2.0], [0.5, 3.0, -2.5]]).double()
    assert torch.equal(signed(v), torch.tensor([[1.0, 3.0, -2.0], [-1.0, -3.0, 2.0], [0.5, -3.0, 2.5]]).double())
    _, _, v = batched_rsvd(torch.randn(5, 30, 8), 8, 8, 0, 0)
    assert (v.gather(1, v.abs().argmax(1, keepdim=True)) > 0).all()


def test_normal_numbers():
    sample = normal(400, 300, SKETCH, 7, torch.device("cpu"))
    assert abs(sample.mean()) < 0.01 and abs(sample.std() - (2 / 3) ** 0.5) < 0.01
    assert torch.equal(sample, sample.float().double())
    assert torch.equal(sample[:5, :3], normal(5, 3, SKETCH, 7, torch.device("cpu")))
    draw = partial(normal, 5, 3, device=torch.device("cpu"))
    assert not torch.equal(draw(SKETCH, 7), draw(SKETCH, 7 << 32)) and not torch.equal(draw(1, 7), draw(2, 7))
    # Philox block of counter 0, key 0 is 6627e8d5 e169c58d bc57ac4c 9b00dbd8 (Random123's known answer)
    halves = 0x6627 + 0xE8D5 + 0xE169 + 0xC58D + 0xBC57 + 0xAC4C + 0x9B00 + 0xDBD8
    assert normal(1, 1, 0, 0, torch.device("cpu")).item() == (halves - 4 * 0xFFFF) / 2**16
