"""What an adapter stores: stacked parameters and their names in published checkpoints."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .mixture import RoutedMixture

STACKED = ("lora_B", "expert_scales")  # parameters that hold one published tensor per expert


class RoutedParameters(RoutedMixture):
    """A routed mixture with its parameters; `RoutedLoRA` documents the arguments.

    ``lora_A`` [r, d_in], ``lora_B`` [N, d_out, r], ``lora_route`` [G*N, d_in] or None for one expert,
    ``expert_scales`` [N, 1] or None. The experts are stacked so that no call copies them.
    """

    expert_name = "lora_B.{}.weight"

    def __init__(
        self, features: int, rank: int, num_experts: int, *, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        super().__init__(features, rank, num_experts, **options)
        for name, parameter in self.new_parameters(options.get("device"), dtype).items():
            self.register_parameter(name, parameter)

    def reset_parameters(self) -> None:
        """The published initial values, see the table in `RoutedLoRA`; `last_load` is zero again."""
        self.last_load.zero_()
        self.initialize(self.lora_A, self.lora_B, self.lora_route, self.expert_scales)

    def _published(self, prefix: str) -> dict[str, list[str]]:
        """State-dict names of each parameter, one per expert where it is stacked. Without those that the adapter does
        not have, or no longer: parametrised or pruned, a parameter is saved under PyTorch's own name for it."""
        experts = range(self.num_experts)
        names = {"lora_A": ["lora_A.weight"], "lora_B": [self.expert_name.format(i) for i in experts]}
        names |= {"lora_route": ["lora_route.weight"], "expert_scales": [f"expert_scales.{i}" for i in experts]}
        own = {name for name, parameter in self._parameters.items() if parameter is not None}
        return {name: [prefix + key for key in keys] for name, keys in names.items() if name in own}

    def _fqn_modifiers(self) -> dict[str, str]:
        # torch.distributed.checkpoint.state_dict follows every name of a state dict along attributes, and goes
        # through the attribute that stands here for its first part.
        firsts = {key.partition(".")[0] for keys in self._published("").values() for key in keys}
        return dict.fromkeys(firsts, "_published_tree")

    @property
    def _published_tree(self) -> SimpleNamespace:
        tree = SimpleNamespace()
        for key in (key for keys in self._published("").values() for key in keys):
            node = tree
            for part in key.split("."):
                node = node.__dict__.setdefault(part, SimpleNamespace())
        return tree

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
            if prefix + name in state_dict and not any(key in state_dict for key in keys):
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
                value = torch.stack(parts) if name in STACKED else parts[0]
                state_dict[prefix + name] = _sharded_like(parameter, value)
        own_missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, own_missing, unexpected, errors)
        missing += [key for key in own_missing if key.removeprefix(prefix) not in published]


def _sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """value, which every process holds whole, split as FSDP2 split parameter."""
    if not hasattr(parameter, "placements") or hasattr(value, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor  # slow to import, and only sharded models need it

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
