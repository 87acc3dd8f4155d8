"""Batched randomized SVD in plain PyTorch: the specification that every kernel reproduces bit for bit.

    G     = A^T A                                   fp64 [n, n], every product exact
    Q     = orth(G ... orth(G Omega))               fp64 [n, l], only if l < n; otherwise Q = I and H = G
    H     = Q^T G Q = W diag(lambda) W^T            Jacobi; sigma = sqrt(lambda), V = Q W
    Z     = A V / sigma, noise where sigma is null  fp32 [m, k]
    U     = Z L^-T with L L^T = Z^T Z               Cholesky: orthonormal, earlier columns keep their direction

Halko, Martinsson, Tropp (2011) with the range taken on the short side, where A^T A is one small matrix: a power
iteration costs no pass over A. A product of two fp32, bf16 or fp16 values is exact in fp64, so G loses only what
the sums round: singular values are right to about 1e-8 of the largest. Everything is basic IEEE arithmetic without
fused multiply-add, the same bits on any device. A is [batch, m, n] with m >= n; matrices never meet.
"""

import torch
from torch import Tensor

from .arithmetic import Portable
from .jacobi import gram, jacobi, orthonormal, square_root
from .philox import philox_words

NULL = 2.0**-22  # a direction with sigma below this share of the largest is completed instead of computed
PIVOT = 2.0**-50  # smallest Cholesky pivot, a share of its diagonal element: no division by zero
SKETCH, FILL = 1, 2  # last word of the Philox counter: which normal numbers


def normal(rows: int, columns: int, stream: int, seed: int, device: torch.device) -> Tensor:
    """fp64 [rows, columns], nearly Gaussian: the sum of the eight 16-bit halves of Philox block (column, row, 0,
    stream), less its mean, times 2^-16. Exact in fp32."""
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    zero = torch.zeros_like(row * column)
    words = philox_words([column + zero, row + zero, zero, zero + stream], torch.tensor(seed, device=device))
    halves = sum((word & 0xFFFF) + (word >> 16) for word in words)
    return (halves - 4 * 0xFFFF).double() * 2.0**-16


def signed(v: Tensor) -> Tensor:
    """Each column [.., n, l] with its element of largest magnitude positive, the first among equals."""
    magnitude, n = v.abs(), v.shape[-2]
    row = torch.arange(n, device=v.device)[:, None]
    first = torch.where(magnitude == magnitude.amax(-2, keepdim=True), row, n - 1).amin(-2, keepdim=True)
    return torch.where(v.gather(-2, first) < 0, -v, v)


def short_side(g: Tensor, sketch: int, power_iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """fp64 sigma [batch, l], descending, and V [batch, n, l] with signs fixed, from G = A^T A."""
    n = g.shape[-1]
    if sketch >= n:
        values, v = jacobi(g)
    else:
        y = Portable.dot(g, normal(n, sketch, SKETCH, seed, g.device).expand(len(g), -1, -1))
        for _ in range(power_iterations):
            y = Portable.dot(g, orthonormal(y))
        q = orthonormal(y)
        values, w = jacobi(Portable.dot(q.mT, Portable.dot(g, q)))
        v = Portable.dot(q, w)
    return square_root(torch.where(values > 0, values, 0)), signed(v)


def long_side(a: Tensor, sigma: Tensor, v: Tensor, seed: int) -> Tensor:
    """U fp32 [batch, m, k] from A, fp64 sigma [batch, k] and fp32 V [batch, n, k]."""
    k = v.shape[-1]
    kept = sigma > NULL * sigma[:, :1]
    z = Portable.dot(a.double(), v.double()) * (1 / sigma)[:, None]
    z = torch.where(kept[:, None], z, normal(a.shape[1], k, FILL, seed, a.device)).float()
    s = gram(z)
    smallest = s.diagonal(dim1=1, dim2=2) * PIVOT
    x = torch.eye(k, dtype=s.dtype, device=s.device).expand_as(s).clone()  # becomes L^-1
    for j in range(k):
        pivot = 1 / square_root(torch.maximum(s[:, j, j], smallest[:, j]))
        column = s[:, j + 1 :, j] * pivot[:, None]
        x[:, j] = x[:, j] * pivot[:, None]
        x[:, j + 1 :] -= column[:, :, None] * x[:, None, j]
        s[:, j + 1 :, j + 1 :] -= column[:, :, None] * column[:, None]
    return Portable.dot(z.double(), x.mT).float()


def batched_rsvd(a: Tensor, rank: int, sketch: int, power_iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [batch, m, rank], S [batch, rank], V [batch, n, rank] in fp32; NaN for a matrix with a NaN or Inf in it."""
    g = gram(a)
    finite = g.diagonal(dim1=1, dim2=2).isfinite().all(1)[:, None, None]
    sigma, v = short_side(torch.where(finite, g, 0), sketch, power_iterations, seed)
    sigma, v = sigma[:, :rank], v[:, :, :rank].float()
    u = long_side(torch.where(finite, a, 0), sigma, v, seed)
    u, s, v = (torch.where(finite, factor, torch.nan) for factor in (u, sigma.float()[..., None], v))
    return u, s[..., 0], v
