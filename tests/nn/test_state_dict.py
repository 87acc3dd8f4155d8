"""State dicts carry the published names, whatever the parameters are called in memory."""

import io

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize, prune

import mtlora_kernels as mk

BLOCK_NAMES = {"lora_A.weight": (2, 12), "lora_route.weight": (9, 12)} | {
    f"lora_B.{i}.weight": (12, 2) for i in range(3)
}
MAKERS = {
    "lowrank": lambda: mk.nn.RoutedLoRA(12, 2, 3, num_groups=3),
    "adaptformer": lambda: mk.nn.RoutedLoRA(12, 2, 3, num_groups=3, style="adaptformer"),
    "one expert": lambda: mk.nn.RoutedLoRA(12, 2, 1, style="adaptformer"),
    "linear": lambda: mk.nn.RoutedLoRALinear(nn.Linear(12, 20), 2, 3),
    "nested": lambda: nn.Sequential(nn.Linear(12, 12), mk.nn.RoutedLoRA(12, 2, 3), nn.LayerNorm(12)),
}
EXPECTED = {
    "lowrank": BLOCK_NAMES,
    "adaptformer": BLOCK_NAMES | {f"expert_scales.{i}": (1,) for i in range(3)},
    "one expert": {"lora_A.weight": (2, 12), "lora_B.0.weight": (12, 2), "expert_scales.0": (1,)},
    "linear": {"weight": (20, 12), "bias": (20,), "lora_A.weight": (2, 12), "lora_route.weight": (3, 12)}
    | {f"lora_B{i}.weight": (20, 2) for i in range(3)},
}


def published_values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randn(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", EXPECTED)
def test_names_and_shapes_are_published(kind):
    shapes = {name: tuple(value.shape) for name, value in MAKERS[kind]().state_dict().items()}
    assert shapes == EXPECTED[kind]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_published_values_round_trip(kind, assign):
    module = MAKERS[kind]()
    values = published_values(module)
    before = dict(values)
    parameters = dict(module.named_parameters())
    result = module.load_state_dict(values, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert values.keys() == before.keys()  # the caller's dict is left alone
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    if not assign:
        assert all(p is parameters[name] for name, p in module.named_parameters())
    other = MAKERS[kind]()
    other.load_state_dict(module.state_dict(), assign=assign)
    x = torch.randn(4, 12)
    assert torch.equal(other(x), module(x))


def test_order_of_experts_is_kept():
    module = mk.nn.RoutedLoRA(12, 2, 11)
    values = published_values(module)
    module.load_state_dict(values)
    assert torch.equal(module.lora_B, torch.stack([values[f"lora_B.{i}.weight"] for i in range(11)]))


def test_saved_and_loaded_from_a_file():
    module = MAKERS["nested"]()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = MAKERS["nested"]()
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 12)
    assert torch.equal(other(x), module(x))


def test_names_of_named_parameters_load_too():
    module, other = MAKERS["adaptformer"](), MAKERS["adaptformer"]()
    nn.init.normal_(module.lora_B)
    other.load_state_dict({name: p.detach() for name, p in module.named_parameters()})
    x = torch.randn(4, 12)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("prefix", ["", "1."])
def test_missing_and_unexpected_keys_have_published_names(prefix):
    module = MAKERS["nested" if prefix else "lowrank"]()
    values = published_values(module)
    expert = values.pop(f"{prefix}lora_B.1.weight")
    del values[f"{prefix}lora_A.weight"]
    values[f"{prefix}lora_B.3.weight"] = expert
    other = values[f"{prefix}lora_B.2.weight"]
    result = module.load_state_dict(values, strict=False)
    assert sorted(result.missing_keys) == [f"{prefix}lora_A.weight", f"{prefix}lora_B.1.weight"]
    assert result.unexpected_keys == [f"{prefix}lora_B.3.weight"]
    loaded = module.state_dict()
    assert torch.equal(loaded[f"{prefix}lora_B.2.weight"], other)
    assert not loaded[f"{prefix}lora_B.1.weight"].any()  # kept as it was
    with pytest.raises(RuntimeError, match=r'Missing key.*"' + prefix + r'lora_A.weight"'):
        module.load_state_dict(values)


def test_base_checkpoint_leaves_the_adapter_alone():
    module = MAKERS["nested"]()
    parameter = module[1].lora_B
    base = {name: value for name, value in published_values(module).items() if not name.startswith("1.")}
    result = module.load_state_dict(base, strict=False, assign=True)
    assert sorted(result.missing_keys) == sorted(f"1.{name}" for name in module[1].state_dict())
    assert module[1].lora_B is parameter


def test_size_mismatch_names_the_expert():
    module = MAKERS["lowrank"]()
    values = published_values(module)
    values["lora_B.2.weight"] = torch.randn(12, 4)
    with pytest.raises(RuntimeError, match=r"size mismatch for lora_B\.2\.weight: \(12, 4\) given, \(12, 2\)"):
        module.load_state_dict(values)


def test_meta_module_takes_a_full_checkpoint_and_reports_a_partial_one():
    values = published_values(MAKERS["lowrank"]())
    module = mk.nn.RoutedLoRA(12, 2, 3, num_groups=3, device="meta")
    partial = {name: value for name, value in values.items() if name != "lora_B.1.weight"}
    with pytest.raises(RuntimeError, match=r'Missing key.*: "lora_B\.1\.weight"\.'):
        module.load_state_dict(partial, assign=True)
    module.load_state_dict(values, assign=True)
    assert isinstance(module.lora_B, nn.Parameter) and module.lora_B.requires_grad
    assert not any(p.is_meta for p in module.parameters())


def test_router_of_a_published_one_expert_layer_is_accepted():
    module = mk.nn.RoutedLoRALinear(nn.Linear(12, 20), 2, 1)
    module.load_state_dict(published_values(module) | {"lora_route.weight": torch.randn(1, 12)})


def test_values_alias_the_parameters_as_in_any_module():
    module = MAKERS["lowrank"]()
    module.state_dict()["lora_B.1.weight"].fill_(3)
    assert (module.lora_B[1] == 3).all() and not module.lora_B[0].any()
    assert module.state_dict(keep_vars=True)["lora_B.0.weight"].requires_grad


def test_parametrised_and_pruned_parameters_keep_their_own_names():
    source, target = (mk.nn.RoutedLoRA(12, 2, 3) for _ in range(2))
    for module in (source, target):
        parametrize.register_parametrization(module, "lora_B", nn.Tanh())
        prune.l1_unstructured(module, "lora_A", 0.5)
    nn.init.normal_(source.parametrizations.lora_B.original)
    state = source.state_dict()
    assert state.keys() == {"lora_A_orig", "lora_A_mask", "parametrizations.lora_B.original", "lora_route.weight"}
    target.load_state_dict(state)
    x = torch.randn(5, 12)
    assert torch.equal(target(x), source(x))


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_fully_sharded_modules_save_and_load(one_process):
    source, target = MAKERS["adaptformer"](), MAKERS["adaptformer"]()
    values = published_values(source)
    source.load_state_dict(values)
    fully_shard(source, mesh=one_process)
    fully_shard(target, mesh=one_process)
    target.load_state_dict(source.state_dict())
    assert isinstance(target.lora_B, DTensor)
    loaded = target.state_dict()
    assert all(torch.equal(loaded[name].full_tensor(), value) for name, value in values.items())


@pytest.mark.parametrize("kind", MAKERS)
def test_distributed_checkpoints_follow_the_published_names(one_process, kind):
    """torch.distributed.checkpoint.state_dict looks up every name along the modules' attributes."""
    source = nn.ModuleDict({"layer": MAKERS[kind]()})
    values = published_values(source)
    source.load_state_dict(values)
    assert get_model_state_dict(source).keys() == values.keys()
    for full in (False, True):  # full: every process holds the whole tensors and keeps its part
        target = nn.ModuleDict({"layer": fully_shard(MAKERS[kind](), mesh=one_process)})
        options = StateDictOptions(full_state_dict=full)
        state = dict(values)
        if not full:
            sharded = nn.ModuleDict({"layer": fully_shard(source["layer"], mesh=one_process)})
            state = get_model_state_dict(sharded, options=options)
        set_model_state_dict(target, state, options=options)
        got = get_model_state_dict(target, options=StateDictOptions(full_state_dict=True))
        assert got.keys() == values.keys() and all(torch.equal(got[name], value) for name, value in values.items())
