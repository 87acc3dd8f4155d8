"""Small dense fp64 algebra with every order explicit: Gram matrix, Jacobi eigenvalues, Householder basis.

Basic IEEE operations without fused multiply-add, so the same bits on any device; matrices of a batch never meet.
"""

import torch
from torch import Tensor

from .arithmetic import SUM_LANES, next_power_of_two, tree_sum, zero_padded

MAX_SWEEPS = 24  # of Jacobi; random matrices need 5 to 9, the limit only bounds the worst case
ROTATE = 2.0**-54  # a pair is rotated while its off-diagonal element exceeds this share of the trace


def square_root(x: Tensor) -> Tensor:
    """The IEEE square root in fp64. Where torch takes its own from MKL, it is an ulp off for 1 value in 75; one
    Newton step from it with the exact remainder x - s*s, whose product is split after Veltkamp, rounds correctly."""
    s = x.sqrt()
    high = s * (2.0**27 + 1)
    high = high - (high - s)
    low, square = s - high, s * s
    error = ((high * high - square) + 2 * high * low) + low * low
    return torch.where((x > 0) & (x < torch.inf), s + ((x - square) - error) / (2 * s), s)


def gram(a: Tensor) -> Tensor:
    """[batch, m, n] -> fp64 [batch, n, n]: A^T A, the sum over rows in the order of `tree_sum`."""
    lanes = min(SUM_LANES, next_power_of_two(a.shape[1]))
    a = zero_padded(a.double(), 1, -(-a.shape[1] // lanes) * lanes)
    s = a.new_zeros(a.shape[0], lanes, a.shape[2], a.shape[2])
    for start in range(0, a.shape[1], lanes):
        rows = a[:, start : start + lanes]
        s += rows[..., :, None] * rows[..., None, :]
    while lanes > 1:
        lanes //= 2
        s = s[:, :lanes] + s[:, lanes:]
    return s[:, 0]


def round_robin(n: int) -> list[tuple[list[int], list[int]]]:
    """Rounds of disjoint pairs p < q that meet every pair of 0 ... n-1 once: round k pairs k with the last index
    and k + i with k - i, modulo the number of rounds; an odd n leaves one index out of each round."""
    rounds = n - 1 + n % 2
    pairs = [[(k, rounds)] + [((k + i) % rounds, (k - i) % rounds) for i in range(1, (rounds + 1) // 2)]
             for k in range(rounds)]  # fmt: skip
    ordered = [[(min(pair), max(pair)) for pair in one if max(pair) < n] for one in pairs]
    return [([p for p, _ in one], [q for _, q in one]) for one in ordered]


def jacobi(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [batch, n], descending, and eigenvectors in columns [batch, n, n] of a symmetric fp64 matrix.

    The pairs of one round rotate together: first all columns, then all rows.
    """
    g, n = g.clone(), g.shape[-1]
    v = torch.eye(n, dtype=g.dtype, device=g.device).expand_as(g).clone()
    threshold = tree_sum(g.diagonal(dim1=1, dim2=2))[:, None] * ROTATE
    for _ in range(MAX_SWEEPS):
        rotated = False
        for p, q in round_robin(n):
            app, aqq, apq = g[:, p, p], g[:, q, q], g[:, p, q]
            rotate = apq.abs() > threshold
            gap, twice = aqq - app, 2 * apq
            root = square_root(gap * gap + twice * twice)
            t = torch.where(rotate, twice / (gap + torch.where(gap < 0, -root, root)), 0)
            c = 1 / square_root(1 + t * t)
            s = t * c
            for matrix in (g, v):
                columns_p, columns_q = matrix[:, :, p], matrix[:, :, q]
                matrix[:, :, p] = c[:, None] * columns_p - s[:, None] * columns_q
                matrix[:, :, q] = s[:, None] * columns_p + c[:, None] * columns_q
            rows_p, rows_q = g[:, p], g[:, q]
            g[:, p] = c[..., None] * rows_p - s[..., None] * rows_q
            g[:, q] = s[..., None] * rows_p + c[..., None] * rows_q
            g[:, p, p], g[:, q, q] = app - t * apq, aqq + t * apq
            for i, j in ((p, q), (q, p)):
                g[:, i, j] = torch.where(rotate, 0, g[:, i, j])
            rotated = rotated or bool(rotate.any())
        if not rotated:  # nor would a later sweep
            break
    values, order = g.diagonal(dim1=1, dim2=2).sort(descending=True, stable=True)
    return values, v.gather(2, order[:, None].expand_as(v))


def orthonormal(y: Tensor) -> Tensor:
    """The first columns [batch, n, l] of the product of the Householder reflections that triangularise y.

    Orthonormal whatever the rank of y. Dot products are in the order of `tree_sum` over all n rows.
    """
    y, (n, l) = y.clone(), y.shape[1:]
    row = torch.arange(n, device=y.device)
    reflections = []

    def reflect(x: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        dots = tree_sum(v[:, None] * x.mT)
        return x - v[..., None] * (beta[:, None] * dots)[:, None]

    for j in range(l):
        v = torch.where(row >= j, y[:, :, j], 0)
        square, head = tree_sum(v * v), v[:, j].clone()
        norm = square_root(square)
        v[:, j] = head + torch.where(head < 0, -norm, norm)
        beta = torch.where(square > 0, 1 / (square + head.abs() * norm), 0)
        y[:, :, j + 1 :] = reflect(y[:, :, j + 1 :], v, beta)
        reflections.append((v, beta))
    q = torch.eye(n, l, dtype=y.dtype, device=y.device).expand_as(y)
    for v, beta in reversed(reflections):
        q = reflect(q, v, beta)
    return q
