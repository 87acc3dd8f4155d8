"""The modules are the functional call with their own parameters, bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn

import mtlora_kernels as mk

STYLES = ("lowrank", "bottleneck", "adaptformer")
ACTIVATIONS = {"lowrank": None, "bottleneck": "relu", "adaptformer": "relu"}


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter random: a zero B hides mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def functional(module: mk.nn.RoutedLoRA, x, residual=None, **options):
    scales = module.expert_scales
    return mk.routed_lora(
        x,
        module.lora_A,
        module.lora_B,
        module.lora_route,
        residual,
        scaling=module.scaling,
        num_groups=module.num_groups,
        numerics=module.numerics,
        activation=ACTIVATIONS[module.style],
        expert_scale=None if scales is None else scales.flatten(),
        **options,
    )


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("num_groups", [1, 3, 24])
@pytest.mark.parametrize("style", STYLES)
def test_block_adapter_is_the_functional_call(style, num_groups, numerics):
    module = randomised(mk.nn.RoutedLoRA(24, 4, 3, num_groups=num_groups, style=style, numerics=numerics))
    x, residual = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 24, requires_grad=True)
    results = []
    for call in (module, lambda x, residual: functional(module, x, residual)):
        out = call(x, residual)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, residual, *module.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(module(x), functional(module, x))


@pytest.mark.parametrize("style", STYLES)
def test_block_adapter_matches_the_reference(style):
    module = randomised(mk.nn.RoutedLoRA(32, 4, 3, num_groups=2, style=style)).eval()
    mk.testing.assert_matches_reference(module, torch.randn(2, 5, 32))


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_base_output_plus_mixture(bias, numerics):
    base = nn.Linear(24, 40, bias=bias)
    module = mk.nn.RoutedLoRALinear(base, 4, 3, num_groups=5, numerics=numerics)
    x = torch.randn(2, 5, 24)
    assert torch.equal(module(x), base(x))  # B starts at zero
    nn.init.normal_(module.lora_B)
    expected = functional(module, x, base(x), accumulate_into_residual=numerics == "eager")
    assert torch.equal(module(x), expected)
    assert module.weight is base.weight and module.bias is base.bias
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B", "lora_route"}


def test_other_frozen_layers_take_an_adapter_with_out_features():
    layer = nn.Sequential(nn.Linear(24, 40), nn.GELU())
    adapter = randomised(mk.nn.RoutedLoRA(24, 4, 3, out_features=40))
    x = torch.randn(7, 24)
    assert torch.equal(adapter(x, layer(x)), functional(adapter, x, layer(x)))


@pytest.mark.parametrize("style", STYLES)
def test_one_expert_has_no_router(style):
    module = randomised(mk.nn.RoutedLoRA(16, 2, 1, num_groups=4, style=style))
    assert module.lora_route is None
    x = torch.randn(3, 16)
    hidden = x @ module.lora_A.T
    hidden = hidden if style == "lowrank" else hidden.relu()
    scale = module.expert_scales[0] if style == "adaptformer" else module.scaling
    torch.testing.assert_close(module(x), scale * (hidden @ module.lora_B[0].T))


@pytest.mark.parametrize("style", STYLES)
def test_initial_values_are_the_published_ones(style):
    module = mk.nn.RoutedLoRA(600, 8, 4, style=style, num_groups=4, scale_init=0.25)
    bound = 1 / math.sqrt(600) if style == "lowrank" else math.sqrt(6 / 600)
    assert 0.95 * bound < module.lora_A.abs().max() <= bound
    assert 0.95 / math.sqrt(600) < module.lora_route.abs().max() <= 1 / math.sqrt(600)
    if style == "bottleneck":
        assert module.lora_B.std().item() == pytest.approx(0.02, rel=0.05)
    else:
        assert not module.lora_B.any()
    if style == "adaptformer":
        assert (module.expert_scales == 0.25).all()


def test_adaptformer_trains_from_its_default_start():
    module = mk.nn.RoutedLoRA(16, 2, 3, style="adaptformer")
    x = torch.randn(8, 16)
    assert not module(x).any()
    module(x).sum().backward()
    assert module.lora_B.grad.any()


def test_dropout_is_on_in_training_only():
    module = randomised(mk.nn.RoutedLoRA(16, 2, 3, dropout=0.5))
    x = torch.randn(8, 16)
    torch.manual_seed(0)
    first, second = module(x), module(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), first) and not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, functional(module, x, dropout_p=0.5))
    assert torch.equal(module.eval()(x), functional(module, x))


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_fp32_parameters_under_a_bf16_model(compute_dtype):
    module = randomised(mk.nn.RoutedLoRA(16, 2, 3, compute_dtype=compute_dtype))
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    out = module(x, x)
    assert out.dtype == (compute_dtype or torch.bfloat16)
    assert torch.equal(out, functional(module, x, x, compute_dtype=compute_dtype))
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_dtype_and_device_moves():
    module = randomised(mk.nn.RoutedLoRA(16, 2, 3, style="adaptformer", track_load=True))
    moved = copy.deepcopy(module).to(torch.bfloat16)
    assert {p.dtype for p in moved.parameters()} == {torch.bfloat16}
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    assert torch.equal(moved(x), functional(moved, x))
    meta = mk.nn.RoutedLoRA(16, 2, 3, style="adaptformer", device="meta")
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    meta.to_empty(device="cpu").load_state_dict(module.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(meta(x), module(x))
    assert mk.nn.RoutedLoRA(16, 2, 3, dtype=torch.float16).lora_B.dtype == torch.float16


def test_deepcopy_is_equal_and_independent():
    module = randomised(mk.nn.RoutedLoRA(16, 2, 3, balance_coef=0.1))
    x = torch.randn(4, 16)
    module(x).sum().backward()
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x)) and torch.equal(twin.last_load, module.last_load)
    nn.init.zeros_(twin.lora_B)
    assert module(x).any()


@pytest.mark.parametrize("style", STYLES)
def test_compiled_equals_eager(style):
    module = randomised(mk.nn.RoutedLoRA(16, 2, 3, num_groups=2, style=style, dropout=0.3))
    torch._dynamo.reset()  # a float that differs from an earlier test's would be traced as a symbol
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16, requires_grad=True)
    results = []
    for call in (module, compiled):
        torch.manual_seed(0)
        out = call(x, x)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_merge_says_why_and_what_to_do():
    with pytest.raises(NotImplementedError, match=r"depend on the token.*Keep the module"):
        mk.nn.RoutedLoRALinear(nn.Linear(8, 8), 2, 2).merge()


def test_repr_shows_the_settings():
    text = repr(mk.nn.RoutedLoRA(16, 2, 4, group_size=4, alpha=8, style="bottleneck", dropout=0.1))
    for part in ("in_features=16", "rank=2", "num_experts=4", "num_groups=4", "'bottleneck'", "scaling=4.0"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"rank": 129}, r"rank is 129, it must be in \[1, 128\]"),
        ({"num_experts": 129}, r"num_experts is 129, it must be in \[1, 128\]"),
        ({"dropout": 1.0}, r"dropout is 1.0, it must be in \[0, 1\)"),
        ({"style": "moe"}, "style is 'moe'"),
        ({"num_groups": 5}, "num_groups is 5"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"group_size": 5}, "group_size is 5"),
        ({"num_groups": 2, "group_size": 8}, "give one"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mk.nn.RoutedLoRA(**({"features": 16, "rank": 2, "num_experts": 4} | options))


@pytest.mark.parametrize("name", ["rank", "num_experts", "features", "num_groups"])
def test_sizes_are_ints(name):
    with pytest.raises(TypeError, match=f"{name} is float, it must be an int"):
        mk.nn.RoutedLoRA(**({"features": 16, "rank": 2, "num_experts": 4} | {name: 2.0}))


def test_reset_parameters_leaves_no_load_behind():
    module = mk.nn.RoutedLoRA(16, 2, 3, device="meta").to_empty(device="cpu")  # as FSDP2's deferred start does
    module.last_load.fill_(torch.nan)
    module.reset_parameters()
    assert not module.last_load.any() and not module.lora_B.any()


def test_linear_refuses_layers_with_another_forward():
    class Quantised(nn.Linear):
        def forward(self, x):
            return super().forward(x.round())

    for base in (Quantised(8, 8), nn.Identity()):
        with pytest.raises(TypeError, match=r"must be a plain nn\.Linear"):
            mk.nn.RoutedLoRALinear(base, 2, 2)
