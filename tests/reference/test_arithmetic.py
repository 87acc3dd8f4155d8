"""The reference's arithmetic against scalar loops, float64 and published known answers."""

import numpy as np
import pytest
import torch

from mtlora_kernels.reference import philox
from mtlora_kernels.reference.arithmetic import Portable, sum_rows, tree_sum
from mtlora_kernels.testing import assert_bitwise_equal, oracle


def halving_tree(row: list[np.float32]) -> np.float32:
    lanes = min(32, 1 << (len(row) - 1).bit_length())
    row = row + [np.float32(0)] * (-len(row) % lanes)
    sums = row[:lanes]
    for start in range(lanes, len(row), lanes):
        sums = [s + v for s, v in zip(sums, row[start : start + lanes], strict=True)]
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


def runs_of_256(column: list[np.float32]) -> np.float32:
    while len(column) > 1:
        runs = [column[start : start + 256] for start in range(0, len(column), 256)]
        column = []
        for run in runs:
            total = run[0]
            for value in run[1:]:
                total = total + value
            column.append(total)
    return column[0]


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 25, 31, 32, 33, 64, 100, 257])
def test_tree_sum_is_the_halving_tree(n):
    v = torch.randn(5, n)
    assert_bitwise_equal(tree_sum(v), torch.tensor([halving_tree(list(row)) for row in v.numpy()]))


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 70_000])
def test_sum_rows_adds_runs_of_256_in_order(rows):
    v = torch.randn(rows, 2)
    assert_bitwise_equal(sum_rows(v), torch.tensor([runs_of_256(list(column)) for column in v.numpy().T]))


def test_sum_rows_of_no_rows_is_zero():
    assert_bitwise_equal(sum_rows(torch.empty(0, 3)), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_portable_dot_is_a_scalar_loop_over_k(dtype):
    a, b = torch.randn(4, 67).to(dtype), torch.randn(67, 5).to(dtype)
    expected = torch.empty(4, 5)
    for m, n in np.ndindex(4, 5):
        total = np.float32(0)
        for x, y in zip(a[m].float().numpy(), b[:, n].float().numpy(), strict=True):
            total = total + x * y
        expected[m, n] = float(total)
    assert_bitwise_equal(Portable.dot(a, b), expected)
    assert_bitwise_equal(Portable.dot(a.expand(3, 4, 67), b.expand(3, 67, 5)), expected.expand(3, 4, 5))


def test_portable_exp_is_within_two_ulp():
    small = torch.rand(100_000) * 2.0 ** torch.randint(-40, 6, (100_000,))
    v = -torch.cat([torch.zeros(1), torch.rand(200_000) * 87, small])
    exact = v.double().exp()
    ulp = 2.0 ** (torch.frexp(exact.float())[1].double() - 24)
    assert ((Portable.exp(v).double() - exact).abs() / ulp).max() <= 2


def test_portable_exp_limits():
    v = torch.tensor([0.0, -0.0, -87.5, -1000.0, float("-inf"), float("nan")])
    assert_bitwise_equal(Portable.exp(v), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, float("nan")]))


# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = (
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    seed = key[1] << 32 | key[0]
    seed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    words = philox.philox_words([torch.tensor([word]) for word in counter], seed)
    assert tuple(int(word) for word in words) == expected
    assert oracle.philox(counter, key) == expected


def test_keep_mask_is_indexed_by_token_and_feature():
    seed = 0x1234_5678_9ABC
    mask = philox.keep_mask(torch.tensor([seed]), 9, 13, 0.3)
    assert_bitwise_equal(mask.float(), oracle.kept(seed, 9, 13, 0.3).float())
    assert torch.equal(philox.keep_mask(torch.tensor([seed]), 5, 13, 0.3), mask[:5])
    rate = philox.keep_mask(torch.tensor([seed]), 1000, 100, 0.3).float().mean()
    assert abs(rate - 0.7) < 5 * (0.3 * 0.7 / 1e5) ** 0.5  # five standard deviations of the mean of 1e5 draws
