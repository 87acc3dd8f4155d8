"""Runs HydraLoRA's code, from the checkout in HYDRALORA_REPO, with and without `swap_in`.

A process of its own, started by test_host_checkouts.py: the checkout brings its own `peft` and `transformers`.
"""

import copy

import host_layers as layers
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora  # its mmoelora cannot be imported: there is nothing to swap
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mtlora_integrations import swap_in, swap_out
from mtlora_kernels.testing import differences

CONFIG = LlamaConfig(
    vocab_size=60, hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


TOLERANCE = 1e-4  # of each tensor's largest value, through two layers in fp32


def make():
    torch.manual_seed(0)
    # The host's blocks take the layers' tuple from these three and from no other projection.
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, r=8, lora_alpha=32, lora_nums=4, lora_dropout=0.0
    )
    model = get_peft_model(LlamaForCausalLM(CONFIG), config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    return model.train()


def step(model):
    model.zero_grad()
    tokens = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach()} | grads


def check_lattice():
    host = lora.Linear(layers.D, layers.OUT, r=layers.R, lora_alpha=32, lora_nums=layers.N)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer, x, dout = layers.on_lattice(copy.deepcopy(host), 1, dtype)
        expected = layers.results(layer, x, dout)
        swap_in(layer, numerics="eager", strict=True)
        found = differences(layers.results(layer, x, dout), expected)
        assert not found, (dtype, found)


def check_model():
    model = make()
    expected = step(model)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = get_peft_model_state_dict(model)
    for numerics in ("fp32", "eager"):
        report = swap_in(model, numerics=numerics, strict=True)
        assert len(report.swapped) == 6, report
        layers.close(step(model), expected, TOLERANCE)
    assert not differences(model.state_dict(), saved)
    assert not differences(get_peft_model_state_dict(model), adapter)
    assert not differences(step(copy.deepcopy(model)), step(model))
    swap_out(model)
    assert not differences(step(model), expected)


if __name__ == "__main__":
    check_lattice()
    check_model()
    print("equal: hydralora")
