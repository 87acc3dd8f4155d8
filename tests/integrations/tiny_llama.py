"""A two-layer LLaMA from a config, and adapters on it that do something."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, VOCABULARY = 32, 64
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_llama(**changes) -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG | changes)).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def train_experts(model: nn.Module, seed: int = 1) -> nn.Module:
    """Experts as if trained: their first values are zero, and then an adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            with torch.no_grad():
                parameter.normal_(std=0.3, generator=generator)
    return model
