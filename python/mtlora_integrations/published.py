"""The layers of the official mtLoRA code: component linear, three block adapters, MMOELoRA."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from .experts import stacked, weight_of
from .layer import SwappedLayer, active_dropout, compute_dtype, mixed_dtypes
from .linear import SwappedLinear, runs_base_alone


class ComponentLinear(SwappedLinear):
    """`LoraLinear`: a router per token, for all outputs or per group of outputs."""

    host_names = ("LoraLinear",)

    @staticmethod
    def fits(layer: Any) -> bool:
        return SwappedLinear.fits(layer) and hasattr(layer, "enable_fine_grained_routing")

    def forward(self, x: Tensor, task_types: Any = None) -> Tensor:
        out = None if runs_base_alone(self) else self.adapted(x, balance=self.enable_blc and self.training)
        return super().forward(x, task_types) if out is None else out


class BlockAdapter(SwappedLayer):
    """`LowRankBlockAdapter`, `BottleneckBlockAdapter`, `MoEAdaptFormerBlockAdapter`: the mixture alone, which the
    patched block adds to its output."""

    host_names = ("LowRankBlockAdapter", "BottleneckBlockAdapter", "MoEAdaptFormerBlockAdapter")

    @staticmethod
    def fits(layer: Any) -> bool:
        return isinstance(getattr(layer, "lora_B", None), nn.ModuleList) and hasattr(layer, "lora_route")

    @staticmethod
    def expert_lists(layer: Any) -> list[list[nn.Parameter]]:
        return [[weight_of(expert) for expert in layer.lora_B._modules.values()]]

    @staticmethod
    def operands(layer: Any) -> dict[str, Any]:
        (experts,) = BlockAdapter.expert_lists(layer)
        return {
            "lora_a": layer.lora_A.weight,
            "lora_b": experts,
            "router": None if layer.lora_route is None else layer.lora_route.weight,
            "num_groups": layer.num_groups,
        }

    def forward(self, x: Tensor, hydra_task_id: Any = None, **kwargs: Any) -> Tensor:
        operands = self.operands(self)
        dtype = compute_dtype(x, operands["lora_a"])
        scales = list(self.expert_scales) if hasattr(self, "expert_scales") else []
        if self.host_must_run(mixed_dtypes(dtype, x.dtype, *(s.dtype for s in scales))):
            return super().forward(x, hydra_task_id, **kwargs)
        operands["lora_b"] = stacked(operands["lora_b"])
        routed = self.num_experts > 1
        summed = [s.dtype for s in scales] + [x.dtype] * routed  # beside the products, in what the host adds up
        return self.mixture(
            x,
            **operands,
            dtype=dtype,
            balance=routed and self.enable_blc and self.training,
            residual=_zeros_in(x, dtype, summed),
            scaling=getattr(self, "scaling", 1.0),  # adaptformer has its scales instead
            activation="relu" if hasattr(self, "activation") else None,
            expert_scale=torch.cat(scales) if scales else None,
            dropout_p=active_dropout(self.dropout),
        )


def _zeros_in(x: Tensor, dtype: torch.dtype, summed: list[torch.dtype]) -> Tensor | None:
    """The host returns the widest of the dtypes; a residual of one stored zero asks `routed_lora` for that one."""
    wide = functools.reduce(torch.promote_types, summed, dtype)
    return None if wide == dtype else x.new_zeros((), dtype=wide).expand(x.shape)


class MMOELinear(SwappedLayer):
    """`MMOELoraLinear` and `MMOELoraLinearS`: one weight per expert and sequence, from the task, and an A for each
    expert. All A side by side are one A of the whole rank; B_i is padded with zeros for the others' columns."""

    host_names = ("MMOELoraLinear", "MMOELoraLinearS")

    @staticmethod
    def fits(layer: Any) -> bool:
        return hasattr(layer, "lora_gate") and isinstance(layer.lora_A, nn.ModuleDict)

    @staticmethod
    def expert_lists(layer: Any) -> list[list[nn.Parameter]]:
        adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
        return [[e.mlp.weight for e in (a.loraA if hasattr(a, "loraA") else a.loraB)] for a in adapters]

    @staticmethod
    def operands(layer: Any) -> dict[str, Any]:
        a = [expert.mlp.weight for expert in layer.lora_A[layer.active_adapter].loraA]
        b = [expert.mlp.weight for expert in layer.lora_B[layer.active_adapter].loraB]
        own = stacked(b).permute(1, 2, 0)  # [d_out, r / N, N]
        return {
            "lora_a": stacked(a).flatten(0, 1),
            "lora_b": torch.diag_embed(own, dim1=0, dim2=2).flatten(2),  # [N, d_out, N * r / N]
        }

    @staticmethod
    def note(layer: Any) -> str:
        return ", whose padded experts every call builds"

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        name = self.active_adapter
        if name not in self.lora_A or runs_base_alone(self) or self.r[name] == 0:
            return super().forward(x, **kwargs)
        operands = self.operands(self)
        dtype = compute_dtype(x, operands["lora_a"])
        base = nn.functional.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        # As in the host a task 0 alone in its batch counts as none given.
        task = kwargs.get("task_id") or kwargs.get("hydra_task_id")
        if task is None:
            task = x.new_full(x.shape[:1], self.task_num, dtype=torch.long)
        gate = self.lora_gate[name](self.lora_task_embedding[name](task))
        scaling = self.scaling[name]
        why = mixed_dtypes(dtype, base.dtype, gate.dtype)
        if math.frexp(scaling)[0] != 0.5:
            why = f"scaling is {scaling}, which the host multiplies by before the weights: only powers of two commute"
        if self.host_must_run(why):
            return super().forward(x, **kwargs)
        out = self.mixture(
            x,
            **operands,
            dtype=dtype,
            residual=base,
            route_weights=gate.unsqueeze(-2),
            scaling=scaling,
            accumulate_into_residual=self.numerics == "eager",
            dropout_p=active_dropout(self.lora_dropout[name]),
        )
        return out.to(x.dtype)
