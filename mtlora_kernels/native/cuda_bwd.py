"""Backward of `routed_lora` on the Hopper kernels of `_C`; same results as the reference with Cuda arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..reference.arithmetic import token_chunk
from .cuda import launch
from .params import new_gradients, set_common, set_fields
from .plan import Plan


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
    gradients = new_gradients(needs, x, lora_a, lora_b, router, pi, expert_scale)
    if len(pi):
        launch(
            _C.routed_lora_bwd_cuda, _plan, h.dtype, (dout, x, lora_a, lora_b, router, expert_scale, h, pi),
            (None if dload is None else dload.to(torch.float32).contiguous(), *gradients), (scaling, activation),
        )  # fmt: skip
    *gradients, ds = gradients
    return *gradients, None if ds is None else ds.to(expert_scale.dtype)


def _plan(
    inputs: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...], scaling: float, activation: str | None
) -> Plan:
    (dout, x, *weights, h, pi), (dload, dx, da, db, dr, dpi, ds) = inputs, others
    params = _C.RoutedLoraBwd()
    set_common(params, x, *weights, None, h, pi, scaling, activation, 0.0)
    set_fields(
        params, token_chunk=token_chunk(len(x)), dout=dout, dload=dload, dx=dx, dlora_a=da, dlora_b=db, drouter=dr,
        dpi=dpi, dexpert_scale=ds,
    )  # fmt: skip
    return Plan(params, _C.routed_lora_bwd_workspace(params))
