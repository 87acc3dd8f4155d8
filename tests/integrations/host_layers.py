"""Host-like layers of every kind, with values."""

import hydralora_host
import published_host
import torch
from torch import Tensor, nn

from mtlora_kernels.testing import Inputs, lattice_inputs

D, OUT, R, N = SIZES = 96, 64, 8, 8

# kind -> (class, groups, options)
KINDS = {
    "component": (published_host.LoraLinear, 1, {}),
    "component grouped": (published_host.LoraLinear, 4, {}),
    "component alone": (published_host.LoraLinear, 1, {"experts": 1}),
    "component transposed": (published_host.LoraLinear, 1, {"fan_in_fan_out": True}),
    "lowrank": (published_host.LowRankBlockAdapter, 1, {}),
    "lowrank grouped": (published_host.LowRankBlockAdapter, 4, {}),
    "lowrank alone": (published_host.LowRankBlockAdapter, 1, {"experts": 1}),
    "bottleneck": (published_host.BottleneckBlockAdapter, 2, {}),
    "adaptformer": (published_host.MoEAdaptFormerBlockAdapter, 8, {}),
    "adaptformer alone": (published_host.MoEAdaptFormerBlockAdapter, 1, {"experts": 1}),
    "mmoe": (published_host.MMOELoraLinear, 1, {"experts": 4}),
    "mmoe s": (published_host.MMOELoraLinearS, 1, {"experts": 2}),
    "hydralora": (hydralora_host.Linear, 1, {}),
}


def make(kind: str, sizes: tuple[int, int, int, int] = SIZES, **options) -> nn.Module:
    """sizes: d_in (a block adapter's only width), d_out, r, N."""
    cls, groups, own = KINDS[kind]
    d_in, d_out, r, n = sizes
    options = {"r": r, "experts": n} | own | options
    if issubclass(cls, nn.Linear):
        options |= {"d_in": d_in, "d_out": d_out}
    else:
        options["dim"] = d_out = d_in
    if groups > 1:
        options["group_size"] = d_out // groups
    torch.manual_seed(0)
    return cls(**options)


def put(parameters: list[Tensor], values: Tensor) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values.reshape(len(parameters), -1), strict=True):
            parameter.copy_(value.reshape(parameter.shape))


def experts(layer: nn.Module) -> list[Tensor]:
    if hasattr(layer, "lora_num"):
        return [getattr(layer, f"lora_B{i}").weight for i in range(layer.lora_num)]
    return [expert.weight for expert in layer.lora_B]


def on_lattice(layer: nn.Module, groups: int, dtype=torch.float32, device="cpu") -> tuple[nn.Module, Tensor, Tensor]:
    """The layer with values, x [2, 5, D] and an upstream gradient for which every order of sums is exact."""
    d_out = getattr(layer, "out_features", D)
    n = getattr(layer, "num_experts", getattr(layer, "lora_num", N))
    values = lattice_inputs(10, D, d_out, R, n, groups, seed=3, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Linear):
        put([layer.weight], torch.randint(-1, 2, (layer.weight.numel(),), generator=draw).float())
        put([layer.bias], torch.randint(-2, 3, (layer.bias.numel(),), generator=draw).float())
    if hasattr(layer, "lora_gate"):
        for part, count in ((layer.lora_A, "loraA"), (layer.lora_B, "loraB")):
            weights = [e.mlp.weight for e in getattr(part["default"], count)]
            put(weights, torch.randint(-1, 2, (sum(w.numel() for w in weights),), generator=draw).float())
        nn.init.zeros_(layer.lora_gate["default"].GateL.weight)  # a tie among 2^k experts
    else:
        fill(layer, values)
    return layer.to(device, dtype), values.x.view(2, 5, D).to(device), values.dout.view(2, 5, d_out).to(device)


def fill(layer: nn.Module, values: Inputs) -> None:
    put([layer.lora_A.weight], values.lora_a)
    put(experts(layer), values.lora_b)
    if layer.lora_route is not None:
        put([layer.lora_route.weight], values.router)


def at_random(
    kind: str, dtype=torch.float32, device="cpu", tokens=(2, 5), sizes=SIZES, **options
) -> tuple[nn.Module, Tensor]:
    """The layer with every matrix drawn at random, and x."""
    layer = make(kind, sizes, **options)
    for p in layer.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return layer.to(device, dtype), torch.randn(*tokens, sizes[0]).to(device, dtype)


def output(layer: nn.Module, x: Tensor, **keywords) -> Tensor:
    out = layer(x, **keywords)
    return out[0] if isinstance(out, tuple) else out


def results(layer: nn.Module, x: Tensor, dout: Tensor, **keywords) -> dict[str, Tensor]:
    """out, dx and the gradient of every parameter that has one."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = output(layer, x, **keywords)
    out.backward(dout.to(out.dtype))
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad} | grads


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance=1e-5) -> None:
    """Equal up to the order of sums in fp32, by default to 1e-5 of each tensor's largest value."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    for name, value in expected.items():
        atol = tolerance * value.detach().abs().max().item()
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
