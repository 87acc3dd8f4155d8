"""Backward of `routed_lora` on the Hopper kernels of `_C`; same results as the reference with Cuda arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..reference.arithmetic import token_chunk
from .cuda import copyable, packed
from .params import new_gradients, set_common, set_fields


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
    """The signature and returns of `reference.routed_lora_bwd.routed_lora_bwd`."""
    tokens = pi.shape[0]
    dx, da, db, dr, dpi, ds = new_gradients(needs, x, lora_a, lora_b, router, pi, expert_scale)
    if tokens == 0:
        return dx, da, db, dr, dpi, None if ds is None else ds.to(expert_scale.dtype)

    E = h.dtype
    dout, x = copyable(dout.to(E)), copyable(x)
    a, b, r, scale = (packed(w, E) for w in (lora_a, lora_b, router, expert_scale))
    dload = None if dload is None else dload.to(torch.float32).contiguous()
    params = _C.RoutedLoraBwd()
    set_common(params, x, a, b, r, scale, seed, h, pi, scaling, activation, dropout_p)
    set_fields(
        params, stream=torch.cuda.current_stream(x.device).cuda_stream, token_chunk=token_chunk(tokens), dout=dout,
        dload=dload, dx=dx, dlora_a=da, dlora_b=db, drouter=dr, dpi=dpi, dexpert_scale=ds,
    )  # fmt: skip
    workspace = torch.empty(_C.routed_lora_bwd_workspace(params), dtype=torch.uint8, device=x.device)
    set_fields(params, workspace=workspace.data_ptr())
    _C.routed_lora_bwd_cuda(params)
    return dx, da, db, dr, dpi, None if ds is None else ds.to(expert_scale.dtype)
