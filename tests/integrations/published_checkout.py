"""Runs the official mtLoRA code, from the checkout in MTLORA_PUBLISHED_REPO, with and without `swap_in`.

A process of its own, started by test_host_checkouts.py: the checkout's `peft` hides the package of that name.
"""

import copy
import importlib
import os
import sys
import tempfile
import types

import host_layers as layers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners import block_adapters, lora, mmoelora, mmoeloraS
from peft.utils.save_and_load import get_peft_model_state_dict
from peft.utils.transformers_patch import patch_llama_for_hydralora
from safetensors.torch import load_file
from torch import nn
from transformers.models.llama import modeling_llama

from mtlora_integrations import published_losses, swap_in, swap_out
from mtlora_kernels.testing import differences

sys.modules["utils"] = types.ModuleType("utils")  # without its __init__, which loads the data sets' library
sys.modules["utils"].__path__ = [f"{os.environ['MTLORA_PUBLISHED_REPO']}/utils"]
hydralora_trainer = importlib.import_module("utils.hydralora_trainer")

CONFIG = transformers.LlamaConfig(
    vocab_size=60, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
FINE = {"enable_fine_grained_routing": True, "routing_group_size": 24}


def config(style=None, **options):
    options = {"r": 8, "lora_alpha": 32, "lora_nums": 4, "lora_dropout": 0.0, "enable_blc": True} | options
    if style is not None:
        options |= {"enable_block_adapter": True, "block_adapter_style": style}
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)


def mmoe_config(kind):
    options = {"r": 8, "lora_alpha": 32, "lora_nums": 4, "lora_dropout": 0.0, "task_num": 3, "expert_num": 4}
    return kind(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)


MODELS = {  # what is adapted, and in how many layers
    "component": (lambda: config(), 4),
    "component grouped": (lambda: config(**FINE), 4),
    "lowrank ffn": (lambda: config("lowrank", block_adapter_type="ffn", **FINE), 2),
    "lowrank both": (lambda: config("lowrank", block_adapter_type="both"), 4),
    "bottleneck": (lambda: config("bottleneck", block_adapter_type="attention", **FINE), 2),
    "adaptformer": (lambda: config("adaptformer", block_adapter_type="ffn"), 2),
    "mmoelora": (lambda: mmoe_config(mmoelora.MMOELoraConfig), 4),
    "mmoeloras": (lambda: mmoe_config(mmoeloraS.MMOELoraConfigS), 4),
}


patch_llama_for_hydralora()
FORWARDS = {
    cls: cls.forward
    for cls in (modeling_llama.LlamaMLP, modeling_llama.LlamaAttention, modeling_llama.LlamaSdpaAttention)
}
TOLERANCE = 1e-4  # of each tensor's largest value, through two layers in fp32


def make(kind):
    # Every block model patches the classes once more, and its adapters then run once more: start afresh.
    for cls, forward in FORWARDS.items():
        cls.forward = forward
    torch.manual_seed(0)
    model = get_peft_model(transformers.LlamaForCausalLM(CONFIG), MODELS[kind][0]())
    for name, p in model.named_parameters():
        if "lora_" in name or "expert_scales" in name:
            p.requires_grad_()
            nn.init.normal_(p, std=0.2)
    return model.train()


def batch():
    tokens = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens, "task_types": torch.tensor([1, 2])}


def step(model, collect):
    model.zero_grad()
    inputs = batch()
    if any(hasattr(m, "lora_gate") for m in model.modules()):
        inputs.pop("task_types")  # the host takes no task of more than one sequence
    out = model(**inputs)
    balance = collect(model)
    loss = out.loss if balance is None else out.loss + 0.3 * balance
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": out.logits.detach()} | grads


def check_model(kind):
    model = make(kind)
    expected = step(model, hydralora_trainer.collect_balance_loss)
    names = {name: type(m).__name__ for name, m in model.named_modules()}
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = get_peft_model_state_dict(model)
    for numerics in ("fp32", "eager"):
        report = swap_in(model, numerics=numerics, strict=True)
        assert len(report.swapped) == MODELS[kind][1], report
        layers.close(step(model, hydralora_trainer.collect_balance_loss), expected, TOLERANCE)
        layers.close(step(model, published_losses.collect_balance_loss), expected, TOLERANCE)
    assert names == {name: type(m).__name__ for name, m in model.named_modules()}
    assert not differences(model.state_dict(), saved)
    assert not differences(get_peft_model_state_dict(model), adapter)
    twin = copy.deepcopy(model)
    assert not differences(
        step(twin, published_losses.collect_balance_loss), step(model, published_losses.collect_balance_loss)
    )
    with tempfile.TemporaryDirectory() as folder:
        model.base_model.model.save_pretrained(folder, safe_serialization=True)
        model.save_pretrained(folder)
        kept = torch.load(f"{folder}/adapter_model.bin")
        whole = load_file(f"{folder}/model.safetensors")
        assert all(torch.equal(value, whole[name]) for name, value in model.base_model.model.state_dict().items())
    assert not differences(kept, adapter)
    if kind.startswith("component"):
        model.base_model.disable_adapter_layers()
        off = model(**batch()).logits
        swap_out(model)
        assert torch.equal(model(**batch()).logits, off)
        model.base_model.enable_adapter_layers()
    swap_out(model)
    assert not differences(step(model, hydralora_trainer.collect_balance_loss), expected)
    if "mmoe" not in kind:
        model.base_model.model.gradient_checkpointing_enable()
        model.base_model.model.enable_input_require_grads()
        swap_in(model)
        layers.close(step(model, published_losses.collect_balance_loss), expected, TOLERANCE)


def check_lattice():
    options = {"r": layers.R, "lora_alpha": 32, "lora_nums": layers.N}
    block = {"dim": layers.D, "rank": layers.R, "num_experts": layers.N}
    fine = {"enable_fine_grained_routing": True, "routing_group_size": 16}
    mmoe = {"r": layers.R, "lora_alpha": 32, "expert_num": 4, "task_num": 3, "task_embedding_dim": 8}
    cases = [
        (lora.LoraLinear(layers.D, layers.OUT, **options), 1),
        (lora.LoraLinear(layers.D, layers.OUT, **options, **fine), layers.OUT // 16),
        (block_adapters.LowRankBlockAdapter(**block), 1),
        (block_adapters.LowRankBlockAdapter(**block, **fine), layers.D // 16),
        (block_adapters.BottleneckBlockAdapter(**block, **fine), layers.D // 16),
        (block_adapters.MoEAdaptFormerBlockAdapter(**block, **fine, init_scale=0.5), layers.D // 16),
        (mmoelora.MMOELoraLinear("default", layers.D, layers.OUT, **mmoe), 1),
        (mmoeloraS.MMOELoraLinearS("default", layers.D, layers.OUT, **mmoe), 1),
    ]
    for layer, groups in cases:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layer, x, dout = layers.on_lattice(copy.deepcopy(layer), groups, dtype)
            expected = layers.results(layer, x, dout)
            swap_in(layer, numerics="eager", strict=True)
            found = differences(layers.results(layer, x, dout), expected)
            assert not found, (type(layer), dtype, found)


def train(kind, swapped, checkpointing, folder):
    model = make(kind)
    if swapped:
        swap_in(model, strict=True)
    if checkpointing:
        model.base_model.model.enable_input_require_grads()
    torch.manual_seed(0)
    rows = [{key: value[i % 2] for key, value in batch().items()} for i in range(8)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.1,
        gradient_checkpointing=checkpointing, logging_steps=1, logging_dir=folder, report_to=[], use_cpu=True,
        save_steps=4,
        optim="sgd",  # Adam would blow up the rounding of gradients near 0
    )  # fmt: skip
    arguments.method = "hydralora"
    trainer = hydralora_trainer.HydraLoRATrainer(
        model=model, args=arguments, train_dataset=rows, blc_alpha=0.3, enable_blc=True, enable_spectral_reg=True,
        spectral_reg_lambda=0.1, spectral_reg_steps=1,
    )  # fmt: skip
    trainer.train()
    losses = {f"loss{i}": torch.tensor(log["loss"]) for i, log in enumerate(trainer.state.log_history) if "loss" in log}
    return losses | {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def check_trainer():
    trainer, losses = hydralora_trainer.HydraLoRATrainer, published_losses
    published = hydralora_trainer.collect_balance_loss, trainer.compute_spectral_regularization
    for kind in ("component grouped", "lowrank ffn"):
        with tempfile.TemporaryDirectory() as folder:
            expected = train(kind, False, False, folder)
            layers.close(train(kind, True, False, folder), expected, TOLERANCE)
            hydralora_trainer.collect_balance_loss = losses.collect_balance_loss
            trainer.compute_spectral_regularization = losses.compute_spectral_regularization
            for swapped, checkpointing in ((True, False), (True, True), (False, False)):
                layers.close(train(kind, swapped, checkpointing, folder), expected, TOLERANCE)
            hydralora_trainer.collect_balance_loss, trainer.compute_spectral_regularization = published
        print("equal:", kind, "in the host's trainer")


if __name__ == "__main__":
    check_lattice()
    for kind in MODELS:
        check_model(kind)
        print("equal:", kind)
    check_trainer()
