"""Host-like layers of every kind, with values."""

import hydralora_host
import published_host
import torch
from torch import Tensor, nn

from mtlora_kernels.testing import Inputs, lattice_inputs

D, OUT, R, N = 96, 64, 8, 8

# kind -> (constructor, groups)
KINDS = {
    "component": (lambda **o: published_host.LoraLinear(D, OUT, R, N, **o), 1),
    "component grouped": (lambda **o: published_host.LoraLinear(D, OUT, R, N, group_size=16, **o), 4),
    "component transposed": (lambda **o: published_host.LoraLinear(D, OUT, R, N, fan_in_fan_out=True, **o), 1),
    "lowrank": (lambda **o: published_host.LowRankBlockAdapter(D, R, N, **o), 1),
    "lowrank grouped": (lambda **o: published_host.LowRankBlockAdapter(D, R, N, group_size=24, **o), 4),
    "lowrank alone": (lambda **o: published_host.LowRankBlockAdapter(D, R, 1, **o), 1),
    "bottleneck": (lambda **o: published_host.BottleneckBlockAdapter(D, R, N, group_size=48, **o), 2),
    "adaptformer": (lambda **o: published_host.MoEAdaptFormerBlockAdapter(D, R, N, group_size=12, **o), 8),
    "adaptformer alone": (lambda **o: published_host.MoEAdaptFormerBlockAdapter(D, R, 1, **o), 1),
    "mmoe": (lambda **o: published_host.MMOELoraLinear(D, OUT, R, 4, **o), 1),
    "mmoe s": (lambda **o: published_host.MMOELoraLinearS(D, OUT, R, 2, **o), 1),
    "hydralora": (lambda **o: hydralora_host.Linear(D, OUT, R, N, **o), 1),
}
BALANCED = ("component", "component grouped", "lowrank", "lowrank grouped", "bottleneck", "adaptformer")


def make(kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0](**options)


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
    values = lattice_inputs(10, D, d_out, R, getattr(layer, "num_experts", N), groups, seed=3, dtype=dtype)
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


def at_random(kind: str, dtype=torch.float32, device="cpu", tokens=(2, 5), **options) -> tuple[nn.Module, Tensor]:
    layer = make(kind, **options).to(device, dtype)
    return layer, torch.randn(*tokens, D, dtype=dtype, device=device)


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


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to the order of sums in fp32."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
