"""The injected balance gradient is, bit for bit, that of the term added to the loss."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtlora_kernels as mk

COEF = 0.7


def make(coef: float = COEF, **options) -> mk.nn.RoutedLoRA:
    torch.manual_seed(0)
    module = mk.nn.RoutedLoRA(16, 2, 3, num_groups=2, balance_coef=coef, **options)
    nn.init.normal_(module.lora_B)
    nn.init.normal_(module.lora_route)
    return module


def grads(module: nn.Module, loss: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [x, *module.parameters()]))


def explicit(module: mk.nn.RoutedLoRA, x: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
    out, load = mk.routed_lora(
        x,
        module.lora_A,
        module.lora_B,
        module.lora_route,
        x,
        scaling=module.scaling,
        num_groups=module.num_groups,
        return_load=True,
    )
    return grads(module, (out.sin().sum() + module.balance_coef * mk.balance_loss(load)) * scale, x)


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def wrapped(kind: str, module: nn.Module):
    """The module under one of the ways a training loop may run it."""

    def compiled(call):
        torch._dynamo.reset()  # a float that differs from an earlier test's would be traced as a symbol
        return torch.compile(call, fullgraph=True, backend="aot_eager")

    calls = {
        "plain": lambda: module,
        "reentrant": lambda: lambda x, r: checkpoint(module, x, r, use_reentrant=True),
        "non-reentrant": lambda: lambda x, r: checkpoint(module, x, r, use_reentrant=False),
        "compiled": lambda: compiled(module),
        "compiled checkpoint": lambda: compiled(lambda x, r: checkpoint(module, x, r, use_reentrant=False)),
        "reentrant compiled": lambda: lambda x, r: checkpoint(compiled(module), x, r, use_reentrant=True),
    }
    return calls[kind]()


KINDS = ("plain", "reentrant", "non-reentrant", "compiled", "compiled checkpoint", "reentrant compiled")


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_the_explicit_term(kind):
    module, x = make(), torch.randn(2, 5, 16, requires_grad=True)
    expected = explicit(module, x)
    out = wrapped(kind, module)(x, x)
    out.sin().sum().backward()
    assert_equal([x.grad, *(p.grad for p in module.parameters())], expected)
    without = explicit(make(coef=0.0), x)
    assert not torch.equal(without[-1], expected[-1])
    _, load = mk.routed_lora(x, module.lora_A, module.lora_B, module.lora_route, num_groups=2, return_load=True)
    assert torch.equal(module.last_load, load.detach())


@pytest.mark.parametrize("kind", ["plain", "reentrant", "compiled"])
def test_scale_follows_the_loss(kind):
    module, x = make(), torch.randn(2, 5, 16, requires_grad=True)
    call = wrapped(kind, nn.ModuleList([module])[0])
    for scale in (0.25, 1024.0):
        x.grad = None
        module.zero_grad()
        mk.nn.set_balance_scale(nn.ModuleList([module]), scale)
        (call(x, x).sin().sum() * scale).backward()
        assert_equal([x.grad, *(p.grad for p in module.parameters())], explicit(module, x, scale))


def test_output_does_not_change_and_may_be_modified_in_place():
    x = torch.randn(2, 5, 16, requires_grad=True)
    module = make()
    assert torch.equal(module(x, x), make(coef=0.0)(x, x))
    expected = grads(module, module(x, x).mul(3).sum(), x)
    assert_equal(grads(module, module(x, x).mul_(3).sum(), x), expected)


def test_several_modules_each_add_their_own_term():
    first, second = make(), make()
    model, x = nn.Sequential(first, second), torch.randn(2, 5, 16, requires_grad=True)
    terms, h = [], x
    for module in model:
        weights = (module.lora_A, module.lora_B, module.lora_route)
        h, load = mk.routed_lora(h, *weights, scaling=module.scaling, num_groups=2, return_load=True)
        terms.append(COEF * mk.balance_loss(load))
    expected = grads(model, h.sin().sum() + terms[0] + terms[1], x)
    assert_equal(grads(model, model(x).sin().sum(), x), expected)


def test_low_precision_and_frozen_parts():
    module = make()
    module.lora_A.requires_grad_(False)
    module.lora_B.requires_grad_(False)
    x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    weights = (module.lora_A, module.lora_B, module.lora_route)
    out, load = mk.routed_lora(x, *weights, scaling=module.scaling, num_groups=2, return_load=True)
    loss = out.float().sum() + COEF * mk.balance_loss(load)
    (expected,) = torch.autograd.grad(loss, [module.lora_route])
    module(x).float().sum().backward()
    assert torch.equal(module.lora_route.grad, expected)


def test_off_in_evaluation_and_without_gradients():
    x = torch.randn(2, 5, 16, requires_grad=True)
    module = make().eval()
    assert_equal(grads(module, module(x, x).sin().sum(), x), explicit(make(coef=0.0), x))
    assert not module.last_load.any()
    with torch.no_grad():
        assert not make()(x, x).requires_grad
    with torch.inference_mode():
        make()(x, x)


@pytest.mark.parametrize("tokens", [0, 1])
def test_tiny_batches_keep_gradients_finite(tokens):
    module, x = make(), torch.randn(tokens, 16)
    module(x, x).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_tracking_alone_changes_no_gradient():
    x = torch.randn(2, 5, 16, requires_grad=True)
    tracked = make(coef=0.0, track_load=True).eval()
    assert_equal(grads(tracked, tracked(x, x).sin().sum(), x), explicit(make(coef=0.0), x))
    torch.testing.assert_close(tracked.last_load.sum(), torch.tensor(1.0))
    assert not tracked.last_load.requires_grad and "last_load" not in tracked.state_dict()


def test_linear_layers_and_one_expert_have_the_term_too():
    x = torch.randn(4, 16)
    layer = mk.nn.RoutedLoRALinear(nn.Linear(16, 8), 2, 3, balance_coef=COEF)
    layer(x).sum().backward()
    assert layer.lora_route.grad.any()  # B is zero, so only the term reaches the router
    single = mk.nn.RoutedLoRA(16, 2, 1, balance_coef=COEF)
    single(x).sum().backward()
    assert torch.equal(single.last_load, torch.ones(1))
