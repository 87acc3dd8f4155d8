"""The public spectral functions: inputs they take and refuse, and their place in PyTorch."""

import re

import pytest
import torch
from torch import nn

import mtlora_kernels as mk
from mtlora_kernels.spectral_dispatch import SPECTRAL_IMPLS
from mtlora_kernels.spectral_inputs import adapter_layers
from mtlora_kernels.testing import assert_bitwise_equal
from mtlora_kernels.testing.rows import Check
from mtlora_kernels.testing.spectral_checks import penalty_results
from mtlora_kernels.testing.spectral_inputs import make_adapters
from mtlora_kernels.testing.spectral_run import spectral_checks

OPS = torch.ops.mtlora_kernels
KINDS = ("pairwise", "gram")


@pytest.fixture(params=SPECTRAL_IMPLS)
def spectral_impl(request) -> str:
    if request.param not in mk.available_spectral_impls("cpu"):
        pytest.skip(f"implementation {request.param!r} is not available on cpu tensors here")
    return request.param


CHECKS = [check for check in spectral_checks("cpu", torch.device("cpu"), False) if check.kind != "float64"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.kind} {Check.label(check)}")
def test_cpu_kernels(check):
    if "cpu" not in mk.available_spectral_impls("cpu"):
        pytest.skip("the extension is not built")
    inputs = check.make(*check.shape, dtype=check.dtype, device="cpu", **check.options)
    assert check.run("cpu", inputs) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_defaults_of_new_tensors_decide_nothing(spectral_impl, kind, dtype):
    def results() -> list[torch.Tensor]:
        loss = mk.spectral_penalty(b, kind=kind, impl=spectral_impl)
        return [loss, *torch.autograd.grad(loss, b), *mk.batched_rsvd(b.detach()[0], rank=2, impl=spectral_impl)]

    b = adapters(2, 3, 32, 4).requires_grad_()
    expected, before = results(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            actual = results()
    finally:
        torch.set_default_dtype(before)
    for got, wanted in zip(actual, expected, strict=True):
        assert_bitwise_equal(got, wanted)


def adapters(*shape: int, **settings) -> torch.Tensor:
    return make_adapters(*shape, **{"dtype": torch.float32, "device": "cpu"} | settings).lora_b


# ---- batched_rsvd ----


@pytest.mark.parametrize("shape", [(3, 40, 12), (3, 12, 40), (3, 12, 12)], ids=str)
def test_shapes_dtypes_and_order(spectral_impl, shape):
    a = torch.randn(shape).bfloat16()
    u, s, vh = mk.batched_rsvd(a, 5, impl=spectral_impl)
    assert u.shape == (3, shape[1], 5) and s.shape == (3, 5) and vh.shape == (3, 5, shape[2])
    assert {t.dtype for t in (u, s, vh)} == {torch.float32} and (s.diff() <= 0).all()
    short = vh.mT if shape[1] >= shape[2] else u
    assert (short.gather(1, short.abs().argmax(1, keepdim=True)) > 0).all()


def test_factors_of_a_wide_matrix(spectral_impl):
    a = torch.randn(3, 40, 12)
    u, s, vh = mk.batched_rsvd(a.mT, 12, impl=spectral_impl)
    torch.testing.assert_close(u @ torch.diag_embed(s) @ vh, a.mT)
    tall, wide = mk.batched_rsvd(a, 5, impl=spectral_impl), mk.batched_rsvd(a.mT, 5, impl=spectral_impl)
    assert_bitwise_equal(tall[0], wide[2].mT)
    assert_bitwise_equal(tall[1], wide[1])
    assert_bitwise_equal(tall[2], wide[0].mT)


def test_sequence_and_seed(spectral_impl):
    a = torch.randn(3, 60, 20)
    expected = mk.batched_rsvd(a, 4, oversampling=2, impl=spectral_impl)
    given = mk.batched_rsvd(list(a), 4, oversampling=2, impl=spectral_impl)
    other = mk.batched_rsvd(a, 4, oversampling=2, seed=1, impl=spectral_impl)
    assert all(torch.equal(x, y) for x, y in zip(given, expected, strict=True))
    assert not torch.equal(other[0], expected[0])


A = torch.randn(2, 30, 20)
REFUSED = [
    ((A[0], 3), {}, ValueError, "matrices has 2 dimensions, it must have 3"),
    ((A.double(), 3), {}, ValueError, "matrices has dtype torch.float64"),
    (([], 3), {}, ValueError, "matrices is an empty sequence"),
    (([A[0], A[0].T], 3), {}, ValueError, r"matrices\[1\] has shape"),
    ((A[:, :0], 1), {}, ValueError, "m and n must be positive"),
    ((torch.zeros(1, 300, 257), 3), {}, ValueError, "the shorter of m and n must be at most 256"),
    ((A, 21), {}, ValueError, r"rank is 21, it must be in \[1, 20\]"),
    ((A, 0), {}, ValueError, "rank is 0"),
    ((A, 2.0), {}, TypeError, "rank is float, it must be an int"),
    ((A, 2), {"oversampling": -1}, ValueError, "oversampling is -1"),
    ((A, 2), {"power_iterations": 65}, ValueError, "power_iterations is 65"),
    ((A, 2), {"seed": -1}, ValueError, "seed is -1"),
    ((torch.zeros(1, 300, 100), 60), {}, ValueError, r"min\(rank \+ oversampling, m, n\) is 68"),
    ((A, 2), {"impl": "triton"}, ValueError, "impl is 'triton', it must be None or one of"),
    ((None, 2), {}, TypeError, "matrices is NoneType, it must be a tensor or a sequence"),
    ((A.numpy(), 2), {}, TypeError, r"matrices\[0\] is ndarray, it must be a tensor"),
    (([A[0], A[0].to("meta")], 2), {}, ValueError, r"matrices\[1\] is on meta"),
]


@pytest.mark.parametrize(("args", "options", "error", "match"), REFUSED, ids=[case[3] for case in REFUSED])
def test_batched_rsvd_refuses(args, options, error, match):
    with pytest.raises(error, match=match):
        mk.batched_rsvd(*args, **options)


def test_factors_are_not_differentiable():
    u, _, _ = mk.batched_rsvd(A.clone().requires_grad_(), 3)
    with pytest.raises(RuntimeError, match="batched_rsvd has no derivative"):
        u.sum().backward()


# ---- spectral_penalty: input forms ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_form_is_the_same_penalty(spectral_impl, kind):
    stack = adapters(3, 4, 30, 5)
    leaf = stack.clone().requires_grad_()
    loss = mk.spectral_penalty(leaf, kind=kind, impl=spectral_impl)
    loss.backward()
    layers = [b.clone().requires_grad_() for b in stack]
    experts = [[b.clone().requires_grad_() for b in layer] for layer in stack]
    mixed = [experts[0], layers[1], experts[2]]
    for given in (layers, experts, mixed):
        for b in (*layers, *(b for layer in experts for b in layer)):
            b.grad = None
        again = mk.spectral_penalty(given, kind=kind, impl=spectral_impl)
        again.backward()
        grads = [torch.stack([b.grad for b in g]) if isinstance(g, list) else g.grad for g in given]
        assert_bitwise_equal(again, loss)
        assert_bitwise_equal(torch.stack(grads), leaf.grad)
    one = mk.spectral_penalty(list(stack[0]), kind=kind, impl=spectral_impl)
    assert_bitwise_equal(one, mk.spectral_penalty(stack[0], kind=kind, impl=spectral_impl))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_different_widths(spectral_impl, kind):
    wide, narrow = adapters(1, 4, 50, 5)[0], adapters(2, 4, 30, 5)
    leaves = [b.clone().requires_grad_() for b in (narrow[0], wide, narrow[1])]
    loss = mk.spectral_penalty(leaves, kind=kind, impl=spectral_impl)
    loss.backward()
    parts = [mk.spectral_penalty(b, kind=kind, impl=spectral_impl) for b in (narrow, wide)]
    expected = sum(parts) if kind == "pairwise" else parts[0] * (2 / 3) + parts[1] * (1 / 3)
    torch.testing.assert_close(loss.detach(), expected)
    assert all(b.grad.abs().sum() > 0 for b in leaves)


class Published(nn.Module):
    """Names of the published layers: experts as numbered attributes, and as a list."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.Linear(24, 4, bias=False)
        for i in range(11):
            setattr(self, f"lora_B{i}", nn.Linear(4, 24, bias=False))
        self.block_adapter = nn.Module()
        self.block_adapter.lora_B = nn.ModuleList(nn.Linear(4, 24, bias=False) for _ in range(11))
        self.inner = nn.Module()
        self.inner.lora_B = nn.ParameterDict({"default": torch.randn(3, 30, 4), "other": torch.randn(2, 30, 4)})
        self.ours = mk.nn.RoutedLoRA(24, 4, 11)


def test_a_model_is_found_by_published_names(spectral_impl):
    model = Published()
    nn.init.normal_(model.ours.lora_B)
    numbered, listed, default, other, ours = adapter_layers(model)
    assert [b is getattr(model, f"lora_B{i}").weight for i, b in enumerate(numbered)] == [True] * 11
    assert [b is model.block_adapter.lora_B[i].weight for i, b in enumerate(listed)] == [True] * 11
    assert default is model.inner.lora_B["default"] and other is model.inner.lora_B["other"]
    assert ours is model.ours.lora_B
    loss = mk.spectral_penalty(model, impl=spectral_impl)
    loss.backward()
    expected = mk.spectral_penalty([numbered, listed, default, other, ours], impl=spectral_impl)
    assert_bitwise_equal(loss, expected)
    assert model.lora_B10.weight.grad.any() and model.ours.lora_B.grad.any() and model.lora_A.weight.grad is None


def test_a_changed_model_is_searched_anew():
    model = nn.ModuleDict({name: mk.nn.RoutedLoRA(8, 2, 3) for name in "ab"})
    first, second = model["a"], model["b"]

    def found() -> list[int]:
        return [id(b) for b in adapter_layers(model)]

    assert found() == [id(first.lora_B), id(second.lora_B)]
    first.lora_B = nn.Parameter(torch.randn(3, 8, 2))
    model["c"] = nn.Sequential(nn.Linear(8, 8), mk.nn.RoutedLoRA(8, 2, 3))
    assert found() == [id(b) for b in (first.lora_B, second.lora_B, model["c"][1].lora_B)]
    del model["b"]
    model["c"] = None
    assert found() == [id(first.lora_B)]
    first.lora_B = None
    with pytest.raises(ValueError, match="lora_b is a ModuleDict without parameters named lora_B"):
        found()


def test_shared_experts_count_once():
    """In the order and as often as `named_parameters` has them; names that only begin or end alike are others."""
    model = nn.Module()
    model.first, model.tied, model.lists = mk.nn.RoutedLoRA(8, 2, 3), mk.nn.RoutedLoRA(8, 2, 3), Published()
    model.again, model.tied.lora_B = model.first, model.first.lora_B
    model.lists.again = model.lists.block_adapter
    model.lora_Bias, model.my_lora_B, model.lora_B1x = (nn.Parameter(torch.zeros(3, 8, 2)) for _ in range(3))
    model.loop = nn.ModuleList([model.lists.inner])
    named = [p for name, p in model.named_parameters() if re.search(r"(^|\.)lora_B\d*(\.|$)", name)]
    layers = adapter_layers(model)
    assert [len(layer) if isinstance(layer, list) else 1 for layer in layers] == [1, 11, 11, 1, 1, 1]
    experts = [b for layer in layers for b in (layer if isinstance(layer, list) else [layer])]
    assert list(map(id, experts)) == list(map(id, named))


def test_a_module_compiles():
    model = nn.ModuleList(mk.nn.RoutedLoRA(24, 4, 3) for _ in range(2))
    for adapter in model:
        nn.init.normal_(adapter.lora_B)
    compiled = torch.compile(lambda: mk.spectral_penalty(model) * 2, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(), mk.spectral_penalty(model) * 2)


REFUSED_PENALTY = [
    ((torch.zeros(4, 3),), {}, "lora_b has 2 dimensions, it must have at least 3"),
    ((torch.zeros(1, 1, 1, 4, 3),), {}, "lora_b has 5 dimensions, it must have 4"),
    ((torch.zeros(2, 4, 3).double(),), {}, "lora_b has dtype torch.float64"),
    (([],), {}, "lora_b is an empty sequence"),
    (([torch.zeros(2, 4, 3), []],), {}, r"lora_b\[1\] is an empty sequence"),
    (([[torch.zeros(4, 3), torch.zeros(5, 3)]],), {}, r"lora_b\[0\]\[1\] has shape \(5, 3\)"),
    ((torch.zeros(2, 3, 4),), {}, "lora_b has rank 4 and d = 3, the rank must be at most d and at most 64"),
    ((torch.zeros(2, 99, 65),), {}, "the rank must be at most d and at most 64"),
    ((torch.zeros(0, 4, 3),), {}, "every size must be positive"),
    ((nn.Linear(3, 3),), {}, "lora_b is a Linear without parameters named lora_B"),
    ((torch.zeros(2, 4, 3),), {"kind": "both"}, "kind is 'both', it must be one of"),
    ((torch.zeros(2, 4, 3),), {"impl": "triton"}, "impl is 'triton'"),
]


@pytest.mark.parametrize(("args", "options", "match"), REFUSED_PENALTY, ids=[case[2] for case in REFUSED_PENALTY])
def test_spectral_penalty_refuses(args, options, match):
    with pytest.raises(ValueError, match=match):
        mk.spectral_penalty(*args, **options)


@pytest.mark.parametrize(
    ("lora_b", "match"),
    [
        (None, "lora_b is NoneType"),
        (iter([torch.zeros(2, 4, 3)]), "lora_b is list_iterator"),
        ([torch.zeros(2, 4, 3), 3], r"lora_b\[1\] is int"),
        (torch.zeros(2, 4, 3).numpy(), r"lora_b\[0\]\[0\] is ndarray"),
    ],
    ids=["none", "iterator", "number", "numpy"],
)
def test_spectral_penalty_takes_tensors_and_sequences(lora_b, match):
    with pytest.raises(TypeError, match=f"^{match}, it must be a tensor"):
        mk.spectral_penalty(lora_b)


def test_spectral_penalty_takes_weights_of_its_own_kind():
    with pytest.raises(TypeError, match=r"^weights is Tensor, it must be a SpectralWeights"):
        mk.spectral_penalty(torch.zeros(2, 4, 3), weights=torch.zeros(2, 3))


# ---- spectral_penalty: values ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_experts_have_no_gradient(spectral_impl, kind, dtype):
    results = penalty_results(spectral_impl, make_adapters(2, 3, 24, 4, dtype=dtype, device="cpu", scale=0, kind=kind))
    assert not results["dlora_b"].any() and results["dlora_b"].dtype == dtype
    assert results["loss"].dtype == torch.float32 and 0 <= results["loss"] < 1e-30


def test_one_expert_has_no_pairs(spectral_impl):
    leaf = adapters(2, 1, 24, 4).requires_grad_()
    loss = mk.spectral_penalty(leaf, impl=spectral_impl)
    loss.backward()
    assert loss == 0 and not leaf.grad.any()


def test_a_descent_makes_experts_orthogonal(spectral_impl):
    leaf = adapters(1, 4, 40, 3).requires_grad_()
    optimizer, losses = torch.optim.Adam([leaf], lr=1e-2), []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(mk.spectral_penalty(leaf, impl=spectral_impl))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_kept_weights(spectral_impl):
    first, second = adapters(2, 3, 24, 4), torch.randn(2, 3, 24, 4)
    kept = mk.SpectralWeights(refresh_every=2)

    def loss(lora_b, weights=None):
        return mk.spectral_penalty(lora_b, weights=weights, impl=spectral_impl)

    assert torch.equal(loss(first, kept), loss(first))
    held = OPS.spectral_weights(first, "pairwise", spectral_impl)
    stale, _, _ = OPS.spectral_penalty_fwd(second, held, "pairwise", spectral_impl)
    assert torch.equal(loss(second, kept), stale) and not torch.equal(stale, loss(second))
    assert torch.equal(loss(second, kept), loss(second))
    with pytest.raises(ValueError, match="weights holds those of other layers"):
        loss(first[:1], kept)
    with pytest.raises(ValueError, match="refresh_every is 0"):
        mk.SpectralWeights(refresh_every=0)


# ---- spectral operators in PyTorch ----


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(spectral_impl, kind):
    lora_b = adapters(2, 3, 24, 4, dtype=torch.bfloat16)
    torch.library.opcheck(OPS.spectral_weights.default, (lora_b, kind, spectral_impl))
    weights = OPS.spectral_weights(lora_b, kind, spectral_impl)
    args = (weights, kind, spectral_impl)
    _, x, c = OPS.spectral_penalty_fwd(lora_b, *args)
    torch.library.opcheck(OPS.spectral_penalty_fwd.default, (lora_b.clone().requires_grad_(), *args))
    backward = (torch.ones(()), lora_b, weights, x, c, kind, spectral_impl)
    torch.library.opcheck(OPS.spectral_penalty_bwd.default, backward)
    torch.library.opcheck(OPS.batched_rsvd.default, (A, 4, 9, 1, 0, spectral_impl))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_in_one_graph(spectral_impl, kind):
    def step(lora_b):
        return mk.spectral_penalty(lora_b, kind=kind, impl=spectral_impl) * 2

    leaf, other = (adapters(2, 3, 24, 4).requires_grad_() for _ in range(2))
    step(leaf).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(other).backward()
    assert_bitwise_equal(other.grad, leaf.grad)
    compiled = torch.compile(lambda a: mk.batched_rsvd(a, 4), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(x, y) for x, y in zip(compiled(A), mk.batched_rsvd(A, 4), strict=True))


def test_no_second_derivative(spectral_impl):
    leaf = adapters(1, 3, 24, 4).requires_grad_()
    (grad,) = torch.autograd.grad(mk.spectral_penalty(leaf, impl=spectral_impl), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="spectral_penalty has no second derivative"):
        grad.sum().backward()


def test_changing_lora_b_before_backward_raises(spectral_impl):
    leaf = adapters(1, 3, 24, 4).requires_grad_()
    loss = mk.spectral_penalty(leaf, impl=spectral_impl)
    with torch.no_grad():
        leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
