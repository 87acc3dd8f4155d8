"""The paper's statistics against their sums written out in float64."""

import math

import pytest
import torch

import mtlora_kernels as mk
from mtlora_kernels.testing import make_adapters


def test_bands_against_loops():
    lora_b = make_adapters(2, 4, 40, 10, dtype=torch.float32, device="cpu").lora_b
    alignment, shares = mk.analysis.band_alignment(lora_b), mk.analysis.band_shares(lora_b)
    u, s, _ = torch.linalg.svd(lora_b.double(), full_matrices=False)
    for layer in range(2):
        for band, positions in enumerate((range(2), range(2, 5), range(5, 10))):
            total = sum(
                s[layer, i, k] * s[layer, j, k] * abs(u[layer, i, :, k] @ u[layer, j, :, k])
                for k in positions
                for i in range(4)
                for j in range(4)
                if i != j
            )
            torch.testing.assert_close(
                alignment[layer, band].double(), total / (len(positions) * 12), rtol=1e-4, atol=0
            )
            share = s[layer][:, list(positions)].sum() / s[layer].sum()
            torch.testing.assert_close(shares[layer, band].double(), share, rtol=1e-5, atol=0)
    assert torch.equal(mk.analysis.band_alignment(lora_b[1]), alignment[1:])


def test_shared_directions_align_and_orthogonal_ones_do_not():
    basis = torch.linalg.qr(torch.randn(30, 9))[0]
    shared, first, second = basis[:, :1] * 10, basis[:, 1:5], basis[:, 5:]
    lora_b = torch.stack([torch.cat([shared, own], 1) for own in (first, second)])
    alignment = mk.analysis.band_alignment(lora_b)[0]
    assert abs(alignment[0] - 100) < 1e-3 and (alignment[1:] < 1e-3).all()


def test_limits():
    assert mk.analysis.band_shares(torch.zeros(1, 3, 20, 10)).isnan().all()
    assert (mk.analysis.band_alignment(torch.zeros(1, 3, 20, 10)) == 0).all()
    with pytest.raises(ValueError, match="lora_b has 1 expert"):
        mk.analysis.band_alignment(torch.randn(1, 20, 4))
    with pytest.raises(ValueError, match="lora_b has 2 dimensions"):
        mk.analysis.band_shares(torch.randn(20, 4))


def test_routing_entropy():
    uniform, certain = torch.full((5, 2, 8), 1 / 8), torch.eye(8)
    assert abs(mk.analysis.routing_entropy(uniform) - math.log(8)) < 1e-6
    assert mk.analysis.routing_entropy(certain) == 0
    half = torch.stack([uniform[0, 0], certain[0]])
    assert abs(mk.analysis.routing_entropy(half) - math.log(8) / 2) < 1e-6
    with pytest.raises(ValueError, match="pi has no dimensions"):
        mk.analysis.routing_entropy(torch.tensor(1.0))
