"""`routed_lora` on the Hopper kernels of `_C`; same arguments and results as the reference with Cuda arithmetic."""

from functools import reduce
from operator import or_

import torch
from torch import Tensor

from .. import _C
from ..memo import Memo
from ..reference.routed_lora import is_representable
from .params import set_common, set_fields, view


def _rows_fit(t: Tensor) -> bool:
    """Whether the copy engine can address the rows of t, wherever it starts: contiguous, 16-byte pitch."""
    pitch = t.stride(0)
    return t.stride(1) == 1 and pitch >= t.shape[1] and pitch * t.element_size() % 16 == 0


def copyable(t: Tensor | None) -> Tensor | None:
    """t itself, or a copy where the copy engine cannot address its rows or t does not start at 16 bytes."""
    if t is None or (_rows_fit(t) and t.data_ptr() % 16 == 0):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def packed(w: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """w as the kernels read weights: in the compute dtype, contiguous from a 16-byte boundary."""
    if w is None:
        return None
    w = w.to(dtype).contiguous()
    return w if w.data_ptr() % 16 == 0 else w.clone()


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
    wide: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The signature and returns of `reference.routed_lora.routed_lora_fwd`. wide: out in fp32, not rounded, of numerics
    "fp32" without a residual; for few tokens."""
    tokens, (experts, d_out, rank) = x.shape[0], lora_b.shape
    # Every other dtype is x's, see limits.py.
    out, h = x.new_empty(tokens, d_out, dtype=torch.float32 if wide else x.dtype), x.new_empty(tokens, rank)
    if route_weights is not None:
        pi = route_weights.to(x.dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        pi = (x.new_ones if router is None else x.new_empty)(tokens, num_groups, experts)
    load = x.new_empty(experts, dtype=torch.float32) if return_load else None
    if tokens == 0:
        return out, load.fill_(float("nan")) if return_load else None, h, pi
    partial = load.new_empty(_C.sum_rows_workspace(tokens * num_groups, experts)) if return_load else None
    _launch(
        (x, residual, lora_a, lora_b, router, expert_scale), (out, h, pi, load, partial),
        (scaling, activation, numerics == "eager", accumulate_into_residual),
    )  # fmt: skip
    return out, load, h, pi


def add(residual: Tensor, mixture: Tensor) -> Tensor:
    """residual [T, d_out] plus a `wide` mixture, rounded once. torch.add takes 3.7 us for one token of two dtypes, 1.2
    for one of one."""
    residual, out = copyable(residual), residual.new_empty(residual.shape)
    stream = torch._C._cuda_getCurrentRawStream(out.get_device())
    _C.routed_lora_add_cuda(view(residual), view(mixture), view(out), out.shape, stream)
    return out


# By sizes, strides and options: all parameters but stream and addresses, or False where inputs must be copied first.
_plans: Memo[_C.RoutedLoraFwd | bool] = Memo()


def _launch(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...], options: tuple) -> None:
    addresses = [0 if t is None else t.data_ptr() for t in (*inputs, *outputs)]
    layouts = [t if t is None else (t.shape, t.stride(), t.dtype) for t in inputs]
    key = (*options, *layouts, outputs[0].dtype, outputs[2].shape, outputs[3] is None)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _plan(inputs, outputs, *options))
    if plan is False or reduce(or_, addresses) % 16:
        E = outputs[1].dtype
        _launch((*map(copyable, inputs[:2]), *(packed(w, E) for w in inputs[2:])), outputs, options)
    else:
        _C.routed_lora_fwd_cuda(plan, torch._C._cuda_getCurrentRawStream(inputs[0].get_device()), addresses)


def _plan(
    inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...], scaling: float, activation: str | None,
    eager: bool, accumulate_into_residual: bool,
) -> _C.RoutedLoraFwd | bool:  # fmt: skip
    (x, residual, *weights), (out, h, pi, load, _) = inputs, outputs
    rows_fit = all(t is None or _rows_fit(t) for t in (x, residual))
    if not rows_fit or not all(w is None or (w.dtype == h.dtype and w.is_contiguous()) for w in weights):
        return False
    params = _C.RoutedLoraFwd()
    set_common(params, x, *weights, None, h, pi, scaling, activation, 0.0)
    set_fields(
        params, eager=eager, accumulate_into_residual=eager and accumulate_into_residual,
        scaling_exact=eager and is_representable(scaling, h.dtype), residual=residual, out=out, load=load,
    )  # fmt: skip
    return params
