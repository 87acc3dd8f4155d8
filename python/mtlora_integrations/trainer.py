"""The spectral and balance terms of mtLoRA (arXiv 2603.01526) for transformers.Trainer, with their logging."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

import mtlora_kernels as mk


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable stacked experts, ``lora_B`` [N, d_out, r] each, of a model with adapters, wrapped or not."""
    named = model.named_parameters()
    return [p for name, p in named if "lora_B" in name.split(".") and p.dim() == 3 and p.requires_grad]


def add_spectral_gradient(model: nn.Module, coef: float, **options: Any) -> Tensor:
    """Add the gradient of coef * `mtlora_kernels.spectral_penalty` to the experts' .grad; returns the penalty.

    Call it once per optimizer step, after the last backward. The penalty depends on parameters alone, so it needs
    no part in the forward: not once per micro-batch, not again under checkpointing, and not inside a wrapper that
    averages gradients, as every process computes the same one. Experts that `fully_shard` has split are gathered
    first, and each process keeps its part of the gradient.

    Args:
        coef: factor of the penalty; with a gradient scaler, times its scale.
        options: kind, weights and impl of `mtlora_kernels.spectral_penalty`.

    Returns:
        The penalty without coef, a detached fp32 scalar on the device.

    Raises:
        ValueError: the model has no trainable stacked experts.
    """
    parameters = expert_parameters(model)
    if not parameters:
        raise ValueError(f"model is a {type(model).__name__} without trainable lora_B [N, d_out, r], it must have some")
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    penalty = mk.spectral_penalty(whole, **options)
    for p, gradient in zip(parameters, torch.autograd.grad(coef * penalty, parameters), strict=True):
        p.grad = gradient if p.grad is None else p.grad.add_(gradient)
    return penalty.detach()


def _active_mixtures(model: nn.Module) -> list[mk.nn.RoutedMixture]:
    """The adapters of model, without those of PEFT that are switched off."""
    off = {
        mixture
        for layer in model.modules()
        for name, mixture in getattr(layer, "lora_mixtures", {}).items()
        if name not in layer.active_adapters
    }
    return [m for m in model.modules() if isinstance(m, mk.nn.RoutedMixture) and m not in off]


class MtLoraTrainerMixin:
    """Adds mtLoRA's two terms to a Trainer: ``class MyTrainer(MtLoraTrainerMixin, Trainer)``.

    Args:
        spectral_coef: factor of the spectral penalty, 0 for none. Its gradient is added once per optimizer step,
            before clipping. The published runs take 0.25 to 1.
        spectral_kind: "pairwise" (the paper) or "gram" (the published code).
        spectral_refresh: optimizer steps between two decompositions of the experts; in between their weights in the
            penalty stay. The paper refreshes once per epoch. A resumed run starts with a decomposition.
        balance_coef: factor of the mean balance loss over adapters; None keeps the adapters' own coefficients. The
            published trainers take 0.01.

    The logged loss is the Trainer's own, without either term. With it are logged, of this process:
    ``spectral_penalty`` (last optimizer step); and of the last batch, averaged over adapters: ``balance_loss``,
    ``routing_entropy`` (of the load, 1 for equal load) and ``load/expert_{i}``.

    Raises:
        ValueError: spectral_kind is unknown, the model has no routed adapters, or DeepSpeed is to add the spectral
            term: its gradients are not in .grad.
    """

    def __init__(
        self,
        *args: Any,
        spectral_coef: float = 0.0,
        spectral_kind: str = "pairwise",
        spectral_refresh: int = 1,
        balance_coef: float | None = None,
        **kwargs: Any,
    ) -> None:
        if spectral_kind not in ("pairwise", "gram"):
            raise ValueError(f"spectral_kind is {spectral_kind!r}, it must be 'pairwise' or 'gram'")
        super().__init__(*args, **kwargs)
        self._mixtures = _active_mixtures(self.model)
        if not self._mixtures:
            raise ValueError(f"model is a {type(self.model).__name__} without routed adapters, it must have some")
        if spectral_coef and self.is_deepspeed_enabled:
            raise ValueError(f"spectral_coef is {spectral_coef}, it must be 0 with DeepSpeed; use DDP or FSDP2")
        for mixture in self._mixtures:
            mixture.track_load = True
            if balance_coef is not None:
                mixture.balance_coef = balance_coef / len(self._mixtures)
        self.spectral_coef, self._penalty = spectral_coef, None
        self._spectral_options = {"kind": spectral_kind, "weights": mk.SpectralWeights(refresh_every=spectral_refresh)}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        mk.nn.set_balance_scale(model, scale / self.current_gradient_accumulation_steps)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.spectral_coef and self.accelerator.sync_gradients:
            self._penalty = add_spectral_gradient(model, self.spectral_coef * scale, **self._spectral_options)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # of training; evaluations log eval_loss
            logs |= routing_statistics([mixture.last_load for mixture in self._mixtures])
            if self._penalty is not None:
                logs["spectral_penalty"] = self._penalty.item()
        super().log(logs, *args, **kwargs)


def routing_statistics(loads: list[Tensor]) -> dict[str, float]:
    """Means over adapters of what their loads [N] say, by the names that `MtLoraTrainerMixin` logs."""
    loads = [load.float() for load in loads]
    entropy = [torch.special.entr(load).sum() / math.log(max(2, len(load))) for load in loads]
    balance = [mk.balance_loss(load) for load in loads]
    per_expert = nn.utils.rnn.pad_sequence(loads, batch_first=True, padding_value=math.nan).nanmean(0)
    values = torch.stack([torch.stack(balance).mean(), torch.stack(entropy).mean(), *per_expert])
    names = "balance_loss", "routing_entropy", *(f"load/expert_{i}" for i in range(len(per_expert)))
    return dict(zip(names, values.tolist(), strict=True))


class MtLoraTrainer(MtLoraTrainerMixin, Trainer):
    """transformers.Trainer with mtLoRA's terms; arguments as in `MtLoraTrainerMixin` and Trainer."""
