"""The linear layer that both hosts have: a frozen base beside the mixture."""

from typing import Any

from torch import Tensor, nn

import mtlora_kernels as mk

from .experts import stacked, weight_of
from .layer import SwappedLayer, active_dropout, compute_dtype, mixed_dtypes


class SwappedLinear(SwappedLayer):
    """The linear layer of both hosts: a frozen base, one A, lora_num experts lora_B{i}, a router per token."""

    @staticmethod
    def fits(layer: Any) -> bool:
        return isinstance(layer, nn.Linear) and hasattr(layer, "lora_num") and hasattr(layer, "lora_route")

    @staticmethod
    def expert_lists(layer: Any) -> list[list[nn.Parameter]]:
        return [[weight_of(layer._modules[f"lora_B{i}"]) for i in range(layer.lora_num)]]

    @staticmethod
    def operands(layer: Any) -> dict[str, Any]:
        (experts,) = SwappedLinear.expert_lists(layer)
        return {
            "lora_a": layer.lora_A.weight,
            "lora_b": experts,
            "router": layer.lora_route.weight,
            "num_groups": getattr(layer, "num_groups", 1),
        }

    @staticmethod
    def note(layer: Any) -> str:
        if getattr(layer.lora_dropout, "p", 0) == 0 or getattr(layer, "enable_fine_grained_routing", False):
            return ""
        return ", one dropout mask for all experts, where the host draws one for each"

    def adapted(self, x: Tensor, balance: bool = False) -> Tensor | None:
        """Base and mixture; None where the host must do it."""
        x = mk.nn.mark_input(x, self)
        operands = self.operands(self)
        dtype = compute_dtype(x, operands["lora_a"])
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        base = nn.functional.linear(x, weight.to(x.dtype), self.bias)
        if self.host_must_run(mixed_dtypes(dtype, base.dtype)):
            return None
        operands["lora_b"] = stacked(operands["lora_b"])
        return self.mixture(
            x,
            **operands,
            dtype=dtype,
            balance=balance,
            residual=base,
            scaling=self.scaling,
            accumulate_into_residual=self.numerics == "eager",
            dropout_p=active_dropout(self.lora_dropout),
        )


def runs_base_alone(layer: Any) -> bool:
    """Adapters off, or merged into the base: the host's forward is the answer."""
    return layer.disable_adapters or layer.merged
