"""What calls of a kind share, decided once: that their arguments fit, the compute dtype, the implementation."""

import torch
from torch import Tensor

from .dispatch import resolve
from .limits import Call
from .memo import Memo
from .reference.routed_lora import output_dtype
from .requirements import COMPUTE_DTYPES, require_one_of
from .validation import check_routed_lora

_known: Memo[tuple[str, torch.dtype]] = Memo()


def settled(
    tensors: tuple[Tensor | None, ...],
    scaling: float,
    num_groups: int,
    numerics: str,
    activation: str | None,
    dropout_p: float,
    accumulate_into_residual: bool,
    impl: str | None,
    compute_dtype: torch.dtype | None,
) -> tuple[str, torch.dtype]:
    """The implementation and the compute dtype of a call, or the error of `routed_lora` for it.

    tensors: x, A, stacked B, router, residual, expert_scale, route_weights. A second call of a kind, with the same
    options, dtypes, shapes and devices, is not looked at again.
    """
    options = scaling, num_groups, numerics, activation, dropout_p, accumulate_into_residual, impl, compute_dtype
    if torch.compiler.is_compiling():
        return _settle(tensors, options)
    try:
        dtype = _default_dtype(tensors[0]) if compute_dtype is None else compute_dtype
        layouts = [t if t is None else (t.dtype, t.shape, t.device) for t in tensors]
        # Types too, as 2.0 equals 2; no value of scaling, as a schedule has a new one every step.
        key = (type(scaling), type(num_groups), type(dropout_p), *options[1:-1], dtype, *layouts)
        known = _known.get(key)
    except (AttributeError, TypeError, RuntimeError):  # not a tensor, a nested one, or a symbolic size without hash
        return _settle(tensors, options)
    return _known.keep(key, _settle(tensors, options)) if known is None else known


def _default_dtype(x: Tensor) -> torch.dtype:
    kind = "cuda" if x.is_cuda else x.device.type  # the second takes longer
    if kind == "meta":  # autocast raises for it
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _settle(tensors: tuple[Tensor | None, ...], options: tuple) -> tuple[str, torch.dtype]:
    x, lora_a, b, router, residual, expert_scale, route_weights = tensors
    scaling, num_groups, numerics, activation, dropout_p, accumulate_into_residual, impl, compute_dtype = options
    check_routed_lora(
        x,
        lora_a,
        b,
        router,
        residual,
        scaling=scaling,
        num_groups=num_groups,
        numerics=numerics,
        activation=activation,
        expert_scale=expert_scale,
        dropout_p=dropout_p,
        route_weights=route_weights,
        accumulate_into_residual=accumulate_into_residual,
    )
    if compute_dtype is None:
        compute_dtype = _default_dtype(x)
    require_one_of("compute_dtype", compute_dtype, COMPUTE_DTYPES)
    experts, d_out, rank = b.shape
    call = Call(
        compute_dtype=compute_dtype,
        x_dtype=x.dtype,
        out_dtype=output_dtype(residual, compute_dtype),
        d_in=x.shape[-1],
        d_out=d_out,
        rank=rank,
        experts=experts,
        groups=num_groups,
        eager=numerics == "eager",
        dropout=dropout_p > 0,
        float64=any(t is not None and t.dtype == torch.float64 for t in tensors[:-1]),
    )
    return resolve(impl, x.device, call), compute_dtype
