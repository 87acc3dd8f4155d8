"""The PEFT method on a tiny LLaMA: what PEFT's users do with an adapter."""

import copy
import json
import types

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import PeftType
from safetensors.torch import load_file
from tiny_llama import WIDTH, tiny_llama, tokens, train_experts

import mtlora_kernels as mk
from mtlora_integrations.peft import MtLoraConfig, MtLoraLayer
from mtlora_integrations.peft.register import register

IDS = tokens(2, 7)
TARGETS = {"block": ["mlp"], "linear": ["q_proj", "v_proj"], "both": ["self_attn", "mlp", "down_proj"]}


def config(targets="block", **settings) -> MtLoraConfig:
    defaults = {"target_modules": TARGETS.get(str(targets), targets), "r": 4, "num_experts": 3, "num_groups": 2}
    return MtLoraConfig(**defaults | {"task_type": "CAUSAL_LM"} | settings)


def adapted(targets="block", base=None, **settings) -> PeftModel:
    model = get_peft_model(base or tiny_llama(), config(targets, **settings))
    return train_experts(model).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


BASE = logits(tiny_llama())


@pytest.mark.parametrize("targets", TARGETS)
def test_first_values_leave_the_output_unchanged_and_only_adapters_train(targets):
    model = get_peft_model(tiny_llama(), config(targets))
    assert torch.equal(logits(model), BASE)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".block_adapter.lora_" in name for name in trained)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    train_experts(model)
    assert not torch.equal(logits(model), BASE)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_blocks_equal_attached_adapters():
    model, other = adapted("both"), tiny_llama()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, MtLoraLayer):
            sizes = layer.in_features, 4, 3
            options = {"out_features": layer.out_features, "num_groups": 2, "alpha": 64}
            twin = mk.nn.RoutedLoRA(*sizes, **options)
            values = zip(twin.parameters(), layer.parameters_of("default"), strict=False)
            for p, value in values:
                p.data.copy_(value)
            mk.nn.add_block_adapter(other.get_submodule(name.removesuffix(".block_adapter")), twin.eval())
    assert torch.equal(logits(model), logits(other))


def test_linear_layer_by_hand():
    base = tiny_llama().double()
    model = adapted("linear", base, compute_dtype="float64").double()
    attention = model.base_model.model.model.layers[0].self_attn
    a, b, route, _ = attention.v_proj.block_adapter.parameters_of("default")
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    width, expected = b.shape[1] // 2, x @ attention.v_proj.weight.T
    pi = (x @ route.T).view(5, 2, 3).softmax(-1)
    for group in range(2):
        columns = slice(group * width, (group + 1) * width)
        for i in range(3):
            expected[:, columns] += 16 * pi[:, group, i, None] * (x @ a.T @ b[i].T)[:, columns]  # 16 is alpha / r
    torch.testing.assert_close(attention.v_proj(x), expected)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("options", [{}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}], ids=str)
def test_save_and_load(tmp_path, targets, options):
    model = adapted(targets)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, **options)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loaded_adapters_are_where_their_module_is(tmp_path):
    """With low_cpu_mem_usage PEFT reads them onto the GPU first."""
    adapted("both").save_pretrained(tmp_path)
    for device in ("cpu", "cuda"):
        loaded = PeftModel.from_pretrained(tiny_llama().to(device), tmp_path, low_cpu_mem_usage=True)
        assert {p.device.type for p in loaded.parameters()} == {device}


def test_saved_names_have_no_adapter_name(tmp_path):
    adapted("both", style="adaptformer").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    names = ("lora_A", "lora_B", "lora_route", "lora_scales")
    prefix = "base_model.model.model.layers.0"
    for name in names:
        assert f"{prefix}.mlp.block_adapter.{name}" in stored
    assert len(stored) == 2 * 3 * len(names)
    assert stored[f"{prefix}.mlp.block_adapter.lora_B"].shape == (3, WIDTH, 4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MTLORA"


def test_one_expert_has_no_router(tmp_path):
    model = adapted(num_experts=1)
    assert not any("lora_route" in name for name in get_peft_model_state_dict(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_several_adapters():
    model = adapted("block")
    first = logits(model)
    model.add_adapter("second", config(["mlp", "q_proj"], r=2, num_experts=5, style="bottleneck"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    train_experts(model)
    second = logits(model)
    assert not torch.equal(second, first)
    assert all(".second" in name for name, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(logits(model), BASE)
    assert torch.equal(logits(model), second)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), first)
    assert not any("second" in name for name, _ in model.named_modules())
    assert all(layer.available_adapters in (["default"], []) for layer in model.get_layer_status())


def test_two_active_adapters_add_up_in_their_order():
    model = adapted("linear")
    model.add_adapter("second", config("linear", r=2))
    model.base_model.set_adapter(["default", "second"])
    train_experts(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    x = torch.randn(3, WIDTH)
    out = layer.forward(x)  # forward() itself runs no hooks
    for name in ("default", "second"):
        a, b, route, _ = layer.block_adapter.parameters_of(name)
        out = mk.routed_lora(x, a, b, route, out, scaling=64 / a.shape[0], num_groups=2)
    assert torch.equal(layer(x), out)


def test_unload_gives_the_base_model_back():
    base = tiny_llama()
    model = adapted("both", base)
    unloaded = model.unload()
    assert unloaded is base and torch.equal(logits(unloaded), BASE)
    assert list(unloaded.state_dict()) == list(tiny_llama().state_dict())
    assert not any(module._forward_hooks for module in unloaded.modules())
    assert torch.equal(logits(adapted("both", unloaded)), logits(adapted("both")))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_says_what_to_do(call):
    model = adapted("both")
    expected = logits(model)
    with pytest.raises(NotImplementedError, match=r"cannot be merged.*save_pretrained.*unload\(\)"):
        getattr(model, call)()
    assert torch.equal(logits(model), expected)


def test_modules_to_save(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    assert head.modules_to_save["default"].weight.requires_grad
    nn.init.normal_(head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_deepcopy_has_adapters_of_its_own():
    model = adapted("both")
    expected, twin = logits(model), copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, MtLoraLayer):
            nn.init.zeros_(layer.lora_B["default"])
    assert torch.equal(logits(twin), BASE) and torch.equal(logits(model), expected)
    assert torch.equal(logits(twin.unload()), BASE)


def test_a_patched_block_keeps_its_adapter():
    """What Liger does to an instance after PEFT has wrapped it; a wrapper would lose the adapter silently."""

    def fused_mlp(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    model = adapted("both")
    expected = logits(model)
    for layer in model.base_model.model.model.layers:
        layer.mlp.forward = types.MethodType(fused_mlp, layer.mlp)
        layer.mlp.down_proj.forward = types.MethodType(nn.Linear.forward, layer.mlp.down_proj)
    assert torch.equal(logits(model), expected)


def test_transformers_own_adapter_api(tmp_path):
    adapted("both").save_pretrained(tmp_path)
    expected = logits(adapted("both"))
    model = tiny_llama()
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), expected)


def test_injection_by_configuration_and_by_state_dict():
    source = adapted("both")
    saved = {name.removeprefix("base_model.model."): p for name, p in get_peft_model_state_dict(source).items()}
    for names in ({}, {"state_dict": saved}):
        model = inject_adapter_in_model(config("both"), tiny_llama(), **names)
        assert not set_peft_model_state_dict(model, dict(saved)).unexpected_keys
        assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generate(implementation):
    model = adapted("both")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(input_ids=IDS, use_cache=False, **settings)
    assert not torch.equal(expected, tiny_llama().generate(input_ids=IDS, use_cache=False, **settings))
    with torch.compiler.set_stance("force_eager"):
        got = model.generate(input_ids=IDS, cache_implementation=implementation, **settings)
    assert torch.equal(got, expected)


def test_bf16_base_keeps_fp32_adapters_and_computes_in_bf16():
    model = adapted("both", tiny_llama().bfloat16())
    layer = model.base_model.model.model.layers[0].mlp
    assert layer.block_adapter.lora_B["default"].dtype == torch.float32
    x = torch.randn(3, WIDTH).bfloat16()
    a, b, route, _ = layer.block_adapter.parameters_of("default")
    half = [t.bfloat16() for t in (a, b, route)]
    assert torch.equal(layer(x), mk.routed_lora(x, *half, layer.forward(x), scaling=16.0, num_groups=2))
    own = get_peft_model(tiny_llama().bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}


def test_balance_coefficient_of_the_configuration():
    model = adapted("linear", balance_coef=0.5)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    route = layer.block_adapter.lora_route["default"]
    x = torch.randn(5, WIDTH)

    def gradient(coef):
        a, b, r, _ = layer.block_adapter.parameters_of("default")
        options = {"scaling": 16.0, "num_groups": 2, "return_load": True}
        out, load = mk.routed_lora(x, a, b, r, layer.forward(x), **options)
        return torch.autograd.grad(out.sum() + coef * mk.balance_loss(load), route)[0]

    for training, coef in ((True, 0.5), (False, 0.0)):
        got = torch.autograd.grad(layer.train(training)(x).sum(), route)[0]
        assert torch.equal(got, gradient(coef)) and not torch.equal(got, gradient(0.1))


def test_convolution_of_gpt2_is_a_linear_layer():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    model = adapted(["c_attn", "mlp"], base)
    layers = model.base_model.model.transformer.h[0]
    assert layers.attn.c_attn.block_adapter.lora_B["default"].shape == (3, 96, 4)
    assert layers.mlp.block_adapter.lora_B["default"].shape == (3, 32, 4)
    assert logits(model).shape == (2, 7, 64)


def test_targets_that_cannot_be_adapted_are_named():
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a Embedding"):
        get_peft_model(tiny_llama(), config(["embed_tokens"]))
    block = nn.ModuleDict({"mlp": nn.Bilinear(4, 4, 4)})
    with pytest.raises(ValueError, match=r"features is None.*must be mlp's width"):
        get_peft_model(block, MtLoraConfig(target_modules=["mlp"]))
    with pytest.raises(ValueError, match="num_groups is 5, it must be a divisor of the output width 32"):
        get_peft_model(tiny_llama(), config(num_groups=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"compute_dtype": "half precision"}, "compute_dtype is 'half precision'"),
        ({"target_modules": "q", "layers_to_transform": [0]}, "layers_to_transform is given"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        MtLoraConfig(**settings)


def test_layers_to_transform():
    model = get_peft_model(tiny_llama(), config(layers_to_transform=[1]))
    assert model.targeted_module_names == ["model.layers.1.mlp"]


def test_registration_is_a_member_of_the_enum_and_happens_once():
    register()
    member = PeftType("MTLORA")
    assert member is PeftType.MTLORA and "MTLORA" in PeftType.__members__ and member == "MTLORA"
    assert copy.deepcopy(config()).peft_type is member
