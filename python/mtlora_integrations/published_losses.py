"""Drop-in replacements for two functions of the official trainer: its balance loss and its spectral penalty.

    utils.hydralora_trainer.collect_balance_loss = published_losses.collect_balance_loss
    HydraLoRATrainer.compute_spectral_regularization = published_losses.compute_spectral_regularization

Both take models with and without swapped layers. What they return goes into the loss, before its backward. Under
reentrant checkpointing a layer's forward leaves no graph and its parameters may not be reached a second way (data
parallelism then fails): the gradient of both terms waits at the layer, which adds it when backward reruns it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mtlora_kernels as mk

from .experts import stacked
from .layer import SwappedLayer


def collect_balance_loss(model: nn.Module) -> Tensor | None:
    """Mean over the adapter layers of the balance loss of their last forward (attribute `last_blc`), which is
    taken away from them; None if there is none. Scaling the loss scales its gradient, whichever way it takes."""
    terms = []
    for layer in model.modules():
        term = getattr(layer, "last_blc", None)
        if term is not None:
            layer.last_blc = None
            terms.append(_waiting(term, layer, "balance_grad") if _reruns(layer) else term)
    if not terms:
        return None
    device = next(model.parameters()).device
    return torch.stack([term.to(device, torch.float32) for term in terms]).mean()


def compute_spectral_regularization(trainer: Any, model: nn.Module, kind: str = "gram") -> Tensor:
    """The spectral penalty of all expert matrices, `mk.spectral_penalty`, as a method of the trainer.

    With kind="gram" it is the published penalty, over every matrix: the published one samples 64 if there are
    more, and waits for the GPU at each. "pairwise" is the paper's equation 2. 0 if the model has no experts.
    """
    layers = []
    for layer, experts in _experts(model):
        b = stacked(experts)
        layers.append(_waiting(b, layer, "experts_grad") if _reruns(layer) else b)
    trainer._last_svd_step = trainer.state.global_step
    if trainer.state.epoch is not None:
        trainer._last_svd_epoch = int(trainer.state.epoch)
    if not layers:
        return torch.zeros((), device=next(model.parameters()).device)
    return mk.spectral_penalty(layers, kind=kind)


def _experts(model: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """The layers that the official trainer looks at: component layers and block adapters, swapped or not."""
    for layer in model.modules():
        if hasattr(layer, "lora_num") and hasattr(layer, "lora_A"):
            yield layer, [getattr(layer, f"lora_B{i}").weight for i in range(layer.lora_num)]
        elif isinstance(getattr(layer, "lora_B", None), nn.ModuleList):
            yield layer, [expert.weight for expert in layer.lora_B]


def _reruns(layer: nn.Module) -> bool:
    return isinstance(layer, SwappedLayer) and layer.reruns and torch.is_grad_enabled()


def _waiting(value: Tensor, layer: SwappedLayer, name: str) -> Tensor:
    """value, cut from its graph; its gradient goes to the layer's attribute. Autograd runs what was made last
    first, so it is there when backward reaches the layer."""
    leaf = value.detach().requires_grad_()
    leaf.register_hook(lambda grad: setattr(layer, name, grad))
    return leaf
