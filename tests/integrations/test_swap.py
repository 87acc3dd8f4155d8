"""Layers of both hosts on routed_lora: the same bits, names, state and behaviour as before the swap."""

import copy
import io
import pickle
import warnings

import hydralora_host
import published_host
import pytest
import torch
from host_layers import KINDS, D, at_random, close, experts, fill, make, on_lattice, output, results
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mtlora_kernels as mk
from mtlora_integrations import swap_in, swap_out
from mtlora_kernels import beside
from mtlora_kernels.testing import assert_bitwise_equal, differences, rounding_inputs

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEPARATE = [kind for kind in KINDS if "alone" not in kind and "mmoe" not in kind]  # several experts, one storage


@pytest.fixture
def one_accumulator():
    """cuBLAS as the contract asks: no split-K, no reduction in low precision."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.preferred_blas_library()
    flags = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    saved = [getattr(matmul, flag) for flag in flags]
    torch.backends.cuda.preferred_blas_library("cublaslt")
    for flag in flags:
        setattr(matmul, flag, (False, False))
    yield
    torch.backends.cuda.preferred_blas_library(before)
    for flag, value in zip(flags, saved, strict=True):
        setattr(matmul, flag, value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_eager_keeps_every_bit_on_lattice_inputs(kind, dtype, device):
    layer, x, dout = on_lattice(make(kind), KINDS[kind][1], dtype, device)
    expected = results(layer, x, dout)
    for numerics in ("eager", "fp32"):
        swap_in(layer, numerics=numerics, strict=True)
        assert not differences(results(layer, x, dout), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SEPARATE)
def test_eager_rounds_where_the_host_rounds(kind, dtype):
    """Exact products, then a mixture whose every rounding shows; alpha is no power of two times r."""
    layer = make(kind, **({} if kind == "adaptformer" else {"alpha": 2.4}))
    d_out, groups = getattr(layer, "out_features", D), KINDS[kind][1]
    values = rounding_inputs(12, D, d_out, 8, 8, groups, seed=1, dtype=dtype)
    fill(layer, values)
    layer.to(dtype)
    if isinstance(layer, nn.Linear):
        nn.init.zeros_(layer.weight)
        nn.init.normal_(layer.bias, std=30)
    x = values.x.view(2, 6, D)
    expected = output(layer, x)
    swap_in(layer, numerics="eager", strict=True)
    assert_bitwise_equal(output(layer, x), expected)


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("tokens", [(1, 17), (4, 64), (2, 1000)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "mmoe" not in kind])
def test_eager_keeps_every_bit_of_random_outputs_on_cuda(kind, tokens, dtype, one_accumulator):
    layer, x = at_random(kind, dtype, "cuda", tokens, (768, 1024, 16, 16))
    expected = output(layer, x)
    swap_in(layer, numerics="eager", strict=True)
    assert_bitwise_equal(output(layer, x), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_inputs_agree(kind, numerics, device):
    layer, x = at_random(kind, device=device)
    dout = torch.randn_like(output(layer, x))
    expected = results(layer, x, dout)
    swap_in(layer, numerics=numerics)
    close(results(layer, x, dout), expected)


@pytest.mark.parametrize("tokens", [(), (3,), (0,), (0, 4)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mmoe", "mmoe s", "hydralora")])
def test_any_number_of_tokens(kind, tokens):
    layer, x = at_random(kind, tokens=tokens)
    expected = output(layer, x)
    swap_in(layer)
    close({"out": output(layer, x)}, {"out": expected}) if x.numel() else output(layer, x).sum().backward()
    assert output(layer, x).shape == expected.shape


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_class_changes(kind):
    layer, x = at_random(kind)
    expected = output(layer, x)
    host, attributes = type(layer), set(vars(layer))
    saved = {name: value.clone() for name, value in layer.state_dict().items()}
    parameters = dict(layer.named_parameters())
    swap_in(layer)
    assert isinstance(layer, host) and type(layer).__name__ == host.__name__ and repr(layer).startswith(host.__name__)
    assert set(vars(layer)) == attributes
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert list(layer.state_dict()) == list(saved) and not differences(layer.state_dict(), saved)
    output(layer, x)
    swap_out(layer)
    assert type(layer) is host and set(vars(layer)) == attributes
    assert_bitwise_equal(output(layer, x), expected)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in layer.parameters() if p.requires_grad)


def address(layer: nn.Module) -> list[int]:
    return [p.untyped_storage().data_ptr() for p in experts(layer)]


class Block(nn.Module):
    """As the official code patches a block: the adapter, its child, adds to the output."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.down, self.block_adapter = nn.Linear(256, 256), adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.block_adapter(x)


@pytest.mark.parametrize("kind", ["lowrank", "bottleneck"])
def test_a_checkpointed_block_runs_its_adapter_once(kind):
    layer, x = at_random(kind, sizes=(256, 256, 8, 8))
    block, runs = Block(layer).train(), []
    x.requires_grad_()
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    attributes, hooks = set(vars(block)), len(block._forward_pre_hooks)
    swap_in(block)
    swap_in(block, numerics="fp32")
    trained = [x, *layer.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), trained)
    runs.clear()
    got = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), trained)
    assert len(runs) == 1 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    swap_out(block)
    assert set(vars(block)) == attributes and len(block._forward_pre_hooks) == hooks


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in mk.available_impls("cuda"), reason="no Hopper GPU, or not built for it")
@pytest.mark.parametrize("kind", ["lowrank grouped", "bottleneck", "component grouped", "hydralora"])
@torch.no_grad()
def test_in_a_cuda_graph_the_adapter_runs_beside_its_block(kind, monkeypatch):
    layer, x = at_random(kind, torch.bfloat16, "cuda", (4,), (256, 256, 16, 8))
    model = nn.Sequential(layer if isinstance(layer, nn.Linear) else Block(layer)).to("cuda", torch.bfloat16).eval()
    swap_in(model, impl="cuda", strict=True)
    expected, calls, run = output(model, x), [], beside.routed_lora
    monkeypatch.setattr(beside, "routed_lora", lambda *call: calls.append(1) or run(*call))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = output(model, x)
    graph.replay()
    assert len(calls) == 1 and torch.equal(out, expected)


@pytest.mark.parametrize("kind", SEPARATE)
def test_experts_share_a_storage_and_find_back_to_it(kind):
    layer, x = at_random(kind)
    dout = torch.randn_like(output(layer, x))
    expected = results(layer, x, dout)
    swap_in(layer)
    assert len(set(address(layer))) == 1
    saved = layer.state_dict()
    assert len({value.untyped_storage().data_ptr() for value in saved.values()}) == len(saved)
    moved = copy.deepcopy(layer).double()
    assert len(set(address(moved))) == 1 and address(moved) != address(layer)
    layer.load_state_dict(saved)
    assert len(set(address(layer))) == 1
    layer.load_state_dict(saved, assign=True)  # parameters of their own: stacked on every call
    assert len(set(address(layer))) > 1
    close(results(layer, x, dout), expected)


class Copies(TorchDispatchMode):
    """Counts the operators that write the experts anew."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.stack, torch.ops.aten.cat, torch.ops.aten.clone)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in SEPARATE if kind != "adaptformer"])
def test_no_call_copies_the_experts(kind, grad):
    layer, x = at_random(kind)
    swap_in(layer)
    with torch.set_grad_enabled(grad), Copies() as copies:
        output(layer, x)
    assert copies.count == 0
    layer.load_state_dict(layer.state_dict(), assign=True)
    with torch.set_grad_enabled(grad), Copies() as copies:
        output(layer, x)
    assert copies.count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_across_a_swap(kind):
    """The optimizer made before keeps its state: swapping in between changes no step."""

    def train(*swaps) -> dict[str, Tensor]:
        layer, x = at_random(kind)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
        for swap in (None, *swaps, None):
            if swap:
                swap(layer)
            optimizer.zero_grad()
            output(layer, x).square().mean().backward()
            optimizer.step()
        return dict(layer.named_parameters())

    close(train(swap_in, swap_out, swap_in), train(None, None, None))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hydralora"])  # whose dropout is a lambda
def test_copies_and_files(kind):
    layer, x = at_random(kind)
    layer.bias = getattr(layer, "bias", None)
    swap_in(layer, numerics="eager", impl="reference")
    expected = output(layer, x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(twin) is type(layer) and (twin.numerics, twin.impl) == ("eager", "reference")
        assert_bitwise_equal(output(twin, x), expected)
        nn.init.zeros_(twin.lora_A.weight) if "mmoe" not in kind else twin.double()
        assert_bitwise_equal(output(layer, x), expected)
        swap_out(twin)
    assert type(twin).__name__ == type(layer).__name__


def test_a_forward_left_on_the_instance_gives_way():
    """The official attention puts each projection's bound forward back onto the instance."""
    layer, x = at_random("component")
    layer.forward = layer.forward
    expected = output(layer, x)
    swap_in(layer, strict=True)
    assert "forward" not in vars(layer)
    layer.forward = layer.forward
    swap_out(layer)
    assert_bitwise_equal(output(layer, x), expected)


def test_keywords_are_the_hosts():
    tasks = torch.tensor([1, 2])
    component, x = at_random("component")
    swap_in(component)
    assert_bitwise_equal(component(x, task_types=tasks), component(x))
    with pytest.raises(TypeError, match="hydra_task_id"):  # by which the official attention knows the layer
        component(x, hydra_task_id=tasks)
    block, _ = at_random("lowrank")
    swap_in(block)
    assert_bitwise_equal(block(x, hydra_task_id=tasks, attention_mask=None), block(x))
    hydra, _ = at_random("hydralora")
    swap_in(hydra)
    out, balance = hydra(x, task_types=tasks)
    assert out.shape == (2, 5, 64) and balance.shape == () and balance == 0 and balance.dtype == x.dtype


@pytest.mark.parametrize("keyword", ["task_id", "hydra_task_id"])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_mmoe_takes_its_weights_from_the_task(keyword, task):
    layer, x = at_random("mmoe", tokens=(1, 5))
    given = {keyword: torch.tensor([task])}
    expected = layer(x, **given)
    swap_in(layer)
    torch.testing.assert_close(layer(x, **given), expected)
    assert task == 0 or not torch.equal(layer(x, **given), layer(x))


@pytest.mark.parametrize("state", ["disable_adapters", "merged"])
@pytest.mark.parametrize("kind", ["component", "mmoe", "hydralora"])
def test_switched_off_layers_run_the_host(kind, state):
    layer, x = at_random(kind)
    setattr(layer, state, True)
    if kind == "hydralora" and state == "disable_adapters":
        swap_in(layer)
        with pytest.raises(ImportError, match="no answer"):
            layer(x)
        return
    expected = output(layer, x)
    swap_in(layer)
    assert_bitwise_equal(output(layer, x), expected)


@pytest.mark.parametrize("kind", SEPARATE)
def test_dropout_is_active_in_training_alone(kind):
    layer, x = at_random(kind, dropout=0.5)
    layer.eval()
    expected = output(layer, x)
    report = swap_in(layer)
    own_masks = kind in ("component", "component transposed", "hydralora")
    assert ("one dropout mask for all experts" in str(report)) == own_masks
    torch.testing.assert_close(output(layer, x), expected, rtol=1e-4, atol=1e-5)
    layer.train()
    assert not torch.equal(output(layer, x), output(layer, x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, x_dtype):
    layer, x = at_random(kind)
    x = x.to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = output(layer, x)
        swap_in(layer)
        actual = output(layer, x)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.05)
        swap_in(layer, numerics="eager", strict=True)
        if "adaptformer" in kind or (x_dtype == torch.float32 and hasattr(layer, "num_experts")):
            with pytest.raises(RuntimeError, match="numerics is 'eager', but the layer computes in"):
                output(layer, x)
            swap_in(layer, numerics="eager")
            with pytest.warns(UserWarning, match="the host's forward runs instead"):
                assert_bitwise_equal(output(layer, x), expected)
        else:
            torch.testing.assert_close(output(layer, x), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", SEPARATE)
def test_adapter_in_fp32_beside_a_model_in_bf16(kind):
    layer, x = at_random(kind)
    if kind == "hydralora":
        pytest.skip("the host refuses it")
    if isinstance(layer, nn.Linear):
        layer.weight.data, layer.bias.data = layer.weight.bfloat16(), layer.bias.bfloat16()
    x = x.bfloat16()
    expected = output(layer, x)
    swap_in(layer)
    actual = output(layer, x)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)  # the host rounds its weights to bf16


def test_mmoe_scales_first_so_eager_wants_a_power_of_two():
    layer, x = at_random("mmoe", alpha=24)
    expected = layer(x)
    swap_in(layer, numerics="eager")
    with pytest.warns(UserWarning, match=r"scaling is 3\.0"):
        assert_bitwise_equal(layer(x), expected)
    swap_in(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    layer, x = at_random(kind, blc=True) if kind not in ("mmoe", "mmoe s", "hydralora") else at_random(kind)
    swap_in(layer)
    expected = output(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(output(compiled, x), expected)
    output(compiled, x).sum().backward()


class Model(nn.Module):
    def __init__(self, **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def broken(change) -> nn.Module:
    layer = make("component")
    change(layer)
    return layer


def without_router(layer: nn.Module) -> nn.Module:
    layer.lora_route = None
    return layer


class Overriding(published_host.LowRankBlockAdapter):
    def forward(self, x, **kwargs):
        return super().forward(x) + 1


class Inheriting(published_host.LowRankBlockAdapter):
    pass


MISFITS = {
    "overrides its forward": lambda: Overriding(D, 8, 4),
    "forward was replaced on the instance": lambda: broken(lambda m: setattr(m, "forward", lambda x: x)),
    "lora_A is Linear.*without bias": lambda: broken(lambda m: setattr(m, "lora_A", nn.Linear(D, 8))),
    "lora_B1 has forward hooks": lambda: broken(lambda m: m.lora_B1.register_forward_hook(lambda *_: None)),
    "router has shape": lambda: broken(lambda m: setattr(m, "lora_route", nn.Linear(D, 5, bias=False))),
    r"lora_b\[3\] has shape": lambda: broken(lambda m: setattr(m, "lora_B3", nn.Linear(8, 63, bias=False))),
    "num_groups is 5": lambda: broken(lambda m: setattr(m, "num_groups", 5)),
    "LoraLinear is incomplete: 'lora_B8'": lambda: broken(lambda m: setattr(m, "lora_num", 9)),
    "router is None with 8 experts": lambda: without_router(make("lowrank")),
    "130 experts": lambda: published_host.LowRankBlockAdapter(8, 2, 130),
    "no adapter layer that this package knows": lambda: Model(lora_A=nn.Linear(2, 2)),
}


@pytest.mark.parametrize("why", MISFITS)
def test_the_report_says_why_a_layer_stays(why):
    model = Model(good=make("lowrank"), heir=Inheriting(D, 8, 4), bad=MISFITS[why](), plain=nn.Linear(3, 3))
    types = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=f"strict is True, but not every.*\n(.*\n)*  not bad: .*{why}"):
        swap_in(model, strict=True)
    assert {name: type(m) for name, m in model.named_modules()} == types
    report = swap_in(model)
    assert list(report.swapped) == ["good", "heir"] and list(report.skipped) == ["bad"]
    assert report.shared_bytes == (8 + 4) * D * 8 * 4
    assert "LowRankBlockAdapter, 8 experts of rank 8, 1 groups" in str(report)
    assert type(model.bad) is types["bad"] and isinstance(model.heir, Inheriting)


def test_settings_are_checked_first():
    model = Model(good=make("lowrank"), ours=mk.nn.RoutedLoRA(8, 2, 3))
    with pytest.raises(ValueError, match="numerics is 'exact', it must be"):
        swap_in(model, numerics="exact")
    with pytest.raises(ValueError, match=r"^impl is 'nothing', it must be None or one of \('reference'"):
        swap_in(model, impl="nothing")
    assert not swap_in(model, strict=True).skipped
    with pytest.raises(ValueError, match="no adapter layer can be swapped"):
        swap_in(nn.Linear(2, 2), strict=True)
    assert str(swap_in(nn.Linear(2, 2))) == "swapped 0 adapter layers, 0.0 MiB of experts share storages"


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = Model(good=make("lowrank"))
    swap_in(model, strict=True)
    model.to_empty(device="cpu")
    assert len(set(address(model.good))) == 1


def test_both_hosts_linear_layers_are_told_apart():
    model = Model(published=make("component"), hydra=make("hydralora"))
    swap_in(model, strict=True)
    x = torch.randn(2, 5, D)
    assert isinstance(model.published(x), Tensor) and isinstance(model.hydra(x), tuple)
    assert isinstance(model.hydra, hydralora_host.Linear)
