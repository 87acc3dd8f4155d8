"""What the Hopper kernels refuse, rule by rule; no GPU needed."""

import pytest
import torch

from mtlora_kernels.limits import Call, hopper_limits

SERVED = Call(
    compute_dtype=torch.bfloat16, x_dtype=torch.bfloat16, out_dtype=torch.bfloat16, d_in=4096, d_out=4096, rank=16,
    experts=16, groups=2, eager=False, dropout=False, float64=False,
)  # fmt: skip


@pytest.mark.parametrize("d", [768, 4096, 5120, 11008])
@pytest.mark.parametrize("experts", [15, 16, 25])
@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_the_published_settings_are_served(d, experts, rank):
    for groups in (1, 2, 4, 8, 16, 32):
        assert hopper_limits(SERVED._replace(d_in=4096, d_out=d, experts=experts, rank=rank, groups=groups)) is None


@pytest.mark.parametrize("experts, groups", [(1, 1216), (16, 76), (31, 39), (32, 38)])
def test_the_most_weights_of_a_token_are_served(experts, groups):
    most = SERVED._replace(d_out=16 * groups, rank=64, experts=experts, groups=groups)
    assert hopper_limits(most) is None
    assert "weights" in hopper_limits(most._replace(d_out=16 * (groups + 1), groups=groups + 1))


@pytest.mark.parametrize(
    "changes, phrase",
    [
        ({"compute_dtype": torch.float32}, "compute_dtype is torch.float32"),
        ({"x_dtype": torch.float32}, "x has dtype torch.float32"),
        ({"out_dtype": torch.float32}, "out has dtype torch.float32"),
        ({"float64": True}, "a tensor has dtype torch.float64"),
        ({"rank": 4}, "the rank is 4"),
        ({"rank": 8, "eager": True}, "the rank is 8"),
        ({"experts": 33}, "there are 33 experts"),
        ({"groups": 128}, "a token has 2048 weights, G * N, more than 1216"),
        ({"d_in": 4100}, "d_in is 4100"),
        ({"experts": 2, "groups": 512}, "a group has 8 outputs"),
        ({"experts": 1, "d_out": 4120, "groups": 1030}, "a group has 4 outputs"),
        ({"dropout": True}, "dropout_p is not 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(changes, phrase):
    assert phrase in hopper_limits(SERVED._replace(**changes))
