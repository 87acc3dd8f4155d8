"""Checkpoints and configurations of the official mtLoRA code and of HydraLoRA, to and from PEFT's."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import MtLoraConfig
from .layer import MtLoraLayer

# <module>.lora_A.weight, lora_B0.weight (linear layers) or lora_B.0.weight (blocks), lora_route.weight, expert_scales.0
_OFFICIAL = re.compile(r"^(.+?)(?:\.block_adapter)?\.(lora_A|lora_B|lora_route|expert_scales)\.?(\d*)(?:\.weight)?$")
_STACKED = ("lora_B", "expert_scales")
_BLOCKS = {"attention": ["self_attn"], "ffn": ["mlp"], "both": ["self_attn", "mlp"]}  # by block_adapter_type
_SCALES = {"expert_scales": "lora_scales"}  # PEFT up to 0.20 saves keys that contain the method's prefix only


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published adapter checkpoint as `save_pretrained` would have written it.

    For `peft.set_peft_model_state_dict(model, from_official(...))` on a model with the matching `MtLoraConfig`.
    ``X.lora_B0.weight`` and ``X.block_adapter.lora_B.0.weight`` [d_out, r] and their successors become
    ``X.block_adapter.lora_B`` [N, d_out, r]; A and router change their names only; other keys stay. The adapters
    of one expert have no router here: the published one, whose softmax is 1, is left out.

    Raises:
        ValueError: an expert is missing between others.
    """
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state_dict.items():
        match = _OFFICIAL.match(key)
        if match is None:
            converted[key] = tensor
            continue
        module, name, index = match.groups()
        new = f"{module}.block_adapter.{_SCALES.get(name, name)}"
        if name in _STACKED and index:
            experts.setdefault(new, {})[int(index)] = tensor
        else:
            converted[new] = tensor
    for new, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(f"{new} has the experts {sorted(parts)}, they must be numbered from 0 without gaps")
        converted[new] = torch.stack([parts[i] for i in range(len(parts))])
        if len(parts) == 1:
            converted.pop(new.replace(".lora_B", ".lora_route"), None)
    return converted


def to_official(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """One adapter of a PEFT model under the published names, with the experts apart (views, not copies).

    Linear layers get ``X.lora_B{i}.weight``, blocks ``X.block_adapter.lora_B.{i}.weight``.
    """
    converted: dict[str, Tensor] = {}
    for module_name, layer in model.named_modules():
        if not isinstance(layer, MtLoraLayer) or adapter_name not in layer.lora_mixtures:
            continue
        prefix = module_name.removesuffix(".block_adapter") if layer.component else module_name
        expert = "lora_B" if layer.component else "lora_B."
        a, b, route, scales = (None if p is None else p.detach() for p in layer.parameters_of(adapter_name))
        converted[f"{prefix}.lora_A.weight"] = a
        converted |= {f"{prefix}.{expert}{i}.weight": part for i, part in enumerate(b)}
        if route is not None:
            converted[f"{prefix}.lora_route.weight"] = route
        if scales is not None:
            converted |= {f"{prefix}.expert_scales.{i}": part for i, part in enumerate(scales)}
    return converted


def config_from_official(config: Mapping[str, Any]) -> MtLoraConfig:
    """The `MtLoraConfig` of a published adapter_config.json, parsed.

    Raises:
        ValueError: block_adapter_type is none of the published ones.
    """
    settings = {"lora_alpha": config["lora_alpha"], "lora_dropout": config["lora_dropout"], "r": config["r"]}
    settings |= {"num_experts": config["lora_nums"], "task_type": config.get("task_type")}
    settings["base_model_name_or_path"] = config.get("base_model_name_or_path")
    if config.get("enable_fine_grained_routing"):
        settings["group_size"] = config["routing_group_size"]
    if not config.get("enable_block_adapter"):
        return MtLoraConfig(target_modules=config["target_modules"], **settings)
    kind = config["block_adapter_type"]
    if kind not in _BLOCKS:
        raise ValueError(f"block_adapter_type is {kind!r}, it must be one of {tuple(_BLOCKS)}")
    settings |= {"r": config.get("block_adapter_rank") or config["r"], "style": config["block_adapter_style"]}
    return MtLoraConfig(target_modules=_BLOCKS[kind], **settings)
