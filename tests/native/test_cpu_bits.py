"""The CPU kernels against the reference with Portable arithmetic: every output equal to the last bit."""

import hashlib

import pytest
import torch
from instruction_sets import digest_with

_C = pytest.importorskip("mtlora_kernels._C", reason="the extension is not built")

from mtlora_kernels.native import cpu  # noqa: E402
from mtlora_kernels.reference.routed_lora import routed_lora_fwd  # noqa: E402
from mtlora_kernels.reference.routed_lora_bwd import routed_lora_bwd  # noqa: E402

F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# tokens, d_in, d_out, rank, experts, groups
SHAPES = [
    (1, 24, 40, 4, 3, 1), (17, 40, 48, 12, 15, 2), (100, 136, 264, 16, 16, 1), (17, 24, 24, 1, 1, 24),
    (100, 40, 56, 16, 25, 7), (17, 136, 42, 64, 3, 6), (5, 24, 32, 4, 100, 2), (300, 24, 96, 25, 3, 96),
    (17, 300, 400, 128, 3, 2),
]  # fmt: skip


def make_case(shape, E=F32, *, dtypes=None, routing="router", scale=False, residual=True, **options):
    """Forward's tensors and options, dout, dload. The dtypes, by default all E, go round the tensors."""
    tokens, d_in, d_out, rank, experts, groups = shape
    generator = torch.Generator().manual_seed(0)
    left = iter((dtypes or (E,)) * 8)

    def randn(*size, std=1.0):
        return (torch.randn(size, generator=generator) * std).to(next(left))

    tensors = [
        randn(tokens, d_in), randn(rank, d_in, std=d_in**-0.5), randn(experts, d_out, rank, std=rank**-0.5),
        randn(groups * experts, d_in, std=d_in**-0.5) if routing == "router" else None,
        randn(tokens, groups, experts) if routing == "weights" else None,
        randn(tokens, d_out) if residual else None, randn(experts) if scale else None, torch.tensor([-(7**20)]),
    ]  # fmt: skip
    defaults = dict(
        scaling=0.3, num_groups=groups, numerics="fp32", activation=None, dropout_p=0.0, compute_dtype=E,
        accumulate_into_residual=False, return_load=True,
    )  # fmt: skip
    return tensors, {**defaults, **options}, randn(tokens, d_out), torch.randn(experts, generator=generator)


def run(forward, backward, tensors, options, dout, dload, needs=(True,) * 6):
    results = forward(*tensors, **options)
    x, a, b, router, _, _, scale, seed = tensors
    needs = [need and owner is not None for need, owner in zip(needs, (x, a, b, router, x, scale), strict=True)]
    shared = {name: options[name] for name in ("scaling", "activation", "dropout_p")}
    return (*results, *backward(dout, dload, x, a, b, router, *results[2:], scale, seed, needs=needs, **shared))


def run_cpu(*case):
    return run(cpu.routed_lora_fwd, cpu.routed_lora_bwd, *case)


def check(*case):
    """Runs both and compares out, load, h, pi and the six gradients."""
    expected = run(routed_lora_fwd, routed_lora_bwd, *case)
    for i, (a, e) in enumerate(zip(run_cpu(*case), expected, strict=True)):
        assert (a is None) == (e is None), i
        if e is not None:
            assert a.dtype == e.dtype and torch.equal(a.isnan(), e.isnan()), i
            assert torch.equal(a.nan_to_num(1.0), e.nan_to_num(1.0)), i


@pytest.mark.parametrize("E", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, E):
    check(*make_case(shape, E))


OPTIONS = [
    dict(numerics="eager", scale=True, residual=False),
    dict(numerics="eager", accumulate_into_residual=True, scale=True),
    dict(numerics="eager", return_load=False),
    dict(accumulate_into_residual=True, scale=True, activation="relu"),
    dict(dropout_p=0.1, residual=False, numerics="eager"),
    dict(routing="weights", scale=True, dropout_p=0.5),
    dict(routing=None, activation="relu"),
]


@pytest.mark.parametrize("E", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(33, 40, 96, 12, 5, 2), (33, 40, 24, 4, 17, 8)], ids=str)
def test_options_and_mixed_dtypes(shape, options, E):
    for dtypes in ((F32, F32, BF16, F16, F32), (BF16, F16, F32)):
        check(*make_case(shape, E, dtypes=dtypes, **options))


STRIDES = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("shape", [(17, 40, 64, 8, 3, 2), (17, 40, 24, 8, 3, 24)], ids=str)
def test_strides(shape, change):
    for routing in ("router", "weights"):
        tensors, options, dout, dload = make_case(shape, BF16, dtypes=(BF16, F32), routing=routing, scale=True)
        check([None if t is None else change(t) for t in tensors[:-1]] + tensors[-1:], options, change(dout), dload)


@pytest.mark.parametrize("group_size", [3, 32])
def test_each_gradient_alone(group_size):
    for routing in ("router", "weights"):
        for wanted in range(6):
            case = make_case((17, 40, 2 * group_size, 8, 5, 2), routing=routing, scale=True)
            check(*case, [i == wanted for i in range(6)])


@pytest.mark.parametrize("groups", [2, 32])
def test_no_tokens(groups):
    out, load, h, pi, *grads = run_cpu(*make_case((0, 24, 32, 4, 3, groups), BF16, scale=True, dropout_p=0.1))
    assert out.shape == (0, 32) and h.shape == (0, 4) and pi.shape == (0, groups, 3) and load.isnan().all()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("groups", [2, 40])
def test_threads_and_other_tokens_change_nothing(groups):
    tensors, options, dout, _ = make_case((100, 136, 40, 12, 15, groups), return_load=False)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        runs.append(run_cpu(tensors, options, dout, None))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True) if a is not None)
    tensors[0], tensors[5] = tensors[0][41:42], tensors[5][41:42]
    alone = run_cpu(tensors, options, dout[41:42], None)
    assert all(torch.equal(alone[i][0], runs[0][i][41]) for i in (0, 2, 3, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(17, 24, 64, 12, 3, 2), (17, 24, 24, 4, 3, 24)], ids=str)
def test_not_finite(shape, value):
    for poisoned in (0, 1, 2, 3, 5, 6, -1):
        tensors, options, dout, dload = make_case(shape, scale=True)
        (dout if poisoned < 0 else tensors[poisoned]).view(-1)[2] = value
        check(tensors, options, dout, dload)


def digest() -> str:
    cases = [make_case(shape, E, scale=True, dropout_p=0.1) for shape in SHAPES for E in DTYPES]
    cases += [make_case(SHAPES[1], E, numerics="eager") for E in DTYPES]
    results = [t.float().numpy().tobytes() for case in cases for t in run_cpu(*case) if t is not None]
    return hashlib.sha256(b"".join(results)).hexdigest()


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
def test_instruction_sets_agree(isa):
    assert digest_with(isa, "test_cpu_bits") == digest()
