"""The adapters of one module: a child that its forward hook calls with the module's input and output."""

from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import mtlora_kernels as mk

from .config import MtLoraConfig

CANNOT_MERGE = (
    "an mtLoRA adapter cannot be merged: its weights depend on the token, so no one matrix equals it. Keep the "
    "adapter for inference (model.eval(), torch.inference_mode()), save it with save_pretrained() and load it on "
    "the base model; unload() gives the base model back"
)


class MtLoraLayer(nn.Module, BaseTunerLayer):
    """Adapters by name, each one stacked parameter set of `mtlora_kernels.nn.RoutedMixture`.

    It is a child of the adapted module, not a wrapper around it: a wrapper is silently lost when another library
    patches the module's forward, and renames the parameters inside. Experts are stacked, ``lora_B[name]`` [N, d_out,
    r], because PEFT finds an adapter's name in a key only as its last or last but one part.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_route", "lora_scales")
    other_param_names = ("lora_mixtures",)  # "lora_": PEFT up to 0.18 looks below other names when it deletes

    def __init__(self, in_features: int, out_features: int, component: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.component = in_features, out_features, component
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.lora_mixtures = nn.ModuleDict()
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._device: torch.device | None = None

    def update_layer(
        self, adapter_name: str, config: MtLoraConfig, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        """Add the adapter adapter_name, with the published initial values, on the device of the adapted module."""
        self._device = device
        mixture = mk.nn.RoutedMixture(
            self.in_features, out_features=self.out_features, device=device, **config.mixture_options()
        )
        parameters = mixture.new_parameters(device)
        for name, parameter in zip(self.adapter_layer_names, parameters.values(), strict=True):
            if parameter is not None:  # drawn in fp32 and rounded, so that the values do not depend on dtype
                getattr(self, name)[adapter_name] = nn.Parameter(parameter.detach().to(dtype))
        self.lora_mixtures[adapter_name] = mixture.train(self.training)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual plus every active adapter's mixture of x, in their order."""
        if self.disable_adapters:
            return residual
        for name in self.active_adapters:
            if name in self.lora_mixtures:
                parameters = self.parameters_of(name)
                residual = self.lora_mixtures[name].mix(x, residual, *parameters, accumulate=self.component)
        return residual

    def parameters_of(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A, B, router and scales of one adapter; None for what it has not."""
        dicts = [getattr(self, name) for name in self.adapter_layer_names]
        return tuple(d.get(adapter_name) for d in dicts)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls it after it has loaded values onto a device of its own choice (low_cpu_mem_usage).
        for parameter in self.parameters_of(adapter_name):
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(device or self._device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise NotImplementedError(CANNOT_MERGE)

    def _no_base(self) -> Any:
        # The base class looks for them in a wrapped layer, which would be this one, without end.
        raise AttributeError(f"{type(self).__name__} has no weight or bias of its own")

    weight = property(_no_base)
    bias = property(_no_base)
