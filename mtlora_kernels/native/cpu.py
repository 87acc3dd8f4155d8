"""`routed_lora` on the CPU kernels of `_C`; same arguments and results as the reference with Portable arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..reference.routed_lora import output_dtype
from .params import new_gradients, set_common, set_fields


def routed_lora_fwd(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor | None,
    route_weights: Tensor | None,
    residual: Tensor | None,
    expert_scale: Tensor | None,
    seed: Tensor | None,
    *,
    scaling: float,
    num_groups: int,
    numerics: str,
    activation: str | None,
    dropout_p: float,
    compute_dtype: torch.dtype,
    accumulate_into_residual: bool,
    return_load: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns out [T, d_out], load [N] (or None if not asked for), and for backward h [T, r] and pi [T, G, N]."""
    tokens, (experts, d_out, rank) = x.shape[0], lora_b.shape
    out = x.new_empty(tokens, d_out, dtype=output_dtype(residual, compute_dtype))
    load = x.new_empty(experts, dtype=torch.float32) if return_load else None
    h = x.new_empty(tokens, rank, dtype=compute_dtype)
    pi = x.new_empty(tokens, num_groups, experts, dtype=compute_dtype)
    if route_weights is not None:
        pi.copy_(route_weights)
    elif router is None:
        pi.fill_(1)

    params = _C.RoutedLoraFwd()
    set_common(params, x, lora_a, lora_b, None if route_weights is not None else router, expert_scale, seed, h, pi,
                scaling, activation, dropout_p)  # fmt: skip
    eager = numerics == "eager"  # "fp32" rounds once, so where its sum starts makes no difference
    set_fields(
        params, threads=torch.get_num_threads(), eager=eager,
        accumulate_into_residual=eager and accumulate_into_residual, residual=residual, out=out,
        load=load,
    )  # fmt: skip
    _C.routed_lora_fwd_cpu(params)
    return out, load, h, pi


def routed_lora_bwd(
    dout: Tensor,
    dload: Tensor | None,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor | None,
    h: Tensor,
    pi: Tensor,
    expert_scale: Tensor | None,
    seed: Tensor | None,
    *,
    scaling: float,
    activation: str | None,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, lora_a, lora_b, router, route_weights, expert_scale), None where not in needs.

    Each comes in its tensor's dtype; that of route_weights, which is not an argument, in float32.
    """
    tokens = pi.shape[0]
    dx, da, db, dr, dpi, ds = new_gradients(needs, x, lora_a, lora_b, router, pi, expert_scale)
    if tokens:
        dload = None if dload is None else dload.to(torch.float32).contiguous()
        # d(w) becomes d(pi), then d(logits), in one place unless d(pi) is wanted besides d(logits).
        dlogits = None
        if dpi is not None or ds is not None or (router is not None and (dx is not None or dr is not None)):
            dlogits = dpi if dpi is not None and router is None else torch.empty_like(pi, dtype=torch.float32)
        dh = None if dx is None and da is None else torch.empty_like(h, dtype=torch.float32)
        params = _C.RoutedLoraBwd()
        set_common(params, x, lora_a, lora_b, router, expert_scale, seed, h, pi, scaling, activation, dropout_p)
        set_fields(
            params, threads=torch.get_num_threads(), dout=dout, dload=dload, dx=dx,
            dlora_a=da, dlora_b=db, drouter=dr, dpi=dpi, dexpert_scale=ds,
            dlogits=0 if dlogits is None else dlogits.data_ptr(), dh=0 if dh is None else dh.data_ptr(),
        )  # fmt: skip
        _C.routed_lora_bwd_cpu(params)
    return dx, da, db, dr, dpi, None if ds is None else ds.to(expert_scale.dtype)
