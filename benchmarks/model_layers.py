"""Adapters to compare with in a whole model: the published layers, and the best form without a kernel."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import rivals
from .shapes import Inputs


@dataclass(frozen=True)
class Layout:
    """Where the adapters go and their sizes. targets are the ends of module names."""

    name: str
    targets: tuple[str, ...]
    rank: int
    experts: int
    groups: int
    alpha: float

    @property
    def component(self) -> bool:
        return self.targets[0].endswith("_proj")

    def modules(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] in self.targets]


class LowRankBlockAdapter(nn.Module):
    """The published block adapter: one expert after another, each a [T, d] tensor; the block adds the result.

    `swap_in` knows it by its name and attributes.
    """

    def __init__(self, width: int, layout: Layout, like: Tensor) -> None:
        super().__init__()
        options = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.dim, self.rank, self.num_experts = width, layout.rank, layout.experts
        self.num_groups, self.scaling = layout.groups, layout.alpha / layout.rank
        self.dropout, self.enable_blc = nn.Identity(), False
        self.lora_A = nn.Linear(width, layout.rank, **options)
        self.lora_B = nn.ModuleList(nn.Linear(layout.rank, width, **options) for _ in range(layout.experts))
        self.lora_route = nn.Linear(width, layout.groups * layout.experts, **options)

    def forward(self, x: Tensor, hydra_task_id: None = None) -> Tensor:
        h = self.lora_A(self.dropout(x))
        logits = self.lora_route(x).unflatten(-1, (self.num_groups, self.num_experts))
        weights = logits.softmax(-1, dtype=torch.float32).to(x.dtype)
        mixture = torch.zeros_like(x)
        for i, expert in enumerate(self.lora_B):
            spread = weights[..., i].repeat_interleave(self.dim // self.num_groups, -1)
            mixture = mixture + spread * expert(h) * self.scaling
        return mixture


class LoraLinear(nn.Linear):
    """The published linear layer, HydraLoRA's: A runs once per expert, one weight per token and expert."""

    def __init__(self, base: nn.Linear, layout: Layout) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        options = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_num, self.r, self.scaling = layout.experts, layout.rank, layout.alpha / layout.rank
        self.fan_in_fan_out = self.merged = self.disable_adapters = False
        self.enable_blc = self.enable_fine_grained_routing = False
        self.lora_dropout = nn.Identity()
        self.lora_A = nn.Linear(base.in_features, layout.rank, **options)
        for i in range(layout.experts):
            setattr(self, f"lora_B{i}", nn.Linear(layout.rank, base.out_features, **options))
        self.lora_route = nn.Linear(base.in_features, layout.experts, **options)

    def forward(self, x: Tensor, task_types: None = None) -> Tensor:
        result = F.linear(x, self.weight, self.bias)
        weights = self.lora_route(x).softmax(-1, dtype=torch.float32).to(result.dtype)
        for i in range(self.lora_num):
            h = self.lora_A(self.lora_dropout(x))
            result = result + weights[..., i, None] * getattr(self, f"lora_B{i}")(h) * self.scaling
        return result


class HandWritten(nn.Module):
    """The best form without a kernel (`rivals.group_product`), as a child that a hook calls."""

    def __init__(self, d_in: int, d_out: int, layout: Layout, like: Tensor) -> None:
        super().__init__()
        n, r, self.layout = layout.experts, layout.rank, layout
        self.lora_A, self.lora_B, self.lora_route = (
            nn.Parameter(torch.empty(shape, device=like.device, dtype=like.dtype))
            for shape in ((r, d_in), (n, d_out, r), (layout.groups * n, d_in))
        )

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        inputs = Inputs(
            x.flatten(0, -2),
            self.lora_A,
            self.lora_B,
            self.lora_route,
            residual.flatten(0, -2),
            residual,  # no upstream gradient here: autograd brings it
            (),
            self.layout.groups,
            self.layout.alpha / self.layout.rank,
        )
        return rivals.group_product(inputs).view_as(residual)
