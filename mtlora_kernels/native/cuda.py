"""`routed_lora` on the Hopper kernels of `_C`; same arguments and results as the reference with Cuda arithmetic."""

from functools import lru_cache

import torch
from torch import Tensor

from .. import _C
from ..reference.routed_lora import is_representable, output_dtype
from .params import set_common, set_fields


def copyable(t: Tensor | None) -> Tensor | None:
    """t itself, or a copy where the copy engine cannot address its rows: contiguous, 16-byte pitch and start."""
    if t is None:
        return None
    pitch = t.stride(0)
    if t.stride(1) == 1 and pitch >= t.shape[1] and pitch * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def packed(w: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """w as the kernels read weights: in the compute dtype, contiguous from a 16-byte boundary."""
    if w is None:
        return None
    w = w.to(dtype).contiguous()
    return w if w.data_ptr() % 16 == 0 else w.clone()


representable = lru_cache(maxsize=64)(is_representable)  # a scaling that follows a schedule has a new value every step


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The signature and returns of `reference.routed_lora.routed_lora_fwd`."""
    E, tokens, (experts, d_out, rank) = compute_dtype, x.shape[0], lora_b.shape
    x, residual = copyable(x), copyable(residual)
    a, b, r, scale = (packed(w, E) for w in (lora_a, lora_b, router, expert_scale))
    out = x.new_empty(tokens, d_out, dtype=output_dtype(residual, E))
    h = x.new_empty(tokens, rank)
    if route_weights is not None:
        pi = route_weights.to(E, copy=True, memory_format=torch.contiguous_format)
    else:
        pi = (x.new_ones if router is None else x.new_empty)(tokens, num_groups, experts)
    load = x.new_empty(experts if return_load else 0, dtype=torch.float32)
    if tokens == 0:
        return out, load.fill_(float("nan")), h, pi

    params = _C.RoutedLoraFwd()
    set_common(params, x, a, b, r, scale, seed, h, pi, scaling, activation, dropout_p)
    eager = numerics == "eager"
    set_fields(
        params, stream=torch.cuda.current_stream(x.device).cuda_stream, eager=eager,
        accumulate_into_residual=eager and accumulate_into_residual, scaling_exact=eager and representable(scaling, E),
        residual=residual, out=out,
    )  # fmt: skip
    if return_load:
        workspace = load.new_empty(_C.sum_rows_workspace(tokens * num_groups, experts))
        set_fields(params, load=load, workspace=workspace.data_ptr())
    _C.routed_lora_fwd_cuda(params)
    return out, load, h, pi
