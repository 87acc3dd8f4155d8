"""The argument rules of `routed_lora`, each stated once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .requirements import require_alike, require_device, require_sequence, require_shape, require_tensor

NUMERICS = ("fp32", "eager")
ACTIVATIONS = (None, "relu")
MAX_WIDTH = 128  # of experts and of rank: the widest tree sum of the kernels


def stacked_experts(lora_b: Sequence[Tensor]) -> Tensor:
    """A sequence of N tensors [d_out, r] as one tensor [N, d_out, r]."""
    require_sequence("lora_b", lora_b, "one tensor [d_out, r] per expert")
    require_alike("lora_b", lora_b)
    return torch.stack(list(lora_b))


def check_routed_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor | None,
    residual: Tensor | None,
    *,
    scaling: float,
    num_groups: int,
    numerics: str,
    activation: str | None,
    expert_scale: Tensor | None,
    dropout_p: float,
    route_weights: Tensor | None,
    accumulate_into_residual: bool,
) -> None:
    """Raise ValueError or TypeError for the first argument of `routed_lora` that does not fit the others."""
    require_tensor("x", x, min_dim=1)
    require_tensor("lora_a", lora_a, dim=2)
    require_tensor("lora_b", lora_b, dim=3)
    d_in, (n, d_out, r) = x.shape[-1], lora_b.shape
    if d_in == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, d_in must be positive")
    if min(n, d_out, r) == 0:
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}, every size must be positive")
    if max(n, r) > MAX_WIDTH:
        raise ValueError(f"lora_b has {n} experts of rank {r}, both must be at most {MAX_WIDTH}")
    require_shape("lora_a", lora_a, (r, d_in), "[r, d_in] with r of lora_b and d_in of x")

    for name, number in (("scaling", scaling), ("dropout_p", dropout_p)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} is {type(number).__name__}, it must be a Python number")
    if numerics not in NUMERICS:
        raise ValueError(f"numerics is {numerics!r}, it must be one of {NUMERICS}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, it must be one of {ACTIVATIONS}")
    if not 0 <= dropout_p < 1:  # torch.compile(dynamic=True) makes it symbolic, which no f-string may hold
        raise ValueError(f"dropout_p is {dropout_p}, it must be in [0, 1)")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups is {type(num_groups).__name__}, it must be an int")
    if num_groups < 1 or d_out % num_groups != 0:
        raise ValueError(f"num_groups is {num_groups}, it must be a positive divisor of d_out = {d_out}")

    if router is not None and route_weights is not None:
        raise ValueError("router and route_weights are both given, give one of them")
    if router is not None:
        require_tensor("router", router, dim=2)
        require_shape("router", router, (num_groups * n, d_in), "[num_groups * N, d_in]")
    elif route_weights is not None:
        require_tensor("route_weights", route_weights, min_dim=2)
        if tuple(route_weights.shape[-2:]) != (num_groups, n):
            raise ValueError(
                f"route_weights has shape {tuple(route_weights.shape)}, it must end in [G, N] = {(num_groups, n)}"
            )
    elif n != 1:
        raise ValueError(f"router is None with {n} experts, it must be given (or route_weights) unless N = 1")

    if expert_scale is not None:
        require_tensor("expert_scale", expert_scale, dim=1)
        require_shape("expert_scale", expert_scale, (n,), "[N]")
    if residual is not None:
        require_tensor("residual", residual)
        require_shape("residual", residual, (*x.shape[:-1], d_out), "[leading dims of x, d_out]")
    if accumulate_into_residual and (numerics != "eager" or residual is None):
        raise ValueError("accumulate_into_residual is True, it needs numerics='eager' and a residual")
    for name, tensor in (
        ("lora_a", lora_a), ("lora_b", lora_b), ("router", router), ("residual", residual),
        ("expert_scale", expert_scale), ("route_weights", route_weights),
    ):  # fmt: skip
        if tensor is not None:
            require_device(name, tensor, x.device, "x")


def token_route_weights(route_weights: Tensor, x: Tensor) -> Tensor:
    """route_weights as [T, G, N]: one row per token, or one row per sequence spread over its tokens."""
    shape, leading, given = tuple(route_weights.shape), x.shape[:-1], route_weights.shape[:-2]
    if len(given) == len(leading) - 1:
        route_weights = route_weights.unsqueeze(-3)
    fits = len(given) in (len(leading), len(leading) - 1) and all(
        g in (1, t) for g, t in zip(route_weights.shape[:-2], leading, strict=False)
    )
    if not fits:
        raise ValueError(
            f"route_weights has shape {shape}, its leading dimensions must match those of x, "
            f"{tuple(leading)}, or be one row per sequence"
        )
    g, n = route_weights.shape[-2:]
    return route_weights.expand(*leading, g, n).reshape(-1, g, n)


def seed_tensor(dropout_seed: int | Tensor | None, x: Tensor) -> Tensor:
    """The Philox key as an int64 tensor [1] on x's device; None draws it from torch's default generator."""
    if dropout_seed is None:
        return torch.randint(2**63 - 1, (1,), device=x.device)
    if isinstance(dropout_seed, Tensor):
        if not (dropout_seed.dtype == torch.int64 and dropout_seed.numel() == 1 and dropout_seed.device == x.device):
            raise ValueError(
                f"dropout_seed is a {dropout_seed.dtype} tensor of {dropout_seed.numel()} elements on "
                f"{dropout_seed.device}, it must be one int64 on {x.device}"
            )
        return dropout_seed.reshape(1)
    if isinstance(dropout_seed, bool) or not isinstance(dropout_seed, int):
        raise TypeError(f"dropout_seed is {type(dropout_seed).__name__}, it must be an int or an int64 tensor")
    if not 0 <= dropout_seed < 2**63:
        raise ValueError(f"dropout_seed is {dropout_seed}, it must be in [0, 2**63)")
    return torch.full((1,), dropout_seed, dtype=torch.int64, device=x.device)
