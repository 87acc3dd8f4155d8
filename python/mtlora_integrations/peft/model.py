"""Puts the layers of a configuration onto a model, and takes them off."""

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

import mtlora_kernels as mk

from .config import MtLoraConfig
from .layer import CANNOT_MERGE, MtLoraLayer

NOT_BLOCKS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)


class MtLoraModel(BaseTuner):
    """mtLoRA adapters on a model, made by `peft.get_peft_model(model, MtLoraConfig(...))`.

    Every targeted module keeps its class, its name and its parameters; it gets a child `block_adapter`
    (`MtLoraLayer`) and a forward hook. Merging raises NotImplementedError; `unload()` removes both.
    """

    prefix = "lora_"
    tuner_layer_cls = MtLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # no defaults: the paper compares several places

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in the base class, which takes from a state dict the names of the modules that have adapters."""
        if state_dict is not None:
            state_dict = {key.replace(".block_adapter.", "."): value for key, value in state_dict.items()}
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)

    def _create_and_replace(
        self,
        peft_config: MtLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target._modules.get("block_adapter")
        if not isinstance(layer, MtLoraLayer):
            layer = MtLoraLayer(*self._widths(peft_config, target, current_key))
            mk.nn.add_block_adapter(target, layer, current_key)
        base = [p for name, p in target.named_parameters() if not name.startswith("block_adapter.")]
        dtype = next((p.dtype for p in base if p.is_floating_point()), None)  # quantised weights are integers
        layer.update_layer(adapter_name, peft_config, base[0].device if base else None, dtype)

    def _widths(self, config: MtLoraConfig, target: nn.Module, key: str) -> tuple[int, int, bool]:
        """Input width, output width, and whether target is a linear layer rather than a block."""
        if isinstance(target, NOT_BLOCKS):
            raise ValueError(f"{key} is a {type(target).__name__}, a target must be a linear layer or a block")
        if isinstance(getattr(target, "in_features", None), int) and hasattr(target, "out_features"):
            return target.in_features, target.out_features, True
        if hasattr(target, "nf"):  # transformers' Conv1D, a linear layer with its weight transposed
            return target.weight.shape[0], target.nf, True
        width = config.features or getattr(getattr(self.model, "config", None), "hidden_size", None)
        if width is None:
            raise ValueError(f"features is None and the model's config has no hidden_size, it must be {key}'s width")
        return width, width, False

    def unload(self) -> nn.Module:
        """The base model, without adapters and hooks."""
        for module in list(self.model.modules()):
            if isinstance(module._modules.get("block_adapter"), MtLoraLayer):
                mk.nn.remove_block_adapter(module)
        return super().unload()

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)
