"""Blocks with an adapter under a checkpoint that is not reentrant: what is rerun, and the same gradients."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtlora_kernels as mk

WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, hidden_states):
        return self.down(self.up(hidden_states).relu())


def adapted(block=Block, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": block()})
    adapter = mk.nn.attach_block_adapters(model, ["block"], WIDTH, 2, 2, freeze_base=True, **options)["block"]
    nn.init.normal_(adapter.lora_B)
    adapter.runs = []
    adapter.register_forward_pre_hook(lambda *_: adapter.runs.append(1))
    return model["block"], adapter


def gradients(call, block, x):
    out = call(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *(p for p in block.parameters() if p.requires_grad)])]


def checkpointed(block):
    return lambda x: checkpoint(block, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("options", "runs"),
    [({}, 1), ({"num_groups": 2, "dropout": 0.5}, 1), ({"style": "bottleneck"}, 1), ({"num_groups": WIDTH}, 2)],
    ids=str,
)
def test_the_adapter_runs_once_where_what_it_holds_is_small(options, runs):
    block, adapter = adapted(**options)
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    torch.manual_seed(1)
    expected = gradients(block, block, x)
    adapter.runs.clear()
    torch.manual_seed(1)
    got = gradients(checkpointed(block), block, x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(adapter.runs) == runs


def test_the_last_layer_is_not_rerun():
    block, _ = adapted()
    x, done = torch.randn(5, WIDTH, requires_grad=True), []
    block.down.register_forward_hook(lambda *_: done.append(1))
    gradients(checkpointed(block), block, x)
    assert len(done) == 1


def test_gradients_are_those_without_the_hook():
    block, adapter = adapted()
    for x in (torch.randn(5, WIDTH, requires_grad=True), torch.randn(2, 3, WIDTH).requires_grad_()):
        out = adapter(x, Block.forward(block, x))
        parameters = [p for p in adapter.parameters() if p is not None]
        expected = torch.autograd.grad(out.square().sum(), parameters)
        got = torch.autograd.grad(block(x).square().sum(), parameters)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("retain", [False, True])
def test_another_call_on_the_input_saves_it_itself(retain):
    """A checkpoint gives a saved tensor once per backward."""
    block, _ = adapted()
    block.up = mk.nn.RoutedLoRALinear(block.up, rank=2, num_experts=2)
    nn.init.normal_(block.up.lora_B)
    x = torch.randn(5, WIDTH, requires_grad=True)
    expected = gradients(block, block, x)
    out = checkpointed(block)(x)
    trained = [x, *(p for p in block.parameters() if p.requires_grad)]
    for again in (True, False) if retain else (False,):
        got = torch.autograd.grad(out.square().sum(), trained, retain_graph=again)
        assert all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))


@pytest.mark.parametrize("through_the_input", [False, True])
def test_backward_frees_what_is_held_and_does_not_run_twice(through_the_input):
    block, adapter = adapted()
    x = torch.randn(5, WIDTH, requires_grad=True)
    loss = block(x).sum()
    held = loss.grad_fn.next_functions[0][0].saved
    wanted = [adapter.lora_B, *([x] if through_the_input else [])]
    torch.autograd.grad(loss, wanted, retain_graph=True)
    assert held.rest is not None
    torch.autograd.grad(loss, wanted)
    assert held.rest is None
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, wanted)


def test_an_input_that_another_backward_freed_raises():
    """As compiled autograd is after an eager forward, which takes saved tensors away before any backward runs."""
    block, _ = adapted()
    inside = []
    block.up.register_forward_hook(lambda _module, _args, out: inside.append(out))
    x = torch.randn(5, WIDTH, requires_grad=True)
    loss = block(x).sum()
    torch.autograd.grad(inside[0].sum(), x)
    with pytest.raises(RuntimeError, match="cannot read the input that keep_input saved, as compiled"):
        loss.backward()


def test_an_input_without_gradient_and_a_call_by_keyword():
    block, adapter = adapted()
    x = torch.randn(5, WIDTH)
    out = block(hidden_states=x)
    assert torch.equal(out, block(x)) and torch.equal(out, block(hidden_states=x.clone().requires_grad_()))
    out.sum().backward()
    assert adapter.lora_B.grad.any()


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "lora_route"])
def test_a_parameter_changed_in_place_raises(name):
    block, adapter = adapted()
    out = block(torch.randn(5, WIDTH, requires_grad=True))
    with torch.no_grad():
        getattr(adapter, name).add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_an_input_changed_in_place_raises():
    block, _ = adapted()
    x = torch.randn(5, WIDTH, requires_grad=True) * 2
    out = block(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_block_may_change_its_input_in_place():
    class InPlace(Block):
        def forward(self, hidden_states):
            return self.down(self.up(hidden_states.relu_()))

    block, adapter = adapted(InPlace)
    x = torch.randn(5, WIDTH, requires_grad=True)
    got = gradients(lambda x: block(x * 1), block, x)
    expected = gradients(lambda x: adapter(x.relu(), block.down(block.up(x.relu()))), block, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_second_derivative():
    block, _ = adapted()
    x = torch.randn(5, WIDTH, requires_grad=True)
    (dx,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()
