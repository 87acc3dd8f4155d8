"""The shapes that are timed, and random inputs for them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Shape:
    """One adapter call: T tokens, width d in and out, rank r, N experts, G routing groups."""

    tokens: int
    d: int
    rank: int
    experts: int
    groups: int
    dtype: torch.dtype = torch.bfloat16
    backward: bool = True

    @property
    def name(self) -> str:
        sizes = f"T{self.tokens}-d{self.d}-r{self.rank}-N{self.experts}-G{self.groups}"
        return f"{sizes}-{DTYPE_NAMES[self.dtype]}"


# mtLoRA's LLaMA-2-7B run is T = 16 x 512, d = 4096, r = 16, N = 16, G = 2, ablated over G = 1..32; its vision
# runs have d = 768 and up to 25 experts, with G up to d. The last row is one forward of a long batch.
CUDA_SHAPES = (
    Shape(8192, 4096, 16, 16, 1),
    Shape(8192, 4096, 16, 16, 2),
    Shape(8192, 4096, 16, 16, 32),
    Shape(16384, 768, 16, 25, 32),
    Shape(16384, 768, 16, 25, 768, backward=False),
    Shape(131072, 4096, 16, 16, 2, backward=False),
)
CUDA_QUICK_SHAPES = CUDA_SHAPES[1:2]
CPU_SHAPES = tuple(
    Shape(tokens, 4096, 16, 16, 2, dtype) for tokens in (1024, 1) for dtype in (torch.float32, torch.bfloat16)
)
CPU_QUICK_SHAPES = tuple(Shape(tokens, 512, 16, 16, 2, torch.float32) for tokens in (256, 1))
SMALL_BATCH_TOKENS = (1, 16, 64, 512)


def shape_table(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    if device.type == "cuda":
        return CUDA_QUICK_SHAPES if quick else CUDA_SHAPES
    return CPU_QUICK_SHAPES if quick else CPU_SHAPES


def small_batch_table(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    width, dtype = (512, torch.float32) if quick and device.type == "cpu" else (4096, torch.bfloat16)
    return tuple(Shape(tokens, width, 16, 16, 2, dtype) for tokens in SMALL_BATCH_TOKENS)


@dataclass(frozen=True)
class Inputs:
    """Leaves of one call. `experts` repeats lora_b as N leaves, which is how published layers hold it."""

    x: Tensor
    lora_a: Tensor
    lora_b: Tensor
    router: Tensor
    residual: Tensor
    grad_out: Tensor
    experts: tuple[Tensor, ...]
    groups: int
    scaling: float = 2.0  # alpha / r = 32 / 16, as published

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.lora_a, self.lora_b, self.router, self.residual

    @property
    def leaves_by_expert(self) -> tuple[Tensor, ...]:
        return self.x, self.lora_a, *self.experts, self.router, self.residual

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same values as other leaves."""

        def moved(value: Tensor) -> Tensor:
            return value.detach().to(dtype).requires_grad_(value.requires_grad)

        names = ("x", "lora_a", "lora_b", "router", "residual", "grad_out")
        values = {name: moved(getattr(self, name)) for name in names}
        return replace(self, **values, experts=tuple(moved(b) for b in self.experts))


def make_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Gaussian inputs scaled so that h, logits and the mixture are of order 1; zeros would run faster."""
    generator = torch.Generator(device).manual_seed(seed)

    def gaussian(*size: int, fan_in: int = 1) -> Tensor:
        value = torch.randn(*size, generator=generator, device=device, dtype=shape.dtype)
        return value.mul_(fan_in**-0.5)

    t, d, r, n, g = shape.tokens, shape.d, shape.rank, shape.experts, shape.groups
    lora_b = gaussian(n, d, r, fan_in=r)
    inputs = Inputs(
        x=gaussian(t, d),
        lora_a=gaussian(r, d, fan_in=d),
        lora_b=lora_b,
        router=gaussian(g * n, d, fan_in=d),
        residual=gaussian(t, d),
        grad_out=gaussian(t, d),
        experts=tuple(b.clone() for b in lora_b),
        groups=g,
    )
    for leaf in (*inputs.leaves, *inputs.experts):
        leaf.requires_grad_(shape.backward)
    return inputs
