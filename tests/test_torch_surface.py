"""`routed_lora` as a citizen of PyTorch: operator contracts, autograd, autocast, compile, checkpointing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mtlora_kernels as mk
from mtlora_kernels.dispatch import IMPLS
from mtlora_kernels.testing import assert_bitwise_equal, random_inputs, run_case, with_layout
from mtlora_kernels.testing.inputs import LAYOUTS

SHAPE = (6, 24, 32, 4, 5, 2)
FULL = {"expert_scale": True, "load": True, "activation": "relu", "dropout_p": 0.3}
OPS = torch.ops.mtlora_kernels


@pytest.fixture(params=[impl for impl in IMPLS if impl != "triton"])
def cpu_impl(request) -> str:
    """Every implementation that computes on CPU tensors outside an interpreter."""
    if request.param not in mk.available_impls("cpu"):
        pytest.skip(f"implementation {request.param!r} is not built")
    return request.param


def forward_args(inputs, impl: str) -> tuple:
    o = inputs.options
    seed = torch.tensor([o["dropout_seed"]]) if "dropout_seed" in o else None
    return (
        inputs.x, inputs.lora_a, inputs.lora_b, inputs.router, inputs.route_weights, inputs.residual,
        inputs.expert_scale, seed, o["scaling"], o["num_groups"], o.get("numerics", "fp32"), o.get("activation"),
        o.get("dropout_p", 0.0), o.get("compute_dtype") or inputs.x.dtype,
        o.get("accumulate_into_residual", False), o["return_load"], impl,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, FULL, {"route_weights": True}, {"residual": False, "load": True}], ids=str)
def test_opcheck_forward(cpu_impl, options, dtype):
    inputs = random_inputs(*SHAPE, dtype=dtype, **options).map(lambda t: t.requires_grad_())
    torch.library.opcheck(OPS.routed_lora_fwd.default, forward_args(inputs, cpu_impl))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", [[True] * 6, [False, True, False, True, False, False]], ids=["all", "two"])
def test_opcheck_backward(cpu_impl, needs, layout):
    inputs = random_inputs(*SHAPE, dtype=torch.bfloat16, **FULL)
    args = forward_args(inputs, cpu_impl)
    _, _, h, pi = OPS.routed_lora_fwd(*args)
    dout, seed = with_layout(inputs.dout, layout), args[7]
    backward = (dout, inputs.dload, inputs.x, inputs.lora_a, inputs.lora_b, inputs.router, h, pi)
    backward += (inputs.expert_scale, seed, 1.7, "relu", 0.3, needs, cpu_impl)
    torch.library.opcheck(OPS.routed_lora_bwd.default, backward)


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.heard.add(function)
        return function(*args, **kwargs or {})


def test_who_listens_hears_the_operators(cpu_impl):
    inputs = random_inputs(*SHAPE, **FULL)
    expected = run_case(cpu_impl, inputs)
    with Listener() as listener:
        heard = run_case(cpu_impl, inputs)
    assert {OPS.routed_lora_fwd.default, OPS.routed_lora_bwd.default} <= listener.heard
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = run_case(cpu_impl, inputs)
    names = {event.key for event in profile.key_averages()}
    assert {"mtlora_kernels::routed_lora_fwd", "mtlora_kernels::routed_lora_bwd"} <= names
    for name, t in expected.items():
        assert_bitwise_equal(heard[name], t, name)
        assert_bitwise_equal(profiled[name], t, name)


def test_each_gradient_alone(cpu_impl):
    for options in (FULL, {"route_weights": True, "load": True}, {"residual": False}):
        inputs = random_inputs(*SHAPE, dtype=torch.bfloat16, **options)
        everything = run_case(cpu_impl, inputs)
        for name, t in inputs.arguments().items():
            leaf = t.detach().requires_grad_()
            outputs = mk.routed_lora(**inputs.kwargs() | {name: leaf}, impl=cpu_impl)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = zip(outputs, (inputs.dout, inputs.dload), strict=False)
            used = [(o, g) for o, g in pairs if o.requires_grad]
            (grad,) = torch.autograd.grad([o for o, _ in used], leaf, [g for _, g in used])
            assert_bitwise_equal(grad, everything[f"d{name}"], name)


def test_gradient_through_load_alone(cpu_impl):
    inputs = random_inputs(*SHAPE, load=True).map(lambda t: t.requires_grad_())
    _, load = mk.routed_lora(**inputs.kwargs(), impl=cpu_impl)
    mk.balance_loss(load).backward()
    reference = random_inputs(*SHAPE, load=True).map(lambda t: t.requires_grad_())
    _, load = mk.routed_lora(**reference.kwargs(), impl="reference")
    mk.balance_loss(load).backward()
    assert_bitwise_equal(inputs.router.grad, reference.router.grad)
    assert_bitwise_equal(inputs.x.grad, reference.x.grad)
    assert inputs.router.grad.abs().max() > 0 and inputs.lora_b.grad.abs().max() == 0


def test_no_second_derivative(cpu_impl):
    inputs = random_inputs(*SHAPE).map(lambda t: t.requires_grad_())
    out = mk.routed_lora(**inputs.kwargs(), impl=cpu_impl)
    (dx,) = torch.autograd.grad(out.sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="routed_lora has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "router", "expert_scale"])
def test_changing_a_saved_tensor_raises(cpu_impl, name):
    inputs = random_inputs(*SHAPE, expert_scale=True).map(lambda t: t.requires_grad_())
    out = mk.routed_lora(**inputs.kwargs(), impl=cpu_impl)
    with torch.no_grad():
        getattr(inputs, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_changing_the_residual_or_the_output_is_allowed(cpu_impl):
    inputs = random_inputs(*SHAPE)
    expected = run_case(cpu_impl, inputs)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.arguments().items()}
    out = mk.routed_lora(**leaves, **inputs.options, impl=cpu_impl)
    with torch.no_grad():
        leaves["residual"].zero_()
    out.mul_(1)
    out.backward(inputs.dout)
    for name, leaf in leaves.items():
        assert_bitwise_equal(leaf.grad, expected[f"d{name}"], name)


def test_outputs_never_alias_inputs(cpu_impl):
    inputs = random_inputs(*SHAPE, scaling=0.0, route_weights=True, load=True)
    pointers = {t.untyped_storage().data_ptr() for t in inputs.arguments().values()}
    for t in OPS.routed_lora_fwd(*forward_args(inputs, cpu_impl)):
        assert t.untyped_storage().data_ptr() not in pointers


def test_experts_as_a_list(cpu_impl):
    inputs = random_inputs(*SHAPE)
    expected = run_case(cpu_impl, inputs)
    experts = [b.clone().requires_grad_() for b in inputs.lora_b]
    out = mk.routed_lora(**inputs.kwargs() | {"lora_b": experts}, impl=cpu_impl)
    out.backward(inputs.dout)
    assert_bitwise_equal(out, expected["out"])
    assert_bitwise_equal(torch.stack([b.grad for b in experts]), expected["dlora_b"])


def test_leading_dimensions(cpu_impl):
    inputs = random_inputs(*SHAPE, load=True)
    out, load = mk.routed_lora(**inputs.kwargs(), impl=cpu_impl)
    for leading in ((2, 3), (1, 6, 1), (3, 1, 2)):
        shaped = {"x": inputs.x.view(*leading, -1), "residual": inputs.residual.view(*leading, -1)}
        again, load_again = mk.routed_lora(**inputs.kwargs() | shaped, impl=cpu_impl)
        assert_bitwise_equal(again, out.view(*leading, -1))
        assert_bitwise_equal(load_again, load)
    one = mk.routed_lora(
        **inputs.kwargs() | {"x": inputs.x[0], "residual": inputs.residual[0], "return_load": False}, impl=cpu_impl
    )
    assert_bitwise_equal(one, out[0])


def test_route_weights_per_sequence(cpu_impl):
    inputs = random_inputs(*SHAPE, route_weights=True)
    x, residual = inputs.x.view(2, 3, -1), inputs.residual.view(2, 3, -1)
    row = inputs.route_weights[:2].clone().requires_grad_()
    given = inputs.kwargs() | {"x": x, "residual": residual}
    out = mk.routed_lora(**given | {"route_weights": row}, impl=cpu_impl)
    spread = row.detach()[:, None].repeat(1, 3, 1, 1).requires_grad_()
    expected = mk.routed_lora(**given | {"route_weights": spread}, impl=cpu_impl)
    assert_bitwise_equal(out, expected)
    dout = inputs.dout.view_as(out)
    out.backward(dout)
    expected.backward(dout)
    assert_bitwise_equal(row.grad, spread.grad.sum(1))


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(cpu_impl, leading):
    inputs = random_inputs(0, *SHAPE[1:], residual=False, load=True)
    x = torch.empty(*leading, 24, requires_grad=True)
    lora_a = inputs.lora_a.requires_grad_()
    out, load = mk.routed_lora(**inputs.kwargs() | {"x": x, "lora_a": lora_a}, impl=cpu_impl)
    assert out.shape == (*leading, 32)
    assert load.isnan().all()
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert_bitwise_equal(lora_a.grad, torch.zeros_like(lora_a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_defaults_of_new_tensors_decide_nothing(cpu_impl, dtype):
    inputs = random_inputs(*SHAPE, expert_scale=True, load=True)
    expected = run_case(cpu_impl, inputs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            actual = run_case(cpu_impl, inputs)
    finally:
        torch.set_default_dtype(before)
    for name, t in actual.items():
        assert_bitwise_equal(t, expected[name])


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "router", "residual", "expert_scale"])
def test_one_float64_tensor_is_served_by_the_reference(name):
    inputs = random_inputs(*SHAPE, expert_scale=True).with_options(compute_dtype=torch.float32)
    setattr(inputs, name, getattr(inputs, name).double())
    if name == "residual":
        inputs.dout = inputs.dout.double()
    expected = run_case("reference", inputs)
    for result, t in run_case(None, inputs).items():
        assert_bitwise_equal(t, expected[result], result)
    if "cpu" in mk.available_impls("cpu"):
        with pytest.raises(ValueError, match=r"impl is 'cpu'.*float64"):
            run_case("cpu", inputs)


def test_meta_tensors_give_shapes():
    inputs = random_inputs(*SHAPE, dtype=torch.bfloat16, load=True).map(lambda t: t.to("meta"))
    out, load = mk.routed_lora(**inputs.kwargs())
    assert out.is_meta and out.shape == inputs.residual.shape and out.dtype == torch.bfloat16
    assert load.is_meta and load.shape == inputs.dload.shape and load.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(cpu_impl, dtype):
    inputs = random_inputs(*SHAPE, expert_scale=True)
    without = run_case(cpu_impl, inputs)
    with torch.autocast("cpu", dtype):
        actual = run_case(cpu_impl, inputs)
    assert_bitwise_equal(run_case(cpu_impl, inputs)["out"], without["out"])
    expected = run_case("reference", inputs.with_options(compute_dtype=dtype))
    for name, t in actual.items():
        assert t.dtype == torch.float32
        assert_bitwise_equal(t, expected[name], name)
    assert (actual["out"] != run_case("reference", inputs)["out"]).any()
    with torch.autocast("cpu", dtype):
        explicit = mk.routed_lora(**inputs.kwargs(), compute_dtype=torch.float32, impl=cpu_impl)
    assert_bitwise_equal(explicit, run_case("reference", inputs)["out"])


def test_dropout_seed(cpu_impl):
    inputs = random_inputs(*SHAPE, dropout_p=0.5)
    seeded = mk.routed_lora(**inputs.kwargs(), impl=cpu_impl)
    as_tensor = torch.tensor(inputs.options["dropout_seed"])
    assert_bitwise_equal(mk.routed_lora(**inputs.kwargs() | {"dropout_seed": as_tensor}, impl=cpu_impl), seeded)

    def drawn():
        return mk.routed_lora(**inputs.kwargs() | {"dropout_seed": None}, impl=cpu_impl)

    torch.manual_seed(7)
    first, second = drawn(), drawn()
    torch.manual_seed(7)
    assert_bitwise_equal(drawn(), first)
    assert (first != second).any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_redraws_the_same_dropout(cpu_impl, reentrant):
    def results(run):
        inputs = random_inputs(*SHAPE, dropout_p=0.5, dropout_seed=None).map(lambda t: t.requires_grad_())
        torch.manual_seed(3)
        out = run(lambda x: mk.routed_lora(**inputs.kwargs() | {"x": x}, impl=cpu_impl), inputs.x)
        torch.randn(5)  # the generator has moved on when backward recomputes
        out.backward(inputs.dout)
        return [out, *(t.grad for t in inputs.arguments().values())]

    plain = results(lambda function, x: function(x))
    recomputed = results(lambda function, x: checkpoint(function, x, use_reentrant=reentrant))
    for actual, expected in zip(recomputed, plain, strict=True):
        assert_bitwise_equal(actual, expected)


def test_inference_mode(cpu_impl):
    inputs = random_inputs(*SHAPE)
    with torch.inference_mode():
        out = mk.routed_lora(**inputs.kwargs(), impl=cpu_impl)
    assert_bitwise_equal(out, run_case(cpu_impl, inputs)["out"])


def compiled_results(function, inputs):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.arguments().items()}
    out = function(**leaves)
    out, load = out if isinstance(out, tuple) else (out, None)
    loss = (out * inputs.dout).sum() + (0 if load is None else (load * inputs.dload).sum())
    loss.backward()
    return [out, *([] if load is None else [load]), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, FULL | {"dtype": torch.bfloat16}, {"route_weights": True}], ids=str)
def test_compiled_equals_eager(cpu_impl, options, backend):
    torch._dynamo.reset()
    inputs = random_inputs(*SHAPE, **options)

    def function(**tensors):
        return mk.routed_lora(**tensors, **inputs.options, impl=cpu_impl)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    actual, expected = compiled_results(compiled, inputs), compiled_results(function, inputs)
    for t, e in zip(actual, expected, strict=True):
        assert_bitwise_equal(t, e)


def test_number_of_tokens_does_not_recompile(cpu_impl):
    torch._dynamo.reset()
    counter, frames = CompileCounterWithBackend("aot_eager"), set()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def function(**tensors):
        return mk.routed_lora(**tensors, num_groups=2, impl=cpu_impl)

    for tokens in (6, 9, 33, 64, 200):
        inputs = random_inputs(tokens, *SHAPE[1:], scaling=1.0)
        assert_bitwise_equal(function(**inputs.arguments()), mk.routed_lora(**inputs.kwargs(), impl=cpu_impl))
        frames.add(counter.frame_count)
    assert len(frames) == 1
