"""What a user sets, saved as adapter_config.json."""

from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from peft.utils import PeftType

NAME = "MTLORA"


@dataclass
class MtLoraConfig(PeftConfig):
    """Configuration of mtLoRA adapters (arXiv 2603.01526), with the published LLaMA-2-7B run as defaults.

    Args:
        target_modules: names of the modules to adapt, by their ends, or one regular expression of whole names.
            A linear layer gets a component-level adapter, d_in to d_out; any other module is a block, of width
            `features` in and out: ``["mlp"]``, ``["self_attn", "mlp"]``, ``["q_proj", "v_proj"]``, "all-linear".
        r, lora_alpha, lora_dropout: rank, and scaling lora_alpha / r; the dropout is before A only.
        num_experts: N.
        num_groups, group_size: routing groups by number (default 1) or by size; give one of them.
        style: "lowrank", "bottleneck" or "adaptformer", see `mtlora_kernels.nn.RoutedLoRA`.
        scale_init: first value of the learnable scales of "adaptformer".
        numerics, compute_dtype: as in `mtlora_kernels.routed_lora`; compute_dtype by name, such as "bfloat16".
            None computes in x's dtype (autocast's under autocast), also where PEFT keeps the adapter in fp32.
        balance_coef: in training, each layer acts as if balance_coef * balance_loss(load) were in the loss.
        features: width of the targeted blocks; None takes hidden_size of the model's config.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern, bias: as in PEFT's LoraConfig.

    Raises:
        ValueError: a setting that no layer can have.
    """

    target_modules: list[str] | str | None = None
    r: int = 16
    lora_alpha: float = 64.0
    lora_dropout: float = 0.0
    num_experts: int = 16
    num_groups: int | None = None
    group_size: int | None = None
    style: str = "lowrank"
    scale_init: float = 0.1
    numerics: str = "fp32"
    compute_dtype: str | None = None
    balance_coef: float = 0.0
    features: int | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = field(default="none", metadata={"help": '"none" or "all"'})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform is given with a pattern as target_modules, give a list of names")
        if self.bias not in ("none", "all"):
            raise ValueError(f"bias is {self.bias!r}, it must be 'none' or 'all'")
        if not isinstance(getattr(torch, self.compute_dtype or "float32", None), torch.dtype):
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}, it must name a torch dtype or be None")

    def mixture_options(self) -> dict:
        """The settings as keywords of `mtlora_kernels.nn.RoutedMixture`."""
        names = "num_experts", "num_groups", "group_size", "style", "scale_init", "numerics", "balance_coef"
        options = {name: getattr(self, name) for name in names}
        options |= {"rank": self.r, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
        return options | {"compute_dtype": self.compute_dtype and getattr(torch, self.compute_dtype)}
