"""An adapter module, yours or this package's, held to the reference by its parameters' published names."""

import math
import re
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .checks import run_case
from .compare import differences
from .inputs import Inputs, random_inputs
from .lattice import lattice_inputs, rounding_inputs
from .rows import Row

# lora_A.weight; lora_B.{i}.weight, lora_B{i}.weight or stacked lora_B; lora_route.weight; expert_scales.{i}
_NAMES = re.compile(r"^(lora_A|lora_B|lora_route|expert_scales)\.?(\d*)(\.weight)?$")
_ARGUMENTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_route": "router", "expert_scales": "expert_scale"}


def _parameters(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Argument of routed_lora -> the module's parameters that make it up, in order of experts."""
    found: dict[str, list] = {}
    for name, parameter in module.named_parameters():
        match = _NAMES.match(name)
        if match:
            found.setdefault(_ARGUMENTS[match[1]], []).append((int(match[2] or 0), parameter))
    missing = {"lora_a", "lora_b"} - found.keys()
    if missing:
        raise ValueError(f"{type(module).__name__} has no parameters for {sorted(missing)}; see the published names")
    return {name: [p for _, p in sorted(parts, key=lambda part: part[0])] for name, parts in found.items()}


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """The module's tensors of one argument as routed_lora takes them."""
    if name == "expert_scale":
        return torch.cat([part.flatten() for part in parts])
    return torch.stack(parts) if name == "lora_b" and parts[0].dim() == 2 else parts[0]


def _shape(weights: dict[str, Tensor]) -> tuple[int, int, int, int, int]:
    """(d_in, d_out, r, N, G)"""
    experts, d_out, rank = weights["lora_b"].shape
    groups = weights["router"].shape[0] // experts if "router" in weights else 1
    return weights["lora_a"].shape[1], d_out, rank, experts, groups


def _options(module: nn.Module) -> dict:
    """What the module says of itself; numerics is "eager" unless it names one."""
    relu = any(isinstance(m, nn.ReLU) for m in module.modules())
    relu |= getattr(module, "style", None) in ("bottleneck", "adaptformer")
    return {
        "scaling": float(getattr(module, "scaling", 1.0)),
        "numerics": getattr(module, "numerics", "eager"),
        "compute_dtype": getattr(module, "compute_dtype", None),
        "activation": "relu" if relu else None,
    }


def _results(module: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """The module's own output and gradients, named as run_case names them."""
    parameters = _parameters(module)
    leaf = x.detach().requires_grad_()
    out = module(leaf)
    flat = [p for parts in parameters.values() for p in parts]
    grads = iter(torch.autograd.grad(out, [leaf, *flat], dout.view(out.shape).to(out.dtype)))
    results = {"out": out.detach().flatten(0, -2), "dx": next(grads).flatten(0, -2)}
    return results | {f"d{name}": _joined(name, [next(grads) for _ in parts]) for name, parts in parameters.items()}


def assert_matches_reference(module: nn.Module, x: Tensor) -> None:
    """The module's output on x and every gradient, for a seeded upstream one, have the reference's bits.

    For block-level adapters on this package's backends; call eval() first, dropout must be off. A module of
    plain PyTorch operators sums in another order: `python -m mtlora_kernels check --module` takes those.
    """
    weights = {name: _joined(name, parts).detach() for name, parts in _parameters(module).items()}
    _, d_out, *_, groups = _shape(weights)
    options = _options(module) | {"num_groups": groups, "return_load": False}
    generator = torch.Generator(x.device).manual_seed(0)
    out_dtype = options["compute_dtype"] or x.dtype
    dout = torch.randn(x[..., 0].numel(), d_out, generator=generator, device=x.device).to(out_dtype)
    absent = dict.fromkeys(("router", "residual", "expert_scale", "route_weights", "dload"))
    inputs = Inputs(**absent | weights | {"x": x.flatten(0, -2), "dout": dout}, options=options)
    found = differences(_results(module, x, dout), run_case("reference", inputs))
    if found:
        raise AssertionError("; ".join(found))


def _cases(module: nn.Module) -> Iterator[tuple[str, Inputs]]:
    weights = {name: _joined(name, parts) for name, parts in _parameters(module).items()}
    shape, options = _shape(weights), _options(module)
    given = options | {
        "dtype": weights["lora_a"].dtype,
        "device": weights["lora_a"].device,
        "residual": False,
    }
    given |= {"router": "router" in weights, "expert_scale": "expert_scale" in weights}
    for tokens in (2, 64):
        if math.frexp(options["scaling"])[0] == 0.5:
            yield "lattice", lattice_inputs(tokens, *shape, **given)
        if options["numerics"] == "eager":
            yield "rounding", rounding_inputs(tokens, *shape, **given)
        if hasattr(module, "numerics"):
            yield "random", random_inputs(tokens, *shape, **given)


def check_module(module: nn.Module) -> list[Row]:
    """Write inputs into the module's parameters, run it, compare with the reference, restore its parameters.

    Lattice inputs compare the output and every gradient whatever the order of sums, if scaling is a power of
    two. Rounding inputs compare the output at every rounding point of numerics="eager". Random inputs compare
    every bit, for modules with an attribute `numerics`: that claims this package's own orders.
    """
    module.eval()
    parameters, rows = _parameters(module), []
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    try:
        for kind, inputs in _cases(module):
            start = time.perf_counter()
            with torch.no_grad():
                for name, parts in parameters.items():
                    value = getattr(inputs, name)
                    for part, p in zip(value.view(len(parts), -1), parts, strict=True):
                        p.copy_(part.view(p.shape))
            expected = run_case("reference", inputs)
            x = inputs.x.view(2, -1, inputs.x.shape[1])
            actual = _results(module, x, inputs.dout)
            if kind == "rounding":
                actual, expected = {"out": actual["out"]}, {"out": expected["out"]}
            label = f"{type(module).__name__} T={len(inputs.x)} {str(x.dtype).removeprefix('torch.')}"
            seconds = time.perf_counter() - start
            rows.append(Row(str(x.device), "module", kind, label, differences(actual, expected, cast=True), seconds))
    finally:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(before[name])
    return rows
