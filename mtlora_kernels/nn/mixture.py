"""One routed mixture apart from its parameters: settings, initial values, the call and its balance term."""

import math

import torch
from torch import Tensor, nn

from ..functional import balance_loss, routed_lora
from ..requirements import require_int
from ..validation import MAX_WIDTH
from .loss import add_to_loss

ACTIVATIONS = {"lowrank": None, "bottleneck": "relu", "adaptformer": "relu"}  # by style


class RoutedMixture(nn.Module):
    """What an adapter knows besides its parameters; `RoutedLoRA` documents the arguments.

    For layers that keep their parameters themselves, as host libraries ask: `new_parameters` makes them and
    `mix` takes them. `last_load` [N] is a buffer that `mix` writes.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        num_experts: int,
        *,
        out_features: int | None = None,
        num_groups: int | None = None,
        group_size: int | None = None,
        alpha: float = 16.0,
        style: str = "lowrank",
        scale_init: float = 0.1,
        dropout: float = 0.0,
        numerics: str = "fp32",
        compute_dtype: torch.dtype | None = None,
        balance_coef: float = 0.0,
        track_load: bool = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features, features if out_features is None else out_features
        self.rank, self.num_experts = rank, num_experts
        for name, value in (("features", features), ("out_features", self.out_features)):
            require_int(name, value, 1)
        for name in ("rank", "num_experts"):
            require_int(name, getattr(self, name), 1, MAX_WIDTH)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, it must be in [0, 1)")
        if style not in ACTIVATIONS:
            raise ValueError(f"style is {style!r}, it must be one of {tuple(ACTIVATIONS)}")
        self.num_groups = self._groups(num_groups, group_size)
        self.style, self.scale_init, self.dropout = style, scale_init, dropout
        self.scaling = 1.0 if style == "adaptformer" else alpha / rank
        self.numerics, self.compute_dtype, self.impl = numerics, compute_dtype, impl
        self.balance_coef, self.balance_scale, self.track_load = balance_coef, 1.0, track_load
        # A buffer, written in place: a compiled checkpoint may not set attributes.
        self.register_buffer("last_load", torch.zeros(num_experts, device=device), persistent=False)

    def _groups(self, num_groups: int | None, group_size: int | None) -> int:
        if num_groups is not None and group_size is not None:
            raise ValueError(f"num_groups = {num_groups} and group_size = {group_size} are both given, give one")
        if num_groups is None and group_size is None:
            return 1
        name, divisor = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
        require_int(name, divisor, 1)
        if self.out_features % divisor:
            raise ValueError(f"{name} is {divisor}, it must be a divisor of the output width {self.out_features}")
        return divisor if group_size is None else self.out_features // divisor

    def new_parameters(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, nn.Parameter | None]:
        """``lora_A`` [r, d_in], ``lora_B`` [N, d_out, r], ``lora_route`` [G*N, d_in] or None for one expert,
        ``expert_scales`` [N, 1] or None, with the published initial values (table in `RoutedLoRA`)."""
        n = self.num_experts
        shapes = {"lora_A": (self.rank, self.in_features), "lora_B": (n, self.out_features, self.rank)}
        shapes["lora_route"] = (self.num_groups * n, self.in_features) if n > 1 else None
        shapes["expert_scales"] = (n, 1) if self.style == "adaptformer" else None
        parameters = {
            name: None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            for name, shape in shapes.items()
        }
        self.initialize(**parameters)
        return parameters

    def initialize(
        self, lora_A: Tensor, lora_B: Tensor, lora_route: Tensor | None = None, expert_scales: Tensor | None = None
    ) -> None:
        """Write the published initial values."""
        if self.style == "lowrank":
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        else:
            nn.init.kaiming_uniform_(lora_A, nonlinearity="relu")
        if self.style == "bottleneck":
            nn.init.normal_(lora_B, std=0.02)
        else:
            nn.init.zeros_(lora_B)
        if lora_route is not None:
            nn.init.kaiming_uniform_(lora_route, a=math.sqrt(5))
        if expert_scales is not None:
            nn.init.constant_(expert_scales, self.scale_init)

    def mix(
        self,
        x: Tensor,
        residual: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_route: Tensor | None = None,
        expert_scales: Tensor | None = None,
        *,
        accumulate: bool = False,
    ) -> Tensor:
        """`routed_lora` by these settings on x [..., features], with dropout, load and balance term in training.

        accumulate: with numerics="eager", start the expert sum at residual, as component layers do.
        """
        balanced = self.training and self.balance_coef != 0
        result = routed_lora(
            x,
            lora_A,
            lora_B,
            lora_route,
            residual,
            scaling=self.scaling,
            num_groups=self.num_groups,
            numerics=self.numerics,
            activation=ACTIVATIONS[self.style],
            expert_scale=None if expert_scales is None else expert_scales.squeeze(1),
            dropout_p=self.dropout if self.training else 0.0,
            compute_dtype=self.compute_dtype,
            accumulate_into_residual=accumulate and self.numerics == "eager",
            return_load=balanced or self.track_load,
            impl=self.impl,
        )
        if isinstance(result, Tensor):
            return result
        out, load = result
        self.last_load.copy_(load.detach())
        if balanced and load.requires_grad:
            out = add_to_loss(out, self.balance_coef * balance_loss(load) * self.balance_scale)
        return out

    def extra_repr(self) -> str:
        sizes = "in_features", "out_features", "rank", "num_experts", "num_groups"
        settings = "style", "scaling", "dropout", "numerics"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in sizes + settings)
