"""The small fp64 algebra against scalar loops and numpy."""

from itertools import combinations

import numpy as np
import pytest
import torch

from mtlora_kernels.reference.arithmetic import tree_sum
from mtlora_kernels.reference.jacobi import ROTATE, gram, jacobi, orthonormal, round_robin, square_root
from mtlora_kernels.testing import assert_bitwise_equal


def scalar_gram(a: np.ndarray) -> np.ndarray:
    """One lane per row modulo 32, rows in order, then halves."""
    lanes = min(32, 1 << (len(a) - 1).bit_length())
    sums = [np.zeros((a.shape[1],) * 2) for _ in range(lanes)]
    for index, row in enumerate(a):
        for i, j in np.ndindex(*sums[0].shape):
            sums[index % lanes][i, j] += row[i] * row[j]
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [x + y for x, y in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


def scalar_jacobi(g: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The same rotations one after the other: the pairs of a round are disjoint, so their order changes nothing."""
    g, v = g.copy(), np.eye(len(g))
    for _ in range(24):
        rotated = False
        for ps, qs in round_robin(len(g) + len(g) % 2).tolist():
            planned = []
            for p, q in zip(ps, qs, strict=True):
                if q < len(g) and abs(g[p, q]) > threshold:
                    gap, twice = g[q, q] - g[p, p], 2 * g[p, q]
                    root = np.sqrt(gap * gap + twice * twice)
                    t = twice / (gap + (-root if gap < 0 else root))
                    c = 1 / np.sqrt(1 + t * t)
                    planned.append((p, q, c, t * c, g[p, p] - t * g[p, q], g[q, q] + t * g[p, q]))
            for matrix in (g, v):
                for p, q, c, s, _, _ in planned:
                    x, y = matrix[:, p].copy(), matrix[:, q].copy()
                    matrix[:, p], matrix[:, q] = c * x - s * y, s * x + c * y
            for p, q, c, s, _, _ in planned:
                x, y = g[p].copy(), g[q].copy()
                g[p], g[q] = c * x - s * y, s * x + c * y
            for p, q, _, _, new_p, new_q in planned:
                g[p, p], g[q, q], g[p, q], g[q, p] = new_p, new_q, 0, 0
            rotated = rotated or bool(planned)
        if not rotated:
            break
    order = sorted(range(len(g)), key=lambda i: -g[i, i])
    return np.diag(g)[order], v[:, order]


def test_square_root_is_ieee():
    x = torch.cat([torch.exp(torch.randn(100_000).double() * scale) for scale in (1, 10, 80)])
    x = torch.cat([x, 1 + torch.rand(100_000).double(), torch.tensor([0.0, torch.inf, 4.0], dtype=torch.float64)])
    assert_bitwise_equal(square_root(x), torch.from_numpy(np.sqrt(x.numpy())))
    assert square_root(torch.tensor([-1.0, torch.nan]).double()).isnan().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (16, 3), (33, 4), (100, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram_is_a_scalar_loop(shape, dtype):
    a = torch.randn(2, *shape).to(dtype)
    expected = torch.stack([torch.from_numpy(scalar_gram(m.double().numpy())) for m in a])
    assert_bitwise_equal(gram(a), expected)
    assert_bitwise_equal(gram(a), gram(a).mT)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 64])
def test_round_robin_meets_every_pair_once(n):
    rounds = [list(zip(p, q, strict=True)) for p, q in round_robin(n).tolist()]
    assert sorted(pair for one in rounds for pair in one) == list(combinations(range(n), 2))
    assert all(len({i for pair in one for i in pair}) == 2 * len(one) for one in rounds)


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_jacobi_is_a_scalar_loop(n, rank):
    g = gram(torch.randn(3, 40, rank) @ torch.randn(3, rank, n))
    values, v = jacobi(g)
    thresholds = tree_sum(g.diagonal(dim1=1, dim2=2)) * ROTATE
    for i, threshold in enumerate(thresholds.tolist()):
        expected = scalar_jacobi(g[i].numpy(), threshold)
        assert_bitwise_equal(values[i], torch.from_numpy(expected[0].copy()))
        assert_bitwise_equal(v[i], torch.from_numpy(expected[1].copy()))


@pytest.mark.parametrize("n", [2, 16, 33, 64])
def test_jacobi_against_lapack(n):
    g = gram(torch.randn(2, 200, n))
    values, v = jacobi(g)
    largest = values[:, :1]
    assert ((values - torch.linalg.eigvalsh(g).flip(1)).abs() <= 1e-14 * largest).all()
    assert (v.mT @ v - torch.eye(n)).abs().max() < 1e-13
    assert ((v * values[:, None]) @ v.mT - g).abs().max() < 1e-13 * largest.max()


def test_a_matrix_of_a_batch_converges_alone():
    slow, fast = gram(torch.randn(1, 40, 8)), torch.eye(8).double()[None]
    together = jacobi(torch.cat([slow, fast]))
    for i, alone in enumerate((jacobi(slow), jacobi(fast))):
        assert all(torch.equal(a[0], t[i]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("rank", [0, 1, 3, 9])
@pytest.mark.parametrize("shape", [(9, 9), (40, 9), (100, 12)], ids=str)
def test_orthonormal_whatever_the_rank(shape, rank):
    n, l = shape
    y = (torch.randn(2, n, rank) @ torch.randn(2, rank, l)).double()
    q = orthonormal(y)
    assert q.shape == (2, n, l) and (q.mT @ q - torch.eye(l)).abs().max() < 1e-14
    if rank:
        assert (y - q @ (q.mT @ y)).abs().max() < 1e-13 * y.abs().max()
