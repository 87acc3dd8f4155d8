"""The layer of HydraLoRA's code."""

from typing import Any

from torch import Tensor

from .linear import SwappedLinear, runs_base_alone


class HydraLinear(SwappedLinear):
    """`Linear`: one router per token for all outputs, a tuple out."""

    host_names = ("Linear",)

    @staticmethod
    def fits(layer: Any) -> bool:
        return SwappedLinear.fits(layer) and not hasattr(layer, "num_groups")

    def forward(self, x: Tensor, task_types: Any = None) -> tuple[Tensor, Tensor]:
        out = None if runs_base_alone(self) else self.adapted(x)
        return super().forward(x, task_types) if out is None else (out, out.new_zeros(()))
