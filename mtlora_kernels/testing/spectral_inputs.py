"""Inputs of the spectral operators: matrices that break decompositions, and experts as training leaves them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import Draw


@dataclass
class Matrices:
    """Arguments of one `batched_rsvd` call."""

    a: Tensor
    options: dict


@dataclass
class Adapters:
    """lora_b [L, N, d, r] and the other arguments of one `spectral_penalty` call."""

    lora_b: Tensor
    options: dict


def _orthonormal(draw: Draw, batch: int, m: int, n: int) -> Tensor:
    return torch.linalg.qr(draw.normal(batch, m, n).double())[0]


def with_spectrum(draw: Draw, batch: int, m: int, n: int, values: Tensor) -> Tensor:
    """[batch, m, n] in fp32 with random singular vectors and the given singular values [min(m, n)]."""
    k = min(m, n)
    return ((_orthonormal(draw, batch, m, k) * values) @ _orthonormal(draw, batch, n, k).mT).float()


def trap_matrices(batch: int, m: int, n: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Finite matrices [batch, m, n] on which published solvers return NaN, hang or lose orthogonality."""
    draw, k = Draw(0, device), min(m, n)
    ones = torch.ones(k, dtype=torch.float64, device=device)
    plain, powers = draw.normal(batch, m, n), torch.linspace(0, -12, k, dtype=torch.float64, device=device)
    traps = {
        "zeros": torch.zeros_like(plain),
        "rank 1": draw.normal(batch, m, 1) @ draw.normal(batch, 1, n),
        "equal values": with_spectrum(draw, batch, m, n, 3 * ones),
        "graded": with_spectrum(draw, batch, m, n, 10**powers),
        "graded columns": plain * (10 ** torch.linspace(0, -12, n, device=device)),
        "1e-30": plain * 1e-30,
        "1e30": plain * 1e30,
        "identity": torch.eye(m, n, device=device).expand(batch, m, n),
        "random": plain,
    }
    for name, column in (("zero column", torch.zeros_like(plain[:, :, 0])), ("equal columns", plain[:, :, -1])):
        traps[name] = plain.clone()
        traps[name][:, :, n // 2] = column
    return traps


def make_matrices(
    batch: int, m: int, n: int, *, dtype: torch.dtype, device: torch.device | str, trap: str = "random", **options
) -> Matrices:
    a = trap_matrices(batch, m, n, device)[trap] if batch else torch.empty(0, m, n, device=device)
    return Matrices(a.to(dtype), {"rank": min(m, n)} | options)


def make_adapters(
    L: int, N: int, d: int, r: int, *, dtype: torch.dtype, device: torch.device | str, scale: float = 1.0, **options
) -> Adapters:
    """Experts with decaying singular values and a shared part, as training leaves them; scale 0 as it starts."""
    draw = Draw(0, device)
    decay = 2.0 ** -torch.arange(r, device=device)
    lora_b = draw.normal(L, N, d, r) * decay + draw.normal(L, 1, d, r)
    return Adapters((lora_b * (scale / d**0.5)).to(dtype), options)
