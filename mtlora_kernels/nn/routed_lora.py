"""mtLoRA's adapters (arXiv 2603.01526) as modules."""

from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn import functional as F

from ..beside import mark_input
from .parameters import RoutedParameters


class RoutedLoRA(RoutedParameters):
    """Block-level adapter: residual + sum over i of pi_i * scale_i * B_i act(A x), by `routed_lora`.

    One class for three published ones, with their initial values except the expert scales':

    ============  ============================  ==========  =============  ========================  =========
    style         published class               activation  scale_i        A                         B
    ============  ============================  ==========  =============  ========================  =========
    lowrank       LowRankBlockAdapter           none        alpha / rank   kaiming uniform, a=5**.5  0
    bottleneck    BottleneckBlockAdapter        ReLU        alpha / rank   kaiming uniform, ReLU     N(0, .02)
    adaptformer   MoEAdaptFormerBlockAdapter    ReLU        learnable s_i  kaiming uniform, ReLU     0
    ============  ============================  ==========  =============  ========================  =========

    State-dict names are the published ones: ``lora_A.weight`` [rank, features], ``lora_B.{i}.weight`` [out,
    rank], ``lora_route.weight`` [num_groups * N, features] (none for one expert) and, for adaptformer,
    ``expert_scales.{i}`` [1]. `parameters()` has the experts stacked, ``lora_B`` [N, out, rank].

    Args:
        features: width of x, and of the output unless `out_features` is given.
        rank, num_experts: r and N, each 1 to 128. With one expert there is no router.
        alpha: alpha / rank is the factor of the mixture, except for adaptformer.
        num_groups, group_size: routing groups by their number (default 1) or by their size; give one of them.
        scale_init: first s_i. The published default 0 times the zero B leaves every gradient at exactly 0, so
            it never trains; 0.1 is the factor of AdaptFormer itself.
        dropout: probability, before A and in training only; the router sees undropped x.
        numerics, compute_dtype, impl: as in `mtlora_kernels.routed_lora`.
        balance_coef: in training, backward acts as if balance_coef * balance_loss(load) were part of the
            loss, whose value does not show it. The published trainers take 0.01 / number of adapters.
        track_load: keep `last_load` up to date also without a balance term.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: a setting that no adapter can have; the message names it.

    `last_load` [N] holds the mean routing weights of the last call that computed them, detached, for logging.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., features], residual [..., out_features] or None; returns [..., out_features]."""
        return self._mix(x, residual)

    def _mix(self, x: Tensor, residual: Tensor | None, accumulate: bool = False) -> Tensor:
        parameters = self.lora_A, self.lora_B, self.lora_route, self.expert_scales
        return self.mix(x, residual, *parameters, accumulate=accumulate)


class RoutedLoRALinear(RoutedLoRA):
    """Component-level layer (published class LoraLinear): a frozen linear layer plus its routed mixture.

    Takes over weight and bias of `base`, frozen; options as in `RoutedLoRA`, device by default that of base.
    With numerics="eager" the expert sum starts at the linear layer's output, as published. State-dict names:
    ``weight``, ``bias``, ``lora_A.weight``, ``lora_B{i}.weight``, ``lora_route.weight``.
    """

    expert_name = "lora_B{}.weight"

    def __init__(self, base: nn.Linear, rank: int, num_experts: int, **options: Any) -> None:
        if not isinstance(base, nn.Linear) or type(base).forward is not nn.Linear.forward:
            raise TypeError(
                f"base is {type(base).__name__}, it must be a plain nn.Linear; next to any other layer use "
                "RoutedLoRA(d_in, rank, num_experts, out_features=d_out)(x, residual=layer(x))"
            )
        options.setdefault("device", base.weight.device)
        super().__init__(base.in_features, rank, num_experts, out_features=base.out_features, **options)
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        x = mark_input(x, self)
        base = F.linear(x, self.weight, self.bias)
        return self._mix(x, base, accumulate=True)

    def merge(self) -> NoReturn:
        raise NotImplementedError(
            "a routed mixture cannot be merged: its weights depend on the token, so no one matrix equals it. "
            "Keep the module for inference (eval() and torch.inference_mode()) and save its state_dict()"
        )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.lora_route is None:  # the published layer has a router even for one expert; its softmax is 1
            state_dict.pop(prefix + "lora_route.weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
