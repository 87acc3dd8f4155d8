"""Modules around `routed_lora`, with the parameter names of the published checkpoints."""

from .attach import attach_block_adapters, set_balance_scale
from .loss import add_to_loss
from .routed_lora import RoutedLoRA, RoutedLoRALinear

__all__ = ["RoutedLoRA", "RoutedLoRALinear", "add_to_loss", "attach_block_adapters", "set_balance_scale"]
