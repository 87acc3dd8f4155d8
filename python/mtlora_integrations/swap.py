"""Swap this package's forward into the adapter layers of a host model, and out again."""

from dataclasses import dataclass, field

import torch
from torch import nn

import mtlora_kernels as mk

from . import hydralora, published
from .layer import SwappedLayer, swapped_class

INPUT_HOOK = "swapped_input_hook"
KINDS = (published.ComponentLinear, published.BlockAdapter, published.MMOELinear, hydralora.HydraLinear)


@dataclass
class SwapReport:
    """What `swap_in` did, by module name. `print(report)` shows it."""

    swapped: dict[str, str] = field(default_factory=dict)  # what the layer is
    skipped: dict[str, str] = field(default_factory=dict)  # why it still runs the host's forward
    shared_bytes: int = 0  # of experts that share a storage, so that a call can take them as one tensor

    def __str__(self) -> str:
        lines = [
            f"swapped {len(self.swapped)} adapter layers, {self.shared_bytes / 2**20:.1f} MiB of experts share storages"
        ]
        lines += [f"  {name}: {what}" for name, what in self.swapped.items()]
        lines += [f"  not {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def swap_in(model: nn.Module, numerics: str = "fp32", impl: str | None = None, strict: bool = False) -> SwapReport:
    """Let the adapter layers of the official mtLoRA code and of HydraLoRA run on `mtlora_kernels.routed_lora`.

    Layers are found by the name and the attributes of their class, from whatever package it came. Each keeps its
    parameters, names, hooks, isinstance and state dict; only the instance's class changes, to a subclass with
    another forward, and the block around a block adapter gets `mk.nn.keep_input`. Expert matrices move into one
    storage per layer, so that no call copies them. Call it after the adapters are injected, and before compiling or
    sharding; again to change the settings.

    Args:
        numerics: "fp32", more accurate than the hosts, or "eager", the hosts' own rounding points: at dropout 0, on
            CUDA in bf16 and fp16, with products on cuBLASLt and split-K off, the model's output keeps every bit.
        impl: as in `mtlora_kernels.routed_lora`.
        strict: raise where a layer, now or in a later call, would run the host's forward instead.

    Raises:
        ValueError: numerics is unknown, or impl on this machine; or strict, and an adapter layer cannot be swapped
            or none is there. The model is left as it was.
    """
    if numerics not in ("fp32", "eager"):
        raise ValueError(f"numerics is {numerics!r}, it must be 'fp32' or 'eager'")
    names = dict.fromkeys(mk.available_impls("cpu") + mk.available_impls("cuda"))
    if impl is not None and impl not in names:
        raise ValueError(f"impl is {impl!r}, it must be None or one of {tuple(names)}")
    report, found = SwapReport(), {}
    for name, module in model.named_modules():
        host = module.host if isinstance(module, SwappedLayer) else type(module)
        kind = next((kind for kind in KINDS if _is_kind(host, kind, module)), None)
        why = _misfit(module, host, kind, impl)
        if why is None:
            found[name] = (module, host, kind)
        elif _has_adapter(module):
            report.skipped[name] = why
    if strict and (report.skipped or not found):
        raise ValueError(f"strict is True, but {'not every' if found else 'no'} adapter layer can be swapped\n{report}")
    for name, (module, host, kind) in found.items():
        vars(module).pop("forward", None)
        module.__class__ = swapped_class(host, kind, numerics, impl, strict)
        report.shared_bytes += module.share_experts()
        if name and kind is published.BlockAdapter:
            _keep_input_of(model.get_submodule(name.rpartition(".")[0]))
        report.swapped[name] = _description(module)
    return report


def swap_out(model: nn.Module) -> None:
    """Undo `swap_in`: every layer has the host's class again, every expert a storage of its own."""
    for module in model.modules():
        if isinstance(module, SwappedLayer):
            for name in ("forward", "reruns", "balance_grad", "experts_grad"):
                vars(module).pop(name, None)
            module.separate_experts()
            module.__class__ = module.host
        handle = vars(module).pop(INPUT_HOOK, None)
        if handle is not None:
            handle.remove()


def _keep_input_of(block: nn.Module) -> None:
    """The block that has the adapter as a child and calls it after itself."""
    if INPUT_HOOK not in vars(block):
        setattr(block, INPUT_HOOK, mk.nn.keep_input(block))


def _is_kind(host: type[nn.Module], kind: type[SwappedLayer], module: nn.Module) -> bool:
    named = next((c for c in host.__mro__ if c.__name__ in kind.host_names and "forward" in vars(c)), None)
    return named is not None and host.forward is named.forward and kind.fits(module)


def _has_adapter(module: nn.Module) -> bool:
    names = (*module._modules, *module._parameters)
    ours = type(module).__module__.partition(".")[0] in ("mtlora_kernels", "mtlora_integrations")
    return any(name.startswith("lora_") for name in names) and not ours


def _misfit(module: nn.Module, host: type[nn.Module], kind: type[SwappedLayer] | None, impl: str | None) -> str | None:
    """Why the module cannot be swapped: one sentence, or None."""
    if kind is None:
        return f"{host.__name__} is no adapter layer that this package knows, or overrides its forward"
    patched = vars(module).get("forward")
    # The official code leaves the layer's own bound forward behind on the instance; that one may go.
    if patched is not None and getattr(patched, "__func__", None) not in (host.forward, type(module).forward):
        return "its forward was replaced on the instance, swap before that"
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and child is not module:
            if child.bias is not None or type(child).forward is not nn.Linear.forward:
                return f"{name} is {child}, it must be a plain nn.Linear without bias"
            if child._forward_hooks or child._forward_pre_hooks:
                return f"{name} has forward hooks, which would no longer run"
    try:
        operands = kind.operands(module)
        a = operands["lora_a"]
        if "router" not in operands:
            operands["route_weights"] = a.new_empty(0, 1, len(operands["lora_b"]))
        if not a.is_meta:
            with torch.no_grad():
                mk.routed_lora(a.new_empty(0, a.shape[1]), **operands, impl=impl)  # no token: the argument rules alone
    except (AttributeError, KeyError) as error:
        return f"{host.__name__} is incomplete: {error}"
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _description(module: SwappedLayer) -> str:
    operands = module.operands(module)
    b = operands["lora_b"]
    return (
        f"{module.host.__name__}, {len(b)} experts of rank {operands['lora_a'].shape[0]}, "
        f"{operands.get('num_groups', 1)} groups{module.note(module)}"
    )
