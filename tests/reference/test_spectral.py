"""The reference penalty against float64 loops, LAPACK and autograd."""

import numpy as np
import pytest
import torch

from mtlora_kernels.reference.spectral import (
    exp_nonpositive,
    spectral_penalty_bwd,
    spectral_penalty_fwd,
    spectral_weights,
)
from mtlora_kernels.testing.rows import Check
from mtlora_kernels.testing.spectral_checks import penalty_against_float64
from mtlora_kernels.testing.spectral_inputs import make_adapters
from mtlora_kernels.testing.spectral_run import spectral_checks

CHECKS = [check for check in spectral_checks("reference", torch.device("cpu"), False) if check.kind == "float64"]


@pytest.mark.parametrize("check", CHECKS, ids=Check.label)
def test_against_float64(check):
    inputs = check.make(*check.shape, dtype=check.dtype, device="cpu", **check.options)
    assert check.run("reference", inputs) == []


@pytest.mark.parametrize("kind", ["pairwise", "gram"])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_other_magnitudes(kind, scale):
    inputs = make_adapters(2, 3, 40, 8, dtype=torch.float32, device="cpu", scale=scale, kind=kind)
    assert penalty_against_float64("reference", inputs) == []


def test_one_direction_far_above_the_others():
    """M removes what is large: B M cancels, and M in less than fp32 would leave nothing right."""
    lora_b = make_adapters(1, 4, 60, 8, dtype=torch.bfloat16, device="cpu", kind="pairwise")
    direction = torch.randn(1, 4, 60, 1) @ torch.randn(1, 4, 1, 8)
    lora_b.lora_b = (direction * 4 + lora_b.lora_b.float() * 0.05).bfloat16()
    assert penalty_against_float64("reference", lora_b) == []


def test_exp():
    v = -torch.rand(100_000, dtype=torch.float64) * 128
    v[:3] = torch.tensor([0.0, -1.0, -650.0], dtype=torch.float64)
    exact = np.exp(v.numpy().astype(np.longdouble))
    relative = np.abs(exp_nonpositive(v).numpy() - exact) / exact
    assert float(relative.max()) < 2 * 2.3e-16 and exp_nonpositive(v)[0] == 1


@pytest.mark.parametrize("kind", ["pairwise", "gram"])
def test_weights_are_constants_of_the_gradient(kind):
    """The gradient is that of the loss at fixed weights, by central differences along a random direction."""
    lora_b = make_adapters(2, 3, 24, 4, dtype=torch.float32, device="cpu").lora_b
    weights = spectral_weights(lora_b, kind)
    direction = torch.randn_like(lora_b) * lora_b.norm() / lora_b.numel() ** 0.5
    _, x, c = spectral_penalty_fwd(lora_b, weights, kind)
    slope = (spectral_penalty_bwd(torch.ones(()), lora_b, weights, x, c, kind) * direction).sum()

    def loss(step: float) -> torch.Tensor:
        moved = lora_b.double() + step * direction
        if kind == "pairwise":
            products = (moved @ weights.double()).transpose(1, 2).flatten(2)
            cross = (products.mT @ products).unflatten(1, (3, 4)).unflatten(3, (3, 4))
            return sum((cross[:, i, :, j] ** 2).sum() for j in range(3) for i in range(j))
        c2 = (lora_b.double().square().sum((-2, -1)) ** 0.5 / 2 + 1e-8) ** 2
        gap = moved.mT @ moved - c2[..., None, None] * torch.eye(4)
        return (weights[..., None] * weights[..., None, :] * gap).square().sum() / 6

    assert abs((loss(1e-4) - loss(-1e-4)) / 2e-4 - slope) < 1e-4 * abs(slope)
