"""Block-level adapters on an existing model, by forward hooks, and the balance scale of a whole model."""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..kept import keep_input
from .mixture import RoutedMixture
from .routed_lora import RoutedLoRA


def attach_block_adapters(
    model: nn.Module,
    blocks: str | Iterable[str],
    features: int,
    rank: int,
    num_experts: int,
    *,
    freeze_base: bool = False,
    **options: Any,
) -> dict[str, RoutedLoRA]:
    """Give each named block a child `block_adapter` and forward hooks: output + adapter(block input).

    The adapter's residual is the block's output. A block is called with its input as the first positional
    argument or as hidden_states=, and returns a tensor or a tuple that starts with one. The hooks stay when
    others patch the block's forward, which silently drops a wrapper; the block keeps its type and names.

    Args:
        blocks: names of `model.named_modules()`, or one regular expression that matches whole names.
        features: width of the blocks' input and output.
        freeze_base: also set requires_grad=False on every parameter outside routed adapters.
        options: as in `RoutedLoRA`; device is by default that of the block's first parameter.

    Returns:
        The new adapters by block name.

    Raises:
        TypeError, ValueError: blocks names no block, or one that already has an adapter, or an option is none of
            `RoutedLoRA`. The model is left as it was.
    """
    adapters = {}
    found = _find_blocks(model, blocks)
    for name, block in found.items():
        device = next((parameter.device for parameter in block.parameters()), None)
        adapters[name] = RoutedLoRA(features, rank, num_experts, **({"device": device} | options))
    for name, block in found.items():
        add_block_adapter(block, adapters[name], name)
    if freeze_base:
        for module in model.modules():
            if not isinstance(module, RoutedLoRA):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
    return adapters


def add_block_adapter(block: nn.Module, adapter: nn.Module, name: str = "block") -> None:
    """Make adapter the child `block_adapter` of one block, and the block return adapter(input, output).

    For adapters of any class; `attach_block_adapters` makes and adds its own. name stands in the messages.

    Raises:
        ValueError: block already has an adapter or has no forward of its own.
    """
    _check_block(name, block)
    block.block_adapter = adapter.train(block.training)
    block.block_adapter_hooks = keep_input(block), block.register_forward_hook(_add_output, with_kwargs=True)


def remove_block_adapter(block: nn.Module) -> nn.Module:
    """Undo `add_block_adapter`; returns the adapter.

    Raises:
        ValueError: block has none.
    """
    if "block_adapter" not in block._modules:
        raise ValueError(f"block is a {type(block).__name__} without block_adapter, it must have one")
    adapter = block.block_adapter
    for hook in block.block_adapter_hooks:
        hook.remove()
    del block.block_adapter, block.block_adapter_hooks
    return adapter


def set_balance_scale(model: nn.Module, scale: float) -> None:
    """Scale the balance gradient of every adapter in model as the loss itself is scaled; call before forward.

    The term bypasses whatever multiplies the loss: with gradient accumulation over k steps pass 1 / k, with a
    gradient scaler scaler.get_scale(), with both their product.
    """
    for module in model.modules():
        if isinstance(module, RoutedMixture):
            module.balance_scale = float(scale)


def _find_blocks(model: nn.Module, blocks: str | Iterable[str]) -> dict[str, nn.Module]:
    if isinstance(blocks, str):
        try:
            pattern = re.compile(blocks)
        except re.error as error:
            raise ValueError(f"blocks is {blocks!r}, it must be a regular expression: {error}") from error
        found = {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}
        unknown = []
    else:
        names = list(blocks) if isinstance(blocks, Iterable) else [blocks]
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"blocks is {type(blocks).__name__}, it must be names of modules or a regular expression")
        modules = dict(model.named_modules(remove_duplicate=False))
        found = {name: modules[name] for name in names if name in modules}
        unknown = [name for name in names if name not in modules]
    if unknown or not found:
        raise ValueError(f"blocks is {blocks!r}, it must name modules of the model; not found: {unknown or 'any'}")
    for name, block in found.items():
        _check_block(name or "model", block)
    if len(set(map(id, found.values()))) < len(found):
        raise ValueError(f"blocks is {blocks!r}, two of these names are the same module, give one of them")
    return found


def _check_block(name: str, block: nn.Module) -> None:
    if "block_adapter" in block._modules:
        raise ValueError(f"{name} already has a block_adapter, a block takes one")
    if isinstance(block, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        # A Sequential would run the adapter as its last layer; the other two have no forward.
        raise ValueError(f"{name} is a {type(block).__name__}, it must be a module with its own forward")


def _add_output(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    # A function of the module, not a closure or a method: deepcopy and pickle keep it.
    if args:
        x = args[0]
    elif "hidden_states" in kwargs:
        x = kwargs["hidden_states"]
    else:
        called = f"{type(block).__name__} was called with keywords {sorted(kwargs)}"
        raise TypeError(f"{called}, its input must come first or as hidden_states=")
    if isinstance(output, Tensor):
        return block.block_adapter(x, output)
    if type(output) is tuple:
        return (block.block_adapter(x, output[0]), *output[1:])
    raise TypeError(f"{type(block).__name__} returned {type(output).__name__}, it must return a tensor or a tuple")
