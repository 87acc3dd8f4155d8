"""Inputs that are exact where a random test cannot be: any order of sums, any device, gives the same bits."""

import torch
from torch import Tensor

from .inputs import Draw, Inputs, assemble

OFF_LOGIT = -4096.0  # finite in fp16, and its exp is 0 even in float64
MAX_TIES = 8
TIES = (3, 7, 5, 6)  # 1/n of none of them is dyadic
# Nonzero entries of (x, dout) per token that keep every intermediate within the dtype's significand.
DENSITY = {torch.bfloat16: (3, 2), torch.float16: (7, 8), torch.float32: (15, 16), torch.float64: (15, 16)}


def _scattered_signs(draw: Draw, rows: int, columns: Tensor, width: int, count: int) -> Tensor:
    """[rows, width] of zeros with at most count entries of +-1 per row, in the given columns."""
    out = torch.zeros(rows, width, device=draw.device)
    if len(columns):
        out.scatter_(1, columns[draw.indices(len(columns), rows, count)], draw.signs(rows, count))
    return out


def _tied_router(draw: Draw, on: Tensor, d_in: int, dead: Tensor) -> Tensor:
    """[G*N, d_in]: rows of a group agree on every feature that x uses, so the experts in `on` tie. The others
    see OFF_LOGIT on feature 0, where x = 1. Dead features, where x = 0, tell the rows apart."""
    G, N = on.shape
    router = draw.integers(-1, 1, G, 1, d_in).expand(G, N, d_in).clone()
    router[..., 0] = torch.where(on, router[..., 0], OFF_LOGIT)
    router = router.flatten(0, 1)
    router[:, dead] = 0
    router[draw.indices(G * N, len(dead)), dead] = draw.signs(len(dead))
    return router


def lattice_inputs(
    T: int,
    d_in: int,
    d_out: int,
    r: int,
    N: int,
    G: int,
    *,
    device="cpu",
    seed: int = 0,
    scaling=2.0,
    **settings,
) -> Inputs:
    """Small dyadic inputs for which forward and backward are exact at every rounding point of every backend,
    of the published layers and of their autograd; settings are those of `assemble`.

    The softmax ties among 2^k <= 8 experts per group: pi is 1/2^k or 0. With c + 1 nonzero entries of x and m
    of dout per token, one of A per column, |B| <= 1, |s| <= 2 and |dload| / (T G) <= scaling, |d(pi)| is at
    most p = 2 (c + 1) m + 1 and d(logits), the widest intermediate, 2 p * 7 units of 1/8: 238 of bf16's 256.
    Router rows differ only on features where x is 0; their gradient to x lands there. Sums over tokens stay
    inside fp32's 2^24 up to T = 1024 at least and round once. dropout_p must be 0 or 0.5, scaling a power of
    two in [0.5, 4], T * G a power of two if load is asked for.
    """
    if settings.get("load") and (T * G) & (T * G - 1):
        raise ValueError(f"T * G is {T * G}, it must be a power of two for an exact load")
    draw = Draw(seed, device)
    names = ("dtype", "compute_dtype", "weight_dtype", "residual_dtype")
    given = [settings[name] for name in names if settings.get(name)] or [torch.float32]
    per_token, per_dout = DENSITY[max(given, key=lambda dtype: torch.finfo(dtype).eps)]
    feature = torch.arange(d_in, device=device)
    live, dead = feature[(feature > 0) & (feature % 4 != 3)], feature[feature % 4 == 3]
    x = _scattered_signs(draw, T, live, d_in, per_token)
    x[:, 0] = 1
    lora_a = torch.zeros(r, d_in, device=device)
    lora_a[draw.indices(r, d_in), feature] = draw.signs(d_in)
    on = draw.uniform(G, N).argsort(-1) < min(MAX_TIES, 1 << N.bit_length() - 1)
    some = draw.uniform(T, G, N).argsort(-1) < MAX_TIES
    values = {
        "x": x,
        "lora_a": lora_a,
        "lora_b": draw.integers(-1, 1, N, d_out, r),
        "router": _tied_router(draw, on, d_in, dead),
        "residual": draw.integers(-4, 4, T, d_out),
        "expert_scale": draw.signs(N) * draw.integers(1, 2, N),
        "route_weights": some * draw.integers(1, 2, T, G, N) / 8,
        "dout": _scattered_signs(draw, T, torch.arange(d_out, device=device), d_out, per_dout),
        "dload": draw.integers(-1, 1, N) * (T * G * scaling),
    }
    return assemble(values, G, scaling=scaling, **settings)


def rounding_inputs(
    T: int, d_in: int, d_out: int, r: int, N: int, G: int, *, device="cpu", seed: int = 0, **settings
) -> Inputs:
    """Exact products but a mixture that rounds everywhere, for the forward of numerics="eager".

    x, A and B are small integers, so h and B_i h come out of any order of sums. pi = 1/n among n tied
    experts, scaling, s and residual are arbitrary: each published rounding point shows in the result.
    """
    draw = Draw(seed, device)
    ties = torch.tensor(TIES, device=device)[torch.arange(G, device=device) % len(TIES)]
    on = draw.uniform(G, N).argsort(-1) < ties[:, None]
    x = draw.integers(-4, 4, T, d_in)
    x[:, 0] = 1
    values = {
        "x": x,
        "lora_a": draw.integers(-4, 4, r, d_in),
        "lora_b": draw.integers(-2, 2, N, d_out, r),
        "router": _tied_router(draw, on, d_in, torch.arange(0, device=device)),
        "residual": draw.normal(T, d_out) * 30,
        "expert_scale": 0.5 + draw.uniform(N) / 2,
        "route_weights": None,
        "dout": draw.normal(T, d_out),
        "dload": None,
    }
    return assemble(values, G, **{"scaling": 0.3, "numerics": "eager"} | settings)
