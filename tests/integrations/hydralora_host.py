"""A stand-in, in our own words, for HydraLoRA's linear layer; see published_host.py."""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Linear):
    def __init__(self, d_in, d_out, r, experts, alpha=32, dropout=0.0):
        super().__init__(d_in, d_out)
        self.r, self.lora_num, self.scaling, self.fan_in_fan_out = r, experts, alpha / r, False
        self.merged = self.disable_adapters = False
        self.lora_dropout = nn.Dropout(dropout) if dropout else lambda x: x
        self.lora_route = nn.Linear(d_in, experts, bias=False)
        self.lora_A = nn.Linear(d_in, r, bias=False)
        for i in range(experts):
            setattr(self, f"lora_B{i}", nn.Linear(r, d_out, bias=False))
        self.weight.requires_grad_(False)

    def forward(self, x, task_types=None):
        result = F.linear(x, self.weight, self.bias)
        if self.disable_adapters:
            raise ImportError("the host has no answer")
        if not self.merged:
            weights = self.lora_route(x).softmax(-1, dtype=torch.float32).to(result.dtype)
            for i in range(self.lora_num):
                expert = getattr(self, f"lora_B{i}")(self.lora_A(self.lora_dropout(x)))
                result = result + weights[:, :, i : i + 1] * expert * self.scaling
        return result, torch.zeros(1)[0].to(result)
