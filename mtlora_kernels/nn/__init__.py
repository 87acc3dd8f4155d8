"""Modules around `routed_lora`, with the parameter names of the published checkpoints."""

from ..beside import mark_input
from .attach import add_block_adapter, attach_block_adapters, keep_input, remove_block_adapter, set_balance_scale
from .loss import add_to_loss
from .mixture import RoutedMixture
from .routed_lora import RoutedLoRA, RoutedLoRALinear

__all__ = [
    "RoutedLoRA", "RoutedLoRALinear", "RoutedMixture", "add_block_adapter", "add_to_loss", "attach_block_adapters",
    "keep_input", "mark_input", "remove_block_adapter", "set_balance_scale",
]  # fmt: skip
