"""Adapters attached to the blocks of a model: hooks, names, copies, compilation, checkpointing."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtlora_kernels as mk

WIDTH = 12


class Attention(nn.Module):
    """Called with a keyword, returns a tuple, as in Transformers."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, mask=None):
        return self.proj(hidden_states).tanh(), None


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.mlp = Mlp()

    def forward(self, x):
        x = x + self.attention(hidden_states=x, mask=None)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.checkpointing = {}

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, **self.checkpointing) if self.checkpointing else layer(x)
        return x


BLOCKS = r"layers\.\d+\.(attention|mlp)"


def adapted(**options) -> Model:
    torch.manual_seed(0)
    model = Model()
    for adapter in mk.nn.attach_block_adapters(model, BLOCKS, WIDTH, 2, 3, num_groups=2, **options).values():
        nn.init.normal_(adapter.lora_B)
    return model


def results(model, call, x) -> list[torch.Tensor]:
    """Output and every gradient, from one state of the random generator."""
    torch.manual_seed(1)
    out = call(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    for tensor in inputs:
        tensor.grad = None
    out.sin().sum().backward()
    return [out.detach(), *(tensor.grad for tensor in inputs)]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_each_block_returns_output_plus_adapter():
    model = adapted()
    x = torch.randn(2, 5, WIDTH)
    for block in model.layers[0].children():
        plain = block.forward(x)  # forward() itself runs no hooks
        expected = block.block_adapter(x, plain[0] if isinstance(plain, tuple) else plain)
        for out in (block(x), block(hidden_states=x) if isinstance(block, Attention) else block(x)):
            assert torch.equal(out[0] if isinstance(out, tuple) else out, expected)
            assert type(out) is type(plain)


def test_zero_adapters_leave_the_model_unchanged():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 5, WIDTH)
    expected = model(x)
    names = set(model.state_dict())
    adapters = mk.nn.attach_block_adapters(model, ["layers.0.mlp", "layers.1.attention"], WIDTH, 2, 3)
    assert list(adapters) == ["layers.0.mlp", "layers.1.attention"]
    assert torch.equal(model(x), expected)
    new = {f"{name}.block_adapter.{key}" for name, a in adapters.items() for key in a.state_dict()}
    assert set(model.state_dict()) == names | new
    assert "layers.0.mlp.block_adapter.lora_B.2.weight" in new


def test_nothing_is_frozen_unless_asked():
    assert all(p.requires_grad for p in adapted().parameters())
    model = adapted(freeze_base=True)
    assert all(p.requires_grad == ("block_adapter" in name) for name, p in model.named_parameters())


def test_training_mode_follows_the_block():
    torch.manual_seed(0)
    model = Model().eval()
    mk.nn.attach_block_adapters(model, BLOCKS, WIDTH, 2, 3, dropout=0.5, style="bottleneck")
    x = torch.randn(3, WIDTH)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_deepcopy_and_whole_model_files_keep_the_hooks():
    model, x = adapted(balance_coef=0.1, dropout=0.1), torch.randn(3, WIDTH, requires_grad=True)
    expected = results(model, model, x)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        assert_equal(results(other, other, x), expected)
    nn.init.zeros_(twin.layers[0].mlp.block_adapter.lora_B)  # the copy's hook must run the copy's adapter
    assert not torch.equal(results(twin, twin, x)[0], expected[0])
    assert_equal(results(model, model, x), expected)


def test_state_dict_round_trip():
    model, x = adapted(), torch.randn(3, WIDTH)
    other = adapted(style="lowrank")
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_equals_plain(use_reentrant):
    model = adapted(dropout=0.3, balance_coef=0.5)
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    expected = results(model, model, x)
    model.checkpointing = {"use_reentrant": use_reentrant}
    assert_equal(results(model, model, x), expected)


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}])
def test_compiled_equals_eager(checkpointing):
    model = adapted(dropout=0.3, balance_coef=0.5)
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    expected = results(model, model, x)
    loads = [module.last_load.clone() for module in model.modules() if hasattr(module, "last_load")]
    model.checkpointing = checkpointing
    torch._dynamo.reset()  # a float that differs from an earlier test's would be traced as a symbol
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(results(model, compiled, x), expected)
    assert loads and all(load.any() for load in loads)
    assert_equal([m.last_load for m in model.modules() if hasattr(m, "last_load")], loads)


def test_a_patched_forward_keeps_the_adapter():
    model, x = adapted(), torch.randn(3, WIDTH)
    expected = model(x)
    block = model.layers[0].mlp
    original = block.forward
    block.forward = lambda x: original(x)
    assert torch.equal(model(x), expected)


def test_attaching_twice_raises_and_changes_nothing():
    model, x = adapted(), torch.randn(3, WIDTH)
    expected, names = model(x), list(model.state_dict())
    with pytest.raises(ValueError, match=r"layers\.0\.mlp already has a block_adapter"):
        mk.nn.attach_block_adapters(model, ["layers.1", "layers.0.mlp"], WIDTH, 2, 3)
    assert torch.equal(model(x), expected) and list(model.state_dict()) == names


@pytest.mark.parametrize("blocks", [[], "nothing", ["layers.7"], ["mlp"]])
def test_unknown_blocks_are_named(blocks):
    with pytest.raises(ValueError, match=r"blocks is .*not found"):
        mk.nn.attach_block_adapters(Model(), blocks, WIDTH, 2, 3)


@pytest.mark.parametrize(
    ("blocks", "kind"),
    [(nn.Linear(2, 2), "Linear"), (nn.Sequential(nn.Linear(2, 2)), "Sequential"), (["mlp", 3], "list")],
)
def test_blocks_are_strings(blocks, kind):
    with pytest.raises(TypeError, match=f"^blocks is {kind}, it must be names of modules or a regular expression"):
        mk.nn.attach_block_adapters(Model(), blocks, WIDTH, 2, 3)


def test_a_bad_regular_expression_is_named():
    with pytest.raises(ValueError, match=r"^blocks is 'layers\.\[', it must be a regular expression: unterminated"):
        mk.nn.attach_block_adapters(Model(), "layers.[", WIDTH, 2, 3)


def test_a_shared_block_gets_one_adapter():
    model = Model()
    model.layers[1] = model.layers[0]
    with pytest.raises(ValueError, match="are the same module"):
        mk.nn.attach_block_adapters(model, ["layers.0.mlp", "layers.1.mlp"], WIDTH, 2, 3)
    assert len(mk.nn.attach_block_adapters(model, BLOCKS, WIDTH, 2, 3)) == 2


def test_blocks_that_cannot_be_adapted_say_so():
    class Other(nn.Module):
        def forward(self, states):
            return {"out": states}

    model = nn.ModuleDict({"block": Other()})
    mk.nn.attach_block_adapters(model, ["block"], WIDTH, 2, 3)
    x = torch.randn(3, WIDTH)
    with pytest.raises(TypeError, match=r"keywords \['states'\].*hidden_states="):
        model["block"](states=x)
    with pytest.raises(TypeError, match="Other returned dict"):
        model["block"](x)


@pytest.mark.parametrize("container", [nn.Sequential(nn.Linear(2, 2)), nn.ModuleList()])
def test_containers_are_refused(container):
    """A Sequential would run the adapter as one more layer."""
    model = nn.ModuleDict({"block": container})
    with pytest.raises(ValueError, match=r"block is a \w+, it must be a module with its own forward"):
        mk.nn.attach_block_adapters(model, ["block"], WIDTH, 2, 3)
    with pytest.raises(ValueError, match=r"^model is a \w+, it must be a module with its own forward"):
        mk.nn.attach_block_adapters(container, "", WIDTH, 2, 3)


def test_adapter_is_made_on_the_device_of_its_block():
    with torch.device("meta"):
        model = Model()
    adapters = mk.nn.attach_block_adapters(model, BLOCKS, WIDTH, 2, 3)
    assert all(p.is_meta for adapter in adapters.values() for p in adapter.parameters())


def test_removing_leaves_the_block_as_it_was():
    model, x = Model(), torch.randn(3, WIDTH)
    expected, names = model(x), set(model.state_dict())
    for _ in range(2):
        adapter = mk.nn.RoutedLoRA(WIDTH, 2, 3, style="bottleneck")
        mk.nn.add_block_adapter(model.layers[0].mlp, adapter)
        changed = model(x)
        assert not torch.equal(changed, expected)
        twin = copy.deepcopy(model)
        assert mk.nn.remove_block_adapter(model.layers[0].mlp) is adapter
        assert torch.equal(model(x), expected) and set(model.state_dict()) == names
        assert torch.equal(twin(x), changed)
        mk.nn.remove_block_adapter(twin.layers[0].mlp)
        assert torch.equal(twin(x), expected)
    with pytest.raises(ValueError, match="Mlp without block_adapter"):
        mk.nn.remove_block_adapter(model.layers[0].mlp)


def test_an_adapter_of_any_class_is_called_with_input_and_output():
    class Difference(nn.Module):
        def forward(self, x, output):
            return output - x

    model, x = Model(), torch.randn(3, WIDTH)
    block = model.layers[0].attention
    mk.nn.add_block_adapter(block, Difference())
    assert torch.equal(block(hidden_states=x)[0], block.forward(x)[0] - x)
    with pytest.raises(ValueError, match="attention already has a block_adapter"):
        mk.nn.add_block_adapter(block, Difference(), "attention")


def test_a_mixture_takes_parameters_that_others_keep():
    module = mk.nn.RoutedLoRA(WIDTH, 2, 3, num_groups=2, style="adaptformer", balance_coef=0.1)
    nn.init.normal_(module.lora_B)
    mixture = mk.nn.RoutedMixture(WIDTH, 2, 3, num_groups=2, style="adaptformer", balance_coef=0.1)
    assert not list(mixture.parameters()) and not mixture.state_dict()
    torch.manual_seed(0)
    made = mixture.new_parameters()
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(torch.equal(p, made[name]) for name, p in module.named_parameters())
    x = torch.randn(4, WIDTH)
    assert torch.equal(mixture.mix(x, x, **made), module(x, x))
    assert torch.equal(mixture.last_load, module.last_load) and mixture.last_load.any()
