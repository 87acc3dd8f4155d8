"""The backward on Hopper against the reference with Cuda arithmetic: every gradient equal to the last bit."""

import pytest
import torch

from mtlora_kernels import available_impls

if not torch.cuda.is_available() or "cuda" not in available_impls("cuda"):
    pytest.skip("no GPU, or no CUDA kernels for it", allow_module_level=True)

from mtlora_kernels.native import cuda_bwd
from mtlora_kernels.reference.routed_lora_bwd import routed_lora_bwd
from mtlora_kernels.testing import assert_bitwise_equal, with_layout

pytestmark = pytest.mark.gpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("x", "lora_a", "lora_b", "router", "route_weights", "expert_scale")
SMALL = (130, 256, 256, 16, 16, 2)
# tokens, d_in, d_out, rank, experts, groups: each rank, partial tiles of tokens, outputs, experts and features,
# one to eight chunks of tokens, narrow groups, router rows beyond one block of columns
SHAPES = [
    SMALL, (64, 64, 64, 16, 8, 1), (1, 64, 64, 16, 3, 1), (300, 200, 144, 16, 15, 3), (4500, 768, 768, 16, 25, 32),
    (1000, 1032, 512, 8, 16, 2), (1000, 512, 512, 32, 16, 4), (777, 512, 512, 64, 16, 2), (200, 64, 576, 32, 5, 3),
    (600, 768, 3072, 16, 25, 16), (512, 4096, 11008, 16, 16, 1), (512, 11008, 4096, 8, 32, 32),
    (3000, 1024, 1024, 64, 32, 32), (17000, 512, 768, 16, 16, 1), (8192, 4096, 4096, 16, 16, 2),
    (63, 72, 48, 64, 31, 3), (65, 136, 32, 8, 1, 2),
    (200, 512, 608, 64, 32, 38),  # as many router rows as are served
]  # fmt: skip

# Enough tokens that a block of `contract` sees all experts and makes the rows itself: one to four blocks of columns,
# the last one full or nearly empty, odd numbers of experts and of groups, one step and more for a group's outputs.
ROW_SHAPES = [
    (4500, 768, 768, 16, 25, 32), (4300, 64, 144, 16, 15, 3), (2900, 72, 240, 16, 19, 5), (4300, 64, 128, 8, 31, 4),
    (2200, 64, 288, 32, 13, 3), (2900, 64, 128, 16, 17, 2), (2200, 136, 480, 16, 32, 6), (300, 200, 144, 16, 7, 3),
    (65, 136, 32, 8, 1, 2), (130, 64, 48, 64, 2, 3), (4300, 64, 192, 64, 3, 2), (2900, 64, 64, 32, 9, 1),
    (4300, 512, 512, 16, 16, 4), (16000, 64, 768, 16, 25, 32), (14400, 64, 608, 32, 15, 38),
]  # fmt: skip
TRAINING = (True, True, True, True, False, False)  # of needs


def make_case(shape, E=BF16, *, weights=None, router=True, scale=False, relu=False, load=False):
    tokens, d_in, d_out, rank, experts, groups = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size, dtype=weights or E, std=1.0):
        return (torch.randn(size, generator=generator, device="cuda") * std).to(dtype)

    h = randn(tokens, rank, dtype=E)
    return dict(
        dout=randn(tokens, d_out, dtype=E), dload=randn(experts, dtype=F32) if load else None,
        x=randn(tokens, d_in, dtype=E), lora_a=randn(rank, d_in, std=d_in**-0.5),
        lora_b=randn(experts, d_out, rank, std=rank**-0.5),
        router=randn(groups * experts, d_in, std=d_in**-0.5) if router else None, h=h.relu() if relu else h,
        pi=randn(tokens, groups, experts, dtype=F32).softmax(-1).to(E), expert_scale=randn(experts) if scale else None,
        seed=None, scaling=1.7, activation="relu" if relu else None, dropout_p=0.0,
    )  # fmt: skip


def check(case, needs=(True,) * 6):
    owners = (case["x"], case["lora_a"], case["lora_b"], case["router"], case["pi"], case["expert_scale"])
    needs = [need and owner is not None for need, owner in zip(needs, owners, strict=True)]
    expected = routed_lora_bwd(**case, needs=needs)
    for _ in range(2):
        for name, a, e in zip(NAMES, cuda_bwd.routed_lora_bwd(**case, needs=needs), expected, strict=True):
            assert (a is None) == (e is None), name
            if a is not None:
                assert_bitwise_equal(a, e, name)


@pytest.mark.parametrize("E", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, E):
    check(make_case(shape, E, scale=True, load=True, relu=True))


@pytest.mark.parametrize(
    "options", [{}, {"scale": True}, {"relu": True}, {"load": True}, {"router": False}, {"weights": F32}], ids=str
)
def test_options(options):
    check(make_case(SMALL, **options))


@pytest.mark.parametrize("E", [BF16, F16], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": True, "load": True, "relu": True}, {"router": False}], ids=str)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_training(shape, options, E):
    check(make_case(shape, E, **options), TRAINING)


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name):
    check(make_case(SMALL, scale=True), [other == name for other in NAMES])


@pytest.mark.parametrize("layout", ["padded", "sliced", "offset", "transposed", "expanded"])
@pytest.mark.parametrize("name", ["dout", "x", "lora_a", "lora_b", "router"])
def test_layouts(name, layout):
    case = make_case(SMALL, scale=True)
    check(case | {name: with_layout(case[name], layout)})


def test_calls_that_follow_each_other():
    """What is remembered of a kind of call is not taken for another's, nor for one that starts elsewhere."""
    case = make_case(SMALL, scale=True)
    for layout in ("offset", "sliced", "transposed"):
        for name in ("dout", "x", "lora_b", "h", "pi"):
            check(case)
            check(case | {name: with_layout(case[name], layout)})
    load = torch.ones(SMALL[4], dtype=F32, device="cuda")
    for change in ({"scaling": 3.0}, {"activation": "relu"}, {"dload": load}, {"lora_a": case["lora_a"].float()}):
        check(case | change)
        check(case | change, [False, True, True, True, False, True])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 3e38, 1e-40], ids=str)
@pytest.mark.parametrize("name", ["dout", "x", "lora_b", "h"])
def test_special_values(name, special):
    case = make_case((130, 256, 240, 16, 15, 3), scale=True)
    case[name].view(-1)[12345 % case[name].numel()] = special
    check(case)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 0.0], ids=str)
@pytest.mark.parametrize("name", ["dout", "lora_b", "h"])
def test_special_values_of_training(name, special):
    case = make_case((2900, 64, 144, 16, 18, 3))
    case[name][7 : 7 + 5 * len(case[name]) // 9] = special
    check(case, TRAINING)


def test_captured_in_a_graph():
    case = make_case(SMALL)
    expected = cuda_bwd.routed_lora_bwd(**case, needs=TRAINING)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda_bwd.routed_lora_bwd(**case, needs=TRAINING)
    for gradient in captured[:4]:
        gradient.zero_()
    graph.replay()
    for name, a, e in zip(NAMES[:4], captured, expected, strict=False):
        assert_bitwise_equal(a, e, name)


@pytest.mark.slow
def test_more_threads_than_32_bits_count_equal_two_halves():
    """The kernel between the products: 32 threads for the 17 experts of each of 2^27 + 4096 rows of pi."""
    case = make_case((2**21 + 64, 64, 1024, 16, 17, 64))
    needs = (True, False, False, False, True, False)
    dx, _, _, _, dpi, _ = cuda_bwd.routed_lora_bwd(**case, needs=needs)
    for rows in (slice(None, 2**20), slice(2**20, None)):
        half = case | {name: case[name][rows] for name in ("dout", "x", "h", "pi")}
        half_dx, _, _, _, half_dpi, _ = cuda_bwd.routed_lora_bwd(**half, needs=needs)
        assert torch.equal(dx[rows], half_dx)
        assert torch.equal(dpi[rows], half_dpi)


def test_no_tokens():
    case = make_case((0, 256, 256, 16, 16, 2))
    for gradient in cuda_bwd.routed_lora_bwd(**case, needs=TRAINING)[:4]:
        assert not gradient.any()
