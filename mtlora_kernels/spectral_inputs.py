"""What the spectral functions accept, brought into the shapes of their operators."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .requirements import require_alike, require_int, require_sequence, require_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 64  # of the matrices whose eigenvalues are computed: rank + oversampling, and the rank of an adapter
MAX_SHORT_SIDE = 256
KINDS = ("pairwise", "gram")

Layers = Tensor | Sequence[Tensor | Sequence[Tensor]] | nn.Module


def stacked_matrices(matrices: Tensor | Sequence[Tensor]) -> Tensor:
    """matrices as one tensor [batch, m, n]; a sequence of matrices of one shape is stacked."""
    if isinstance(matrices, Tensor):
        require_tensor("matrices", matrices, dim=3, dtypes=DTYPES)
    else:
        require_sequence("matrices", matrices, "one matrix [m, n] at least")
        require_alike("matrices", matrices, DTYPES)
        matrices = torch.stack(list(matrices))
    if min(matrices.shape[1:]) < 1:
        raise ValueError(f"matrices has shape {tuple(matrices.shape)}, m and n must be positive")
    return matrices


def sketch_size(matrices: Tensor, rank: int, oversampling: int, power_iterations: int, seed: int) -> int:
    """l = min(rank + oversampling, m, n), the width of the sketch; raises for what does not fit."""
    short = min(matrices.shape[1:])
    if short > MAX_SHORT_SIDE:
        raise ValueError(
            f"matrices has shape {tuple(matrices.shape)}, the shorter of m and n must be at most {MAX_SHORT_SIDE}"
        )
    require_int("rank", rank, 1, short, " = [1, min(m, n)]")
    require_int("oversampling", oversampling, 0, 2**31)
    require_int("power_iterations", power_iterations, 0, 64)
    require_int("seed", seed, 0, 2**63 - 1)
    sketch = min(rank + oversampling, short)
    if sketch > MAX_WIDTH:
        raise ValueError(f"min(rank + oversampling, m, n) is {sketch}, it must be at most {MAX_WIDTH}")
    return sketch


def _is_lora_b(name: str) -> bool:
    return name == "lora_B" or (name[:6] == "lora_B" and name[6:].isdigit())


def _find_experts(owner: nn.Module, found: dict[int, tuple[nn.Module, str, Tensor]], seen: set[nn.Module]) -> None:
    """Adds (owner of lora_B, name in it, parameter) by id, in order of `named_parameters`. That spells every name of
    the model, which takes longer. Nothing is kept between calls, so that every change is seen."""
    seen.add(owner)
    for name, parameter in owner._parameters.items():
        if name[:6] == "lora_B" and _is_lora_b(name) and parameter is not None:
            found.setdefault(id(parameter), (owner, name, parameter))
    for name, module in owner._modules.items():
        if module is None or module in seen:
            continue
        if name[:6] == "lora_B" and _is_lora_b(name):
            for below, parameter in module.named_parameters(prefix=name):
                found.setdefault(id(parameter), (owner, below, parameter))
        else:
            _find_experts(module, found, seen)


def adapter_layers(model: nn.Module) -> list[Tensor | list[Tensor]]:
    """The experts of every adapter in model, found by the published names of their parameters: `lora_B` [N, d, r],
    alone or with an adapter's name behind it, or one [d, r] per expert, `lora_B.{i}.weight` or `lora_B{i}.weight`."""
    named: dict[int, tuple[nn.Module, str, Tensor]] = {}
    _find_experts(model, named, set())
    found: dict[tuple, list[tuple[int, Tensor]]] = {}
    for owner, name, parameter in named.values():
        first, *parts = name.split(".")
        numbers = [first.removeprefix("lora_B"), *parts]
        expert = next((int(number) for number in numbers if number.isdigit()), 0)
        adapter = [part for part in parts if not part.isdigit() and part != "weight"]
        found.setdefault((owner, *adapter), []).append((expert, parameter))
    if not found:
        raise ValueError(f"lora_b is a {type(model).__name__} without parameters named lora_B, it must have adapters")
    layers = [[b for _, b in sorted(experts, key=lambda e: e[0])] for experts in found.values()]
    return [experts[0] if experts[0].dim() == 3 else experts for experts in layers]


def _experts(name: str, layer: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One layer as a list of tensors, [N, d, r] or N times [d, r], that `torch.stack` or a view makes [N, d, r]."""
    if isinstance(layer, Tensor):
        require_tensor(name, layer, dim=3, dtypes=DTYPES)
        return [layer]
    require_sequence(name, layer, "one tensor [d, r] per expert")
    require_alike(name, layer, DTYPES)
    return list(layer)


def layer_stacks(lora_b: Layers) -> list[Tensor]:
    """lora_b as tensors [L, N, d, r], one per shape, dtype and device that occurs, in order of first occurrence."""
    if isinstance(lora_b, nn.Module):
        lora_b = adapter_layers(lora_b)
    if isinstance(lora_b, Tensor):
        require_tensor("lora_b", lora_b, dim=4 if lora_b.dim() > 4 else None, min_dim=3, dtypes=DTYPES)
        stacks = [lora_b if lora_b.dim() == 4 else lora_b[None]]
    else:
        require_sequence("lora_b", lora_b, "one layer at least")
        if all(isinstance(b, Tensor) and b.dim() == 2 for b in lora_b):
            lora_b = [lora_b]
        groups: dict[tuple, list[Tensor]] = {}
        for i, layer in enumerate(lora_b):
            experts = _experts(f"lora_b[{i}]", layer)
            first, count = experts[0], len(experts) if experts[0].dim() == 2 else len(experts[0])
            groups.setdefault((count, *first.shape[-2:], first.dtype, first.device), []).extend(experts)
        stacks = []
        for (count, d, rank, *_), tensors in groups.items():
            mixed = len({t.dim() for t in tensors}) > 1
            tensors = [e for t in tensors for e in (t if t.dim() == 3 else t[None])] if mixed else tensors
            stacks.append(
                torch.stack(tensors).view(-1, count, d, rank)
                if len(tensors) > 1
                else tensors[0].view(1, count, d, rank)
            )
    for stack in stacks:
        _, _, d, rank = stack.shape
        if min(stack.shape) < 1:
            raise ValueError(f"lora_b has a layer stack of shape {tuple(stack.shape)}, every size must be positive")
        if rank > min(d, MAX_WIDTH):
            raise ValueError(f"lora_b has rank {rank} and d = {d}, the rank must be at most d and at most {MAX_WIDTH}")
    return stacks
