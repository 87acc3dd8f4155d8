"""Stand-ins, in our own words, for the layers of the official mtLoRA code: its class and attribute names, its
operators in its order. `test_host_checkouts.py` runs the real ones."""

import torch
import torch.nn.functional as F
from torch import nn


def balance(weights: torch.Tensor) -> torch.Tensor:
    load = weights.mean(dim=tuple(range(weights.dim() - 1))).float()
    return load.var() / (load.mean() ** 2 + 1e-10) if len(load) > 1 else load.new_zeros(())


def spread(weights: torch.Tensor, expert: int, width: int) -> torch.Tensor:
    """[..., G, N] to the expert's factor for each of the width outputs."""
    return weights[..., expert].repeat_interleave(width // weights.shape[-2], dim=-1)


class LoraLayer:
    def __init__(self, r, alpha, dropout):
        self.r, self.scaling, self.merged, self.disable_adapters = r, alpha / r, False, False
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()


class LoraLinear(nn.Linear, LoraLayer):
    def __init__(
        self, d_in, d_out, r, experts, alpha=32, dropout=0.0, group_size=None, blc=False, fan_in_fan_out=False
    ):
        nn.Linear.__init__(self, d_in, d_out)
        LoraLayer.__init__(self, r, alpha, dropout)
        self.lora_num, self.enable_blc, self.fan_in_fan_out = experts, blc, fan_in_fan_out
        self.enable_fine_grained_routing, self.routing_group_size = group_size is not None, group_size or 1
        self.num_groups = d_out // group_size if group_size else 1
        self.lora_route = nn.Linear(d_in, experts * self.num_groups, bias=False)
        self.lora_A = nn.Linear(d_in, r, bias=False)
        for i in range(experts):
            setattr(self, f"lora_B{i}", nn.Linear(r, d_out, bias=False))
        self.weight.requires_grad_(False)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T

    def forward(self, x, task_types=None):
        weight = (self.weight.T if self.fan_in_fan_out else self.weight).to(x.dtype)
        result = F.linear(x, weight, self.bias)
        if self.disable_adapters:
            return result
        self.last_blc = None
        if self.merged:
            return result
        logits = self.lora_route(x.to(self.lora_route.weight.dtype)).unflatten(-1, (self.num_groups, self.lora_num))
        weights = logits.softmax(-1, dtype=torch.float32).to(result.dtype)
        shared = None
        for i in range(self.lora_num):
            if shared is None or not self.enable_fine_grained_routing:  # scalar routing drops out per expert
                shared = self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype)))
            expert = getattr(self, f"lora_B{i}")(shared)
            result = result + spread(weights, i, self.out_features) * expert * self.scaling
        if self.enable_blc and self.training:
            self.last_blc = balance(weights)
        return result


class _BlockAdapter(nn.Module):
    def __init__(self, dim, r, experts, alpha=32, dropout=0.0, group_size=None, blc=False):
        super().__init__()
        self.num_experts, self.enable_blc, self.last_blc = experts, blc, None
        self.num_groups = dim // group_size if group_size and experts > 1 else 1
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Linear(dim, r, bias=False)
        self.lora_B = nn.ModuleList([nn.Linear(r, dim, bias=False) for _ in range(experts)])
        self.lora_route = nn.Linear(dim, self.num_groups * experts, bias=False) if experts > 1 else None
        self.set_style(alpha / r, experts)

    def mix(self, x, hidden, weigh):
        self.last_blc = None
        if self.num_experts == 1:
            return weigh(0, self.lora_B[0](hidden), 1.0)
        logits = self.lora_route(x.to(self.lora_route.weight.dtype)).unflatten(-1, (self.num_groups, self.num_experts))
        weights = logits.softmax(-1, dtype=torch.float32).to(x.dtype)
        result = torch.zeros_like(x)
        for i, lora_b in enumerate(self.lora_B):
            result = result + weigh(i, lora_b(hidden), spread(weights, i, x.shape[-1]))
        if self.enable_blc and self.training:
            self.last_blc = balance(weights)
        return result

    def down(self, x):
        return self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))


class LowRankBlockAdapter(_BlockAdapter):
    def set_style(self, scaling, experts):
        self.scaling = scaling

    def forward(self, x, hydra_task_id=None, **kwargs):
        return self.mix(x, self.down(x), lambda i, expert, weight: weight * expert * self.scaling)


class BottleneckBlockAdapter(_BlockAdapter):
    def set_style(self, scaling, experts):
        self.scaling, self.activation = scaling, nn.ReLU()

    def forward(self, x, hydra_task_id=None, **kwargs):
        hidden = self.activation(self.down(x))
        return self.mix(x, hidden, lambda i, expert, weight: weight * expert * self.scaling)


class MoEAdaptFormerBlockAdapter(_BlockAdapter):
    def set_style(self, scaling, experts):
        self.activation = nn.ReLU()
        self.expert_scales = nn.ParameterList([nn.Parameter(torch.full((1,), 0.5)) for _ in range(experts)])

    def forward(self, x, hydra_task_id=None, **kwargs):
        hidden = self.activation(self.down(x))
        return self.mix(x, hidden, lambda i, expert, weight: weight * (self.expert_scales[i] * expert))


class _Expert(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.mlp = nn.Linear(d_in, d_out, bias=False)
        self.weight = self.mlp.weight

    def forward(self, x):
        return self.mlp(x)


class _Experts(nn.Module):
    def __init__(self, name, d_in, d_out, experts):
        super().__init__()
        setattr(self, name, nn.ModuleList([_Expert(d_in, d_out) for _ in range(experts)]))


class _Gate(nn.Module):
    def __init__(self, width, experts):
        super().__init__()
        self.GateL = nn.Linear(width, experts, bias=False)

    def forward(self, x):
        return self.GateL(x).softmax(1)


class MMOELoraLinear(nn.Linear, LoraLayer):
    def __init__(self, d_in, d_out, r, experts, alpha=32, dropout=0.0, tasks=3, adapter="default"):
        nn.Linear.__init__(self, d_in, d_out)
        LoraLayer.__init__(self, r, alpha, 0)
        self.task_num, self.expert_num, self.active_adapter, self.fan_in_fan_out = tasks, experts, adapter, False
        self.r, self.scaling = {adapter: r}, {adapter: alpha / r}
        self.lora_dropout = nn.ModuleDict({adapter: nn.Dropout(dropout) if dropout else nn.Identity()})
        self.lora_A = nn.ModuleDict({adapter: _Experts("loraA", d_in, r // experts, experts)})
        self.lora_B = nn.ModuleDict({adapter: _Experts("loraB", r // experts, d_out, experts)})
        self.lora_task_embedding = nn.ModuleDict({adapter: nn.Embedding(tasks + 1, 8)})
        self.lora_gate = nn.ModuleDict({adapter: _Gate(8, experts)})
        self.weight.requires_grad_(False)

    def forward(self, x, **kwargs):
        result = F.linear(x, self.weight, self.bias)
        name = self.active_adapter
        if name not in self.lora_A or self.disable_adapters or self.merged:
            return result
        task = kwargs.get("task_id") or kwargs.get("hydra_task_id")
        if task is None:
            task = torch.full((len(x),), self.task_num, device=x.device)
        weights = self.lora_gate[name](self.lora_task_embedding[name](task))
        dropped = self.lora_dropout[name](x.to(self.lora_A[name].loraA[0].weight.dtype))
        for i in range(self.expert_num):
            expert = self.lora_B[name].loraB[i](self.lora_A[name].loraA[i](dropped))
            result += expert * self.scaling[name] * weights[:, i, None, None]
        self.last_blc = None
        return result.to(x.dtype)


class MMOELoraLinearS(MMOELoraLinear):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs)
