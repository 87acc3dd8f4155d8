"""Published checkpoints and configurations, to PEFT and back."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import get_peft_model, set_peft_model_state_dict
from tiny_llama import tiny_llama, tokens, train_experts

import mtlora_kernels as mk
from mtlora_integrations.peft import MtLoraConfig, config_from_official, from_official, to_official

IDS = tokens(2, 7)
PREFIX = "base_model.model."


class Wrapped(nn.Module):
    """The published code, too, keeps the model under base_model.model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


def published(linear: list[str], blocks: str, experts: int, style: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model whose adapters have the published names, and what its trainer saves."""
    model = tiny_llama()
    if blocks:
        mk.nn.attach_block_adapters(model, blocks, 32, 4, experts, num_groups=2, alpha=64, style=style)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in linear:
            parent = model.get_submodule(name.rpartition(".")[0])
            adapter = mk.nn.RoutedLoRALinear(module, 4, experts, num_groups=2, alpha=64)
            setattr(parent, name.rpartition(".")[2], adapter)
    train_experts(model.eval())
    saved = Wrapped(model).state_dict()
    return model, {key: value for key, value in saved.items() if "lora_" in key or "expert_scales" in key}


CASES = {
    "linear": (["q_proj", "v_proj"], "", 3, "lowrank"),
    "block": ([], r".*\.mlp", 3, "lowrank"),
    "both blocks": ([], r".*\.(mlp|self_attn)", 11, "bottleneck"),
    "scales": ([], r".*\.mlp", 3, "adaptformer"),
    "one expert": (["q_proj"], "", 1, "lowrank"),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_keeps_names_values_and_outputs(case):
    linear, blocks, experts, style = CASES[case]
    source, saved = published(*CASES[case])
    targets = linear or [name for name in ("mlp", "self_attn") if name in blocks]
    config = MtLoraConfig(target_modules=targets, r=4, num_experts=experts, num_groups=2, style=style)
    model = get_peft_model(tiny_llama(), config).eval()
    assert not set_peft_model_state_dict(model, from_official(saved)).unexpected_keys
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, source(IDS).logits)
    back = to_official(model)
    assert back.keys() == saved.keys()
    assert all(torch.equal(back[key], value) for key, value in saved.items())


def test_names_by_hand():
    a, route, experts = torch.randn(2, 8), torch.randn(6, 8), [torch.randn(8, 2) for _ in range(3)]
    layer = PREFIX + "model.layers.0."
    given = {f"{layer}self_attn.q_proj.lora_B{i}.weight": experts[i] for i in (2, 0, 1)}
    given |= {f"{layer}self_attn.q_proj.lora_A.weight": a, f"{layer}self_attn.q_proj.lora_route.weight": route}
    given |= {f"{layer}mlp.block_adapter.lora_B.{i}.weight": experts[i] for i in range(3)}
    given |= {f"{layer}mlp.block_adapter.expert_scales.{i}": torch.tensor([float(i)]) for i in range(3)}
    given["lm_head.weight"] = a
    converted = from_official(given)
    stacked = torch.stack(experts)
    linear, block = f"{layer}self_attn.q_proj.block_adapter.", f"{layer}mlp.block_adapter."
    expected = {f"{linear}lora_A": a, f"{linear}lora_route": route, f"{linear}lora_B": stacked}
    expected |= {f"{block}lora_B": stacked, f"{block}lora_scales": torch.tensor([[0.0], [1.0], [2.0]])}
    expected["lm_head.weight"] = a
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], value) for key, value in expected.items())


def test_a_missing_expert_is_named():
    state = {f"x.lora_B{i}.weight": torch.zeros(2, 2) for i in (0, 2)}
    with pytest.raises(ValueError, match=r"x\.block_adapter\.lora_B has the experts \[0, 2\]"):
        from_official(state)


def test_the_router_of_one_expert_is_left_out():
    state = {"x.lora_B0.weight": torch.zeros(2, 2), "x.lora_route.weight": torch.zeros(1, 2)}
    assert set(from_official(state)) == {"x.block_adapter.lora_B"}


def test_configurations():
    official = {
        "r": 8,
        "lora_alpha": 64,
        "lora_dropout": 0.05,
        "lora_nums": 16,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "enable_fine_grained_routing": True,
        "routing_group_size": 2048,
    }
    config = config_from_official(official)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.num_experts) == (8, 64, 0.05, 16)
    assert (config.target_modules, config.group_size) == ({"q_proj", "v_proj"}, 2048)
    block = official | {
        "enable_block_adapter": True,
        "block_adapter_type": "both",
        "block_adapter_style": "adaptformer",
        "block_adapter_rank": 32,
        "enable_fine_grained_routing": False,
    }
    config = config_from_official(block)
    assert (config.target_modules, config.r, config.style) == ({"self_attn", "mlp"}, 32, "adaptformer")
    assert config.group_size is None
    assert config_from_official(block | {"block_adapter_rank": None}).r == 8
    with pytest.raises(ValueError, match="block_adapter_type is 'all'"):
        config_from_official(block | {"block_adapter_type": "all"})
