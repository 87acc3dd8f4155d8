"""The arguments of a `routed_lora` call as one object, seeded random ones, and memory layouts."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

DROPOUT_SEED = 0x1234_5678_9ABC  # both 32-bit words of the Philox key are in use
LAYOUTS = ("contiguous", "padded", "sliced", "offset", "transposed", "expanded")


@dataclass
class Inputs:
    """Arguments of one call, `mk.routed_lora(**inputs.kwargs())`, and the upstream gradients."""

    x: Tensor
    lora_a: Tensor
    lora_b: Tensor
    router: Tensor | None
    residual: Tensor | None
    expert_scale: Tensor | None
    route_weights: Tensor | None
    dout: Tensor
    dload: Tensor | None
    options: dict = field(default_factory=dict)  # the arguments that are not tensors

    def tensors(self) -> dict[str, Tensor]:
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        return {name: t for name, t in named.items() if t is not None}

    def arguments(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors().items() if name not in ("dout", "dload")}

    def kwargs(self) -> dict:
        return self.arguments() | self.options

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        return replace(self, **{name: function(t) for name, t in self.tensors().items()})

    def with_options(self, **options) -> "Inputs":
        return replace(self, options=self.options | options)


class Draw:
    """Seeded fp32 tensors on one device."""

    def __init__(self, seed: int, device: torch.device | str):
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def indices(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high]."""
        return (low + self.indices(high - low + 1, *shape)).float()

    def signs(self, *shape: int) -> Tensor:
        return self.integers(0, 1, *shape) * 2 - 1


def assemble(
    values: dict[str, Tensor],
    num_groups: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    residual: bool = True,
    router: bool = True,
    expert_scale: bool = False,
    route_weights: bool = False,
    load: bool = False,
    **options,
) -> Inputs:
    """Keep the values asked for, cast each to its dtype; options go to `routed_lora`."""
    absent = {
        "residual": not residual,
        "router": route_weights or not router,
        "expert_scale": not expert_scale,
        "route_weights": not route_weights,
        "dload": not load,
    }
    values = {name: None if absent.get(name) else t for name, t in values.items()}
    E = options.get("compute_dtype") or dtype
    dtypes = dict.fromkeys(values, dtype)
    dtypes |= dict.fromkeys(("lora_a", "lora_b", "router", "expert_scale"), weight_dtype or dtype)
    dtypes |= {"residual": residual_dtype or dtype, "dload": torch.promote_types(E, torch.float32)}
    dtypes["dout"] = torch.promote_types(dtypes["residual"], E) if residual else E
    if options.get("dropout_p", 0.0) > 0:
        options = {"dropout_seed": DROPOUT_SEED} | options
    options |= {"num_groups": num_groups, "return_load": load}
    return Inputs(**{k: None if t is None else t.to(dtypes[k]) for k, t in values.items()}, options=options)


def random_inputs(
    T: int, d_in: int, d_out: int, r: int, N: int, G: int, *, device="cpu", seed: int = 0, **settings
) -> Inputs:
    """Gaussian inputs with outputs of order 1; settings are those of `assemble`."""
    draw = Draw(seed, device)
    values = {
        "x": draw.normal(T, d_in),
        "lora_a": draw.normal(r, d_in) / d_in**0.5,
        "lora_b": draw.normal(N, d_out, r) / r**0.5,
        "router": draw.normal(G * N, d_in) / d_in**0.5,
        "residual": draw.normal(T, d_out),
        "expert_scale": 1 + draw.normal(N) / 4,
        "route_weights": draw.normal(T, G, N).softmax(-1),
        "dout": draw.normal(T, d_out),
        "dload": draw.normal(N),
    }
    return assemble(values, G, **{"scaling": 1.7} | settings)


def with_layout(t: Tensor, layout: str) -> Tensor:
    """t in another memory layout: contiguous, padded (row stride), sliced (inner stride 2), transposed,
    offset (unaligned start) or, with the values of row 0 in every row, expanded (stride 0)."""
    if layout == "expanded":
        return t[:1].expand_as(t)
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    step, extra, start = {
        "contiguous": (1, 0, 0),
        "padded": (1, 3, 0),
        "sliced": (2, 1, 1),
        "offset": (1, 1, 1),
    }[layout]
    buffer = t.new_empty(*t.shape[:-1], t.shape[-1] * step + extra)
    return buffer[..., start : start + t.shape[-1] * step : step].copy_(t)
