"""The adapters that a whole model is timed with, put on and taken off. All hold the same values."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import mtlora_kernels as mk
from mtlora_integrations import swap_in, swap_out

from .model_layers import HandWritten, Layout, LoraLinear, LowRankBlockAdapter
from .registry import PACKAGE

B_STD = 1e-3  # of the experts; zeros, the first values, would run faster than trained ones

Attached = tuple[nn.Module, Callable[[], object]]  # the module to call, and how to take the adapters off


@dataclass(frozen=True)
class ModelContender:
    """attach is called with the model, the layout and impl, which is empty for rivals."""

    name: str
    attach: Callable[[nn.Module, Layout, str], Attached]
    exact: bool = False  # the losses of those that are have the same bits
    impl: str = ""


def fill(adapters: Iterable[nn.Module]) -> None:
    """Seeded values in the order A, router, experts one by one, whatever their names end in."""
    for seed, adapter in enumerate(adapters):
        named = dict(adapter.named_parameters())
        a, route, *experts = (
            p for kind in ("lora_A", "lora_route", "lora_B") for name, p in named.items() if name.startswith(kind)
        )
        generator = torch.Generator(a.device).manual_seed(seed)
        matrices = list(experts[0]) if experts[0].dim() == 3 else experts
        for target in (a, route, *matrices):
            std = target.shape[1] ** -0.5 if target is a or target is route else B_STD
            # Drawn in bf16: the values do not depend on the dtype that a contender keeps.
            value = torch.empty(target.shape, dtype=torch.bfloat16, device=a.device)
            target.detach().copy_(value.normal_(std=std, generator=generator))


def _widths(module: nn.Module, model: nn.Module) -> tuple[int, int]:
    width = model.config.hidden_size
    return getattr(module, "in_features", width), getattr(module, "out_features", width)


def _base(model: nn.Module, layout: Layout, impl: str) -> Attached:
    return model, lambda: None


def _published(model: nn.Module, layout: Layout, impl: str) -> Attached:
    undo: list[Callable[[], object]] = []
    adapters: list[nn.Module] = []
    for name, module in layout.modules(model):
        parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if layout.component:
            adapters.append(LoraLinear(module, layout))
            setattr(parent, child, adapters[-1])
            undo.append(lambda parent=parent, child=child, module=module: setattr(parent, child, module))
        else:
            like = next(module.parameters())
            adapters.append(LowRankBlockAdapter(model.config.hidden_size, layout, like))
            module.block_adapter = adapters[-1]
            undo += [module.register_forward_hook(_add_delta).remove, lambda m=module: delattr(m, "block_adapter")]
    fill(adapters)
    return model, lambda: [step() for step in undo]


def _add_delta(block: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output + block.block_adapter(args[0])


def _swapped(model: nn.Module, layout: Layout, impl: str) -> Attached:
    _, detach = _published(model, layout, impl)
    swap_in(model, impl=impl, strict=True)
    return model, lambda: (swap_out(model), detach())


def _hooked(model: nn.Module, layout: Layout, make: Callable[[int, int, Tensor], nn.Module]) -> Attached:
    modules = [module for _, module in layout.modules(model)]
    width = model.config.hidden_size  # in and out of a block; a linear layer has its own
    for module in modules:
        d_in, d_out = getattr(module, "in_features", width), getattr(module, "out_features", width)
        mk.nn.add_block_adapter(module, make(d_in, d_out, next(module.parameters())))
    fill([module.block_adapter for module in modules])
    return model, lambda: [mk.nn.remove_block_adapter(module) for module in modules]


def _hand_written(model: nn.Module, layout: Layout, impl: str) -> Attached:
    return _hooked(model, layout, lambda d_in, d_out, like: HandWritten(d_in, d_out, layout, like))


def _attached(model: nn.Module, layout: Layout, impl: str) -> Attached:
    sizes, options = (layout.rank, layout.experts), {"num_groups": layout.groups, "alpha": layout.alpha, "impl": impl}

    def make(d_in: int, d_out: int, like: Tensor) -> nn.Module:
        placed = {"device": like.device, "dtype": like.dtype}
        return mk.nn.RoutedLoRA(d_in, *sizes, out_features=d_out, **options, **placed)

    return _hooked(model, layout, make)


def _peft(model: nn.Module, layout: Layout, impl: str) -> Attached:
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
    for module in adapted.modules():
        if isinstance(module, mk.nn.RoutedMixture):
            module.impl = impl
    return adapted, adapted.unload


BASE = ModelContender("base alone", _base)
PUBLISHED = ModelContender("published-style layers", _published)
HAND_WRITTEN = ModelContender("hand-written", _hand_written)
SWAPPED = ModelContender(f"{PACKAGE} swap_in", _swapped)
ATTACHED = ModelContender(f"{PACKAGE} attached", _attached, exact=True)
PEFT = ModelContender(f"{PACKAGE} peft", _peft, exact=True)


def model_contenders(impls: Sequence[str]) -> list[ModelContender]:
    """Those of this package that are installed on each implementation, then rivals, which take longer."""
    ours = [SWAPPED, ATTACHED, *([PEFT] if find_spec("peft") else [])]
    return [*(replace(contender, impl=impl) for impl in impls for contender in ours), HAND_WRITTEN, PUBLISHED]
