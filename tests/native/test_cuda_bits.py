"""The forward on Hopper against the reference with Cuda arithmetic: every bit of out, load, h and pi."""

import threading

import pytest
import torch

from mtlora_kernels import available_impls

if not torch.cuda.is_available() or "cuda" not in available_impls("cuda"):
    pytest.skip("no GPU, or no CUDA kernels for it", allow_module_level=True)

from mtlora_kernels.native import cuda
from mtlora_kernels.reference.routed_lora import routed_lora_fwd
from mtlora_kernels.testing import assert_bitwise_equal, with_layout

pytestmark = pytest.mark.gpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NUMERICS = ("fp32", "eager")
NAMES = ("out", "load", "h", "pi")
SMALL = (77, 768, 768, 16, 15, 2)
# tokens, d_in, d_out, rank, experts, groups: one token to several tiles, slabs of features that do not fill a step,
# each rank, one to four blocks of router columns, groups of 24 to 11008 outputs
SHAPES = [
    SMALL, (1, 4096, 4096, 16, 16, 2), (8, 4096, 4096, 16, 16, 32), (17, 4096, 11008, 16, 16, 32),
    (64, 11008, 4096, 16, 16, 2), (777, 5120, 5120, 16, 16, 10), (777, 4096, 4096, 64, 16, 2),
    (300, 768, 768, 32, 25, 8), (300, 200, 144, 16, 15, 3), (100, 72, 64, 16, 3, 4), (129, 896, 896, 16, 2, 7),
    (513, 3584, 3584, 32, 25, 7), (130, 512, 1024, 64, 32, 16), (16384, 768, 768, 16, 25, 32),
    (8192, 4096, 4096, 16, 16, 1), (10000, 4096, 4096, 16, 16, 32),
]  # fmt: skip


def make_case(
    shape, E=BF16, *, numerics="fp32", residual=True, scale=False, relu=False, load=False, given=False, into=False,
    scaling=2.0, weights=None,
):  # fmt: skip
    tokens, d_in, d_out, rank, experts, groups = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size, dtype=weights or E, std=1.0):
        return (torch.randn(size, generator=generator, device="cuda") * std).to(dtype)

    return dict(
        x=randn(tokens, d_in, dtype=E), lora_a=randn(rank, d_in, std=d_in**-0.5),
        lora_b=randn(experts, d_out, rank, std=rank**-0.5),
        router=None if given else randn(groups * experts, d_in, std=d_in**-0.5),
        route_weights=randn(tokens, groups, experts, dtype=F32).softmax(-1) if given else None,
        residual=randn(tokens, d_out, dtype=E) if residual else None, expert_scale=randn(experts) if scale else None,
        seed=None, scaling=scaling, num_groups=groups, numerics=numerics, activation="relu" if relu else None,
        dropout_p=0.0, compute_dtype=E, accumulate_into_residual=into, return_load=load,
    )  # fmt: skip


def compare(actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        if e is None:
            assert a is None
        else:
            assert_bitwise_equal(a, e, name)


def check(case):
    expected = routed_lora_fwd(**case)
    for _ in range(2):
        compare(cuda.routed_lora_fwd(**case), expected)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("E", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, E, numerics):
    check(make_case(shape, E, numerics=numerics, load=True))


@pytest.mark.parametrize("experts", [1, 2, 5, 8, 9, 16, 17, 24, 31, 32])
def test_numbers_of_experts(experts):
    check(make_case((130, 256, 240, 16, experts, 3)))


@pytest.mark.parametrize("shape", [(70, 256, 256, 8, 15, 1), (513, 3584, 3584, 8, 25, 7)], ids=str)
def test_rank_8(shape):
    check(make_case(shape))


def test_more_tiles_than_a_grid_counts():
    check(make_case((65536 * 64 + 1, 64, 64, 16, 4, 1)))


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize(
    "options",
    [{"residual": False}, {"scale": True}, {"relu": True}, {"given": True}, {"scaling": 1.7}, {"weights": F32},
     {"given": True, "scale": True, "load": True}, {"scaling": 1.7, "scale": True}],
    ids=str,
)  # fmt: skip
def test_options(options, numerics):
    check(make_case(SMALL, numerics=numerics, **options))


@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0, -2.0])
@pytest.mark.parametrize("E", [BF16, F16], ids=str)
def test_powers_of_two(E, scaling):
    check(make_case(SMALL, E, numerics="eager", scaling=scaling))
    case = make_case(SMALL, E, numerics="eager", scaling=scaling, residual=False)
    case["lora_b"].mul_(2.0**-133 if E == BF16 else 2.0**-22)  # sums of a few units of the smallest subnormals
    check(case)


@pytest.mark.parametrize("weight", [1.0, 4.0])
@pytest.mark.parametrize("E", [BF16, F16], ids=str)
def test_scaling_that_overflows_before_the_sum_does(E, weight):
    case = make_case((16, 64, 64, 16, 2, 1), E, numerics="eager", given=True, residual=False)
    largest = torch.finfo(E).max
    case["route_weights"].fill_(weight)
    case["x"].fill_(1)
    case["lora_a"].zero_()[0, 0] = 1
    case["lora_b"].copy_((torch.tensor([-0.4, 0.6]) * (largest / weight))[:, None, None].expand(2, 64, 16))
    assert routed_lora_fwd(**case)[0].isposinf().all()  # 2 * 0.6 overflows, 2 * 0.6 - 2 * 0.4 would not
    check(case)


@pytest.mark.parametrize("options", [{}, {"scale": True}, {"scaling": 1.7}], ids=str)
def test_sum_that_starts_at_the_residual(options):
    check(make_case(SMALL, numerics="eager", into=True, **options))


@pytest.mark.parametrize("layout", ["padded", "sliced", "offset", "transposed", "expanded"])
@pytest.mark.parametrize("name", ["x", "residual", "lora_a", "lora_b", "router"])
def test_layouts(name, layout):
    case = make_case(SMALL)
    check(case | {name: with_layout(case[name], layout)})


def test_layouts_that_follow_each_other():
    """What is remembered of a kind of call is not taken for another's, nor for one that starts elsewhere."""
    case = make_case(SMALL)
    for layout in ("offset", "sliced", "transposed"):
        for name in ("x", "residual", "lora_b"):
            check(case)
            check(case | {name: with_layout(case[name], layout)})
    for change in ({"scaling": 3.0}, {"activation": "relu"}, {"return_load": True}, {"numerics": "eager"}):
        check(case | change)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), 3e38, 1e-40], ids=str)
@pytest.mark.parametrize("name", ["x", "lora_b", "router", "residual"])
def test_special_values(name, special, numerics):
    case = make_case((130, 256, 240, 16, 15, 3), numerics=numerics)
    case[name].view(-1)[12345 % case[name].numel()] = special
    check(case)


@pytest.mark.parametrize("experts", [1, 3, 15])
def test_infinite_h_beside_padded_experts(experts):
    case = make_case((16, 64, 64, 16, experts, 1), F16, residual=False)
    case["x"].fill_(300)
    case["lora_a"].fill_(0.01)[0] = 300
    case["lora_b"].abs_()
    case["router"].zero_()  # equal weights: one that is 0 would make every output NaN
    assert routed_lora_fwd(**case)[0].isinf().all()
    check(case)


def test_first_call_of_a_thread():
    case = make_case(SMALL)
    expected, results = cuda.routed_lora_fwd(**case), []
    thread = threading.Thread(target=lambda: results.extend(cuda.routed_lora_fwd(**case)))
    thread.start()
    thread.join()
    compare(results, expected)


def test_captured_in_a_graph():
    case = make_case(SMALL, load=True)
    expected = cuda.routed_lora_fwd(**case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.routed_lora_fwd(**case)
    for result in captured:
        result.zero_()
    graph.replay()
    compare(captured, expected)


def test_no_tokens():
    out, load, h, pi = cuda.routed_lora_fwd(**make_case((0, 256, 256, 16, 16, 2), load=True))
    assert out.shape == (0, 256) and h.shape == (0, 16) and pi.shape == (0, 2, 16) and load.isnan().all()
