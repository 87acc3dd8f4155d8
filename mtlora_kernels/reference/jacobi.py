"""Small dense fp64 algebra with every order explicit: Gram matrix, Jacobi eigenvalues, Householder basis.

Basic IEEE operations without fused multiply-add, so the same bits on any device; matrices of a batch never meet.
"""

import torch
from torch import Tensor

from .arithmetic import SUM_LANES, next_power_of_two, tree_sum, zero_padded

MAX_SWEEPS = 24  # of Jacobi; random matrices need 5 to 9, the limit only bounds the worst case
ROTATE = 2.0**-54  # a pair is rotated while its off-diagonal element exceeds this share of the trace


def square_root(x: Tensor) -> Tensor:
    """The IEEE square root in fp64. On CPUs torch's may be MKL's, an ulp off for 1 value in 75; one Newton step from
    it with the exact remainder x - s*s, whose product is split after Veltkamp, rounds correctly."""
    s = x.sqrt()
    if x.is_cuda:
        return s
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


def round_robin(n: int) -> Tensor:
    """Rounds of disjoint pairs that meet every pair of the indices 0 ... n-1 once, n even: int64 [n-1, 2, n/2] with
    first < second. Round k pairs k with the last index and k + i with k - i, modulo the number of rounds."""
    pairs = [[(k, n - 1)] + [((k + i) % (n - 1), (k - i) % (n - 1)) for i in range(1, n // 2)] for k in range(n - 1)]
    return torch.tensor(pairs, device="cpu").sort(-1).values.mT


def jacobi(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [batch, n], descending, and eigenvectors in columns [batch, n, n] of a symmetric fp64 matrix.

    The pairs of one round rotate together: first all columns, then all rows. An odd n gets a zero row and column,
    whose pairs never rotate.
    """
    width, threshold = g.shape[-1], tree_sum(g.diagonal(dim1=1, dim2=2))[:, None] * ROTATE
    n = max(2, width + width % 2)
    g = zero_padded(zero_padded(g, 1, n), 2, n).clone()
    v = torch.eye(n, dtype=g.dtype, device=g.device).expand_as(g)
    rounds = round_robin(n).to(g.device)
    for _ in range(MAX_SWEEPS):
        rotated = torch.zeros((), dtype=torch.bool, device=g.device)
        for p, q in rounds:
            app, aqq, apq = g[:, p, p], g[:, q, q], g[:, p, q]
            rotate = apq.abs() > threshold
            gap, twice = aqq - app, 2 * apq
            root = square_root(gap * gap + twice * twice)
            t = torch.where(rotate, twice / (gap + torch.where(gap < 0, -root, root)), 0)
            c = 1 / square_root(1 + t * t)
            s = t * c
            order = torch.cat([p, q])
            place, partner = order.argsort(), torch.cat([q, p])[order.argsort()]
            keep, mix = torch.cat([c, c], 1)[:, place], torch.cat([-s, s], 1)[:, place]
            g, v = (m * keep[:, None] + m[:, :, partner] * mix[:, None] for m in (g, v))
            g = g * keep[..., None] + g[:, partner] * mix[..., None]
            g[:, p, p], g[:, q, q] = app - t * apq, aqq + t * apq
            g[:, p, q], g[:, q, p] = (torch.where(rotate, 0, g[:, i, j]) for i, j in ((p, q), (q, p)))
            rotated |= rotate.any()
        if not rotated:  # nor would a later sweep
            break
    values, order = g.diagonal(dim1=1, dim2=2)[:, :width].sort(descending=True, stable=True)
    return values, v[:, :width].gather(2, order[:, None].expand(-1, width, -1))


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
