"""What an adapter stores: stacked parameters, their initial values, their names in published checkpoints."""

import math

import torch
from torch import nn

ACTIVATIONS = {"lowrank": None, "bottleneck": "relu", "adaptformer": "relu"}  # by style
STACKED = ("lora_B", "expert_scales")  # parameters that hold one published tensor per expert


class RoutedParameters(nn.Module):
    """Parameters and settings of one routed mixture; `RoutedLoRA` documents the arguments.

    ``lora_A`` [r, d_in], ``lora_B`` [N, d_out, r], ``lora_route`` [G*N, d_in] or None for one expert,
    ``expert_scales`` [N, 1] or None. The experts are stacked so that no call copies them.
    """

    expert_name = "lora_B.{}.weight"

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
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features, features if out_features is None else out_features
        self.rank, self.num_experts = rank, num_experts
        for name in ("in_features", "out_features", "rank", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be positive")
        if style not in ACTIVATIONS:
            raise ValueError(f"style is {style!r}, it must be one of {tuple(ACTIVATIONS)}")
        self.num_groups = self._groups(num_groups, group_size)
        self.style, self.scale_init, self.dropout = style, scale_init, dropout
        self.scaling = 1.0 if style == "adaptformer" else alpha / rank
        self.numerics, self.compute_dtype, self.impl = numerics, compute_dtype, impl
        self.balance_coef, self.balance_scale, self.track_load = balance_coef, 1.0, track_load

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.lora_A = parameter(rank, features)
        self.lora_B = parameter(num_experts, self.out_features, rank)
        self.lora_route = parameter(self.num_groups * num_experts, features) if num_experts > 1 else None
        self.expert_scales = parameter(num_experts, 1) if style == "adaptformer" else None
        # A buffer, written in place: a compiled checkpoint may not set attributes.
        self.register_buffer("last_load", torch.zeros(num_experts, device=device), persistent=False)
        self.reset_parameters()

    def _groups(self, num_groups: int | None, group_size: int | None) -> int:
        if num_groups is not None and group_size is not None:
            raise ValueError(f"num_groups = {num_groups} and group_size = {group_size} are both given, give one")
        if num_groups is None and group_size is None:
            return 1
        name, divisor = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
        if divisor < 1 or self.out_features % divisor:
            raise ValueError(f"{name} is {divisor}, it must be a divisor of the output width {self.out_features}")
        return divisor if group_size is None else self.out_features // divisor

    def reset_parameters(self) -> None:
        """The published initial values; see the table in `RoutedLoRA`."""
        if self.style == "lowrank":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.kaiming_uniform_(self.lora_A, nonlinearity="relu")
        if self.style == "bottleneck":
            nn.init.normal_(self.lora_B, std=0.02)
        else:
            nn.init.zeros_(self.lora_B)
        if self.lora_route is not None:
            nn.init.kaiming_uniform_(self.lora_route, a=math.sqrt(5))
        if self.expert_scales is not None:
            nn.init.constant_(self.expert_scales, self.scale_init)

    def _published(self, prefix: str) -> dict[str, list[str]]:
        """State-dict names of each parameter, one per expert where it is stacked."""
        experts = range(self.num_experts)
        names = {"lora_A": ["lora_A.weight"], "lora_B": [self.expert_name.format(i) for i in experts]}
        if self.lora_route is not None:
            names["lora_route"] = ["lora_route.weight"]
        if self.expert_scales is not None:
            names["expert_scales"] = [f"expert_scales.{i}" for i in experts]
        return {name: [prefix + key for key in keys] for name, keys in names.items()}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, keys in self._published(prefix).items():
            tensor = destination.pop(prefix + name)
            # One index at a time: unbind fails on a tensor that FSDP2 sharded over the experts.
            parts = [tensor[i] for i in range(len(keys))] if name in STACKED else [tensor]
            destination.update(zip(keys, parts, strict=True))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        published = self._published(prefix)
        for name, keys in published.items():
            if prefix + name in state_dict:
                continue  # saved from named_parameters(), already stacked
            parameter = getattr(self, name).detach()
            shape = parameter.shape[1:] if name in STACKED else parameter.shape
            given = {key: state_dict.pop(key) for key in keys if key in state_dict}
            missing += [key for key in keys if strict and key not in given]
            misfits = [
                f"size mismatch for {key}: {tuple(tensor.shape)} given, {tuple(shape)} in the module"
                for key, tensor in given.items()
                if tensor.shape != shape
            ]
            errors += misfits
            # An expert that is not given keeps its values, as a separate module would; on meta it has none.
            if given and not misfits and (len(given) == len(keys) or not parameter.is_meta):
                parts = [given[key] if key in given else parameter[i] for i, key in enumerate(keys)]
                state_dict[prefix + name] = torch.stack(parts) if name in STACKED else parts[0]
        own_missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, own_missing, unexpected, errors)
        missing += [key for key in own_missing if key.removeprefix(prefix) not in published]
