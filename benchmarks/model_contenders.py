"""The adapters that a whole model is timed with: published-style layers, hand-written PyTorch, this package.

Every contender holds the same values, so that losses can be compared. Each is put on a model by a function of
(model, layout) that returns what is to be called, and is taken off by the function that comes back with it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlora_kernels as mk

from . import rivals
from .shapes import Inputs

B_STD = 1e-3  # of the experts; zeros, the first values, would run faster than trained ones


@dataclass(frozen=True)
class Layout:
    """Where the adapters go and their sizes. targets are the ends of module names."""

    name: str
    targets: tuple[str, ...]
    rank: int
    experts: int
    groups: int
    alpha: float

    @property
    def component(self) -> bool:
        return self.targets[0].endswith("_proj")

    def modules(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(name, m) for name, m in model.named_modules() if name.rpartition(".")[2] in self.targets]


Attached = tuple[nn.Module, Callable[[], object]]  # the module to call, and how to take the adapters off


@dataclass(frozen=True)
class ModelContender:
    name: str
    attach: Callable[[nn.Module, Layout], Attached]
    ours: bool = False


def fill(adapters: Iterator[nn.Module] | list[nn.Module]) -> None:
    """Seeded values, the same for every contender: in order of layers A, B, router, experts one by one."""
    for seed, adapter in enumerate(adapters):
        named = dict(adapter.named_parameters())
        device = next(iter(named.values())).device
        generator = torch.Generator(device).manual_seed(seed)

        def normal(target: Tensor, std: float, generator: torch.Generator = generator) -> None:
            with torch.no_grad():  # drawn in bf16: one stream of values, whatever dtype the contender keeps
                value = torch.empty(target.shape, dtype=torch.bfloat16, device=target.device)
                target.copy_(value.normal_(std=std, generator=generator))

        def pick(kind: str, named: dict[str, nn.Parameter] = named) -> list[nn.Parameter]:
            return [p for name, p in named.items() if name.startswith(kind)]

        normal(pick("lora_A")[0], named_fan_in(pick("lora_A")[0]))
        experts = pick("lora_B")
        for expert in experts[0] if experts[0].dim() == 3 else experts:
            normal(expert, B_STD)
        normal(pick("lora_route")[0], named_fan_in(pick("lora_route")[0]))


def named_fan_in(weight: Tensor) -> float:
    return weight.shape[-1] ** -0.5


class PublishedBlock(nn.Module):
    """A block adapter as the published code computes it: one expert after another, each a [T, d] tensor."""

    def __init__(self, width: int, layout: Layout, like: Tensor) -> None:
        super().__init__()
        options = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.dim, self.rank, self.num_experts = width, layout.rank, layout.experts
        self.num_groups, self.scaling = layout.groups, layout.alpha / layout.rank
        self.lora_A = nn.Linear(width, layout.rank, **options)
        self.lora_B = nn.ModuleList(nn.Linear(layout.rank, width, **options) for _ in range(layout.experts))
        self.lora_route = nn.Linear(width, layout.groups * layout.experts, **options)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lora_A(x)
        logits = self.lora_route(x).unflatten(-1, (self.num_groups, self.num_experts))
        weights = logits.softmax(-1, dtype=torch.float32).to(x.dtype)
        mixture = torch.zeros_like(x)
        for i, expert in enumerate(self.lora_B):
            spread = weights[..., i].repeat_interleave(self.dim // self.num_groups, -1)
            mixture = mixture + spread * expert(h) * self.scaling
        return mixture


class PublishedLinear(nn.Linear):
    """A linear layer as HydraLoRA computes it: A runs once per expert, one weight per token and expert."""

    def __init__(self, base: nn.Linear, layout: Layout) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        options = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_num, self.r, self.scaling = layout.experts, layout.rank, layout.alpha / layout.rank
        self.lora_A = nn.Linear(base.in_features, layout.rank, **options)
        for i in range(layout.experts):
            setattr(self, f"lora_B{i}", nn.Linear(layout.rank, base.out_features, **options))
        self.lora_route = nn.Linear(base.in_features, layout.experts, **options)

    def forward(self, x: Tensor) -> Tensor:
        result = F.linear(x, self.weight, self.bias)
        weights = self.lora_route(x).softmax(-1, dtype=torch.float32).to(result.dtype)
        for i in range(self.lora_num):
            result = result + weights[..., i, None] * getattr(self, f"lora_B{i}")(self.lora_A(x)) * self.scaling
        return result


class HandWritten(nn.Module):
    """The best form without a kernel (`rivals.group_product`), as a child that a hook calls."""

    def __init__(self, d_in: int, d_out: int, layout: Layout, like: Tensor) -> None:
        super().__init__()
        n, r, self.layout = layout.experts, layout.rank, layout
        self.lora_A, self.lora_B, self.lora_route = (
            nn.Parameter(torch.empty(shape, device=like.device, dtype=like.dtype))
            for shape in ((r, d_in), (n, d_out, r), (layout.groups * n, d_in))
        )

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        inputs = Inputs(
            x.flatten(0, -2),
            self.lora_A,
            self.lora_B,
            self.lora_route,
            residual.flatten(0, -2),
            residual,  # no upstream gradient here: autograd brings it
            (),
            self.layout.groups,
            self.layout.alpha / self.layout.rank,
        )
        return rivals.group_product(inputs).view_as(residual)


def _widths(module: nn.Module, model: nn.Module) -> tuple[int, int]:
    width = model.config.hidden_size
    return getattr(module, "in_features", width), getattr(module, "out_features", width)


def _base(model: nn.Module, layout: Layout) -> Attached:
    return model, lambda: None


def _published(model: nn.Module, layout: Layout) -> Attached:
    undo: list[Callable[[], object]] = []
    adapters: list[nn.Module] = []
    for name, module in layout.modules(model):
        parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if layout.component:
            adapters.append(PublishedLinear(module, layout))
            setattr(parent, child, adapters[-1])
            undo.append(lambda parent=parent, child=child, module=module: setattr(parent, child, module))
        else:
            like = next(module.parameters())
            adapters.append(PublishedBlock(model.config.hidden_size, layout, like))
            module.block_adapter = adapters[-1]
            undo += [module.register_forward_hook(_add_delta).remove, lambda m=module: delattr(m, "block_adapter")]
    fill(adapters)
    return model, lambda: [step() for step in undo]


def _add_delta(block: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output + block.block_adapter(args[0])


def _swapped(model: nn.Module, layout: Layout) -> Attached:
    from mtlora_integrations import swap_in, swap_out

    _, detach = _published(model, layout)
    swap_in(model, strict=True)
    return model, lambda: (swap_out(model), detach())


def _hooked(make: Callable[[int, int, Layout, Tensor], nn.Module], model: nn.Module, layout: Layout) -> Attached:
    modules = [module for _, module in layout.modules(model)]
    for module in modules:
        adapter = make(*_widths(module, model), layout, next(module.parameters()))
        mk.nn.add_block_adapter(module, adapter)
    fill([module.block_adapter for module in modules])
    return model, lambda: [mk.nn.remove_block_adapter(module) for module in modules]


def _routed_lora(d_in: int, d_out: int, layout: Layout, like: Tensor) -> nn.Module:
    return mk.nn.RoutedLoRA(
        d_in,
        layout.rank,
        layout.experts,
        out_features=d_out,
        num_groups=layout.groups,
        alpha=layout.alpha,
        device=like.device,
        dtype=like.dtype,
    )


def _peft(model: nn.Module, layout: Layout) -> Attached:
    from peft import get_peft_model

    from mtlora_integrations.peft import MtLoraConfig, MtLoraLayer

    config = MtLoraConfig(
        target_modules=list(layout.targets),
        r=layout.rank,
        lora_alpha=layout.alpha,
        num_experts=layout.experts,
        num_groups=layout.groups,
    )
    adapted = get_peft_model(model, config)
    fill([module for module in adapted.modules() if isinstance(module, MtLoraLayer)])
    return adapted, adapted.unload


BASE = ModelContender("base alone", _base)
PUBLISHED = ModelContender("published-style layers", _published)
HAND_WRITTEN = ModelContender("hand-written", lambda model, layout: _hooked(HandWritten, model, layout))
ATTACHED = ModelContender("mtlora_kernels attached", lambda model, layout: _hooked(_routed_lora, model, layout), True)
PEFT = ModelContender("mtlora_kernels peft", _peft, True)
SWAPPED = ModelContender("mtlora_kernels swap_in", _swapped, True)


def model_contenders(layout: Layout) -> list[ModelContender]:
    """Those that are installed, rivals first; `base alone` has no layout and comes with the first one."""
    found = [PUBLISHED, HAND_WRITTEN, ATTACHED]
    if find_spec("peft"):
        found.append(PEFT)
    if _has_swap_in():
        found.append(SWAPPED)
    return found


def _has_swap_in() -> bool:
    if not find_spec("mtlora_integrations"):
        return False
    import mtlora_integrations

    return hasattr(mtlora_integrations, "swap_in")
