"""`routed_lora` on the Hopper kernels of `_C`; same arguments and results as the reference with Cuda arithmetic."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from .. import _C
from ..reference.routed_lora import is_representable
from .params import set_common, set_fields, view
from .plan import Plan, addresses, plans, raw_stream


def _rows_fit(t: Tensor) -> bool:
    """Whether the copy engine can address the rows of t, wherever it starts: contiguous, 16-byte pitch."""
    pitch = t.stride(0)
    return t.stride(1) == 1 and pitch >= t.shape[1] and pitch * t.element_size() % 16 == 0


def _copyable(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """t in this dtype as the copy engine addresses rows, starting at 16 bytes."""
    if t is None:
        return None
    t = t.to(dtype)
    return t if _rows_fit(t) and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def _packed(w: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """w as the kernels read weights: in the compute dtype, contiguous from a 16-byte boundary."""
    if w is None:
        return None
    w = w.to(dtype).contiguous()
    return w if w.data_ptr() % 16 == 0 else w.clone()


def launch(
    run: Callable, plan_of: Callable[..., Plan], E: torch.dtype, inputs: Sequence[Tensor | None],
    others: Sequence[Tensor | None], options: tuple,
) -> None:  # fmt: skip
    """run, of `_C`, on the inputs, the others and the workspace that plan_of(inputs, others, *options) asks for.

    inputs: two that are copied by rows, then what is read as weights are; copies of them where they do not fit the
    kernels. others: contiguous, with shapes that follow from those of the inputs.
    """
    layouts = [t if t is None else (t.shape, t.stride(), t.dtype) for t in inputs]
    key = (plan_of, E, inputs[0].get_device(), *options, *layouts, *[t if t is None else t.dtype for t in others])
    plan = plans.get(key)
    if plan is None:
        plan = plans.keep(key, _fits(inputs, E) and plan_of(inputs, others, *options))
    given = addresses(inputs)
    if plan is False or reduce(or_, given) % 16:
        rows, weights = [_copyable(t, E) for t in inputs[:2]], [_packed(w, E) for w in inputs[2:]]
        return launch(run, plan_of, E, (*rows, *weights), others, options)
    workspace = plan.new_workspace(inputs[0])
    run(plan.params, raw_stream(inputs[0]), given + addresses((*others, workspace)))


def _fits(inputs: Sequence[Tensor | None], E: torch.dtype) -> bool:
    rows, weights = ([t for t in part if t is not None] for part in (inputs[:2], inputs[2:]))
    in_memory = all(_rows_fit(t) for t in rows) and all(w.is_contiguous() for w in weights)
    return in_memory and all(t.dtype == E for t in (*rows, *weights))


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
    launch(
        _C.routed_lora_fwd_cuda, _plan, x.dtype, (x, residual, lora_a, lora_b, router, expert_scale),
        (out, h, pi, load), (num_groups, scaling, activation, numerics == "eager", accumulate_into_residual),
    )  # fmt: skip
    return out, load, h, pi


def add(residual: Tensor, mixture: Tensor) -> Tensor:
    """residual [T, d_out] plus a `wide` mixture, rounded once, sooner than by torch.add."""
    residual, out = _copyable(residual, residual.dtype), residual.new_empty(residual.shape)
    _C.routed_lora_add_cuda(view(residual), view(mixture), view(out), out.shape, raw_stream(out))
    return out


def _plan(
    inputs: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...], num_groups: int, scaling: float,
    activation: str | None, eager: bool, accumulate_into_residual: bool,
) -> Plan:  # fmt: skip
    (x, residual, *weights), (out, h, pi, load) = inputs, others
    params = _C.RoutedLoraFwd()
    set_common(params, x, *weights, None, h, pi, scaling, activation, 0.0)
    set_fields(
        params, eager=eager, accumulate_into_residual=eager and accumulate_into_residual,
        scaling_exact=eager and is_representable(scaling, h.dtype), residual=residual, out=out, load=load,
    )  # fmt: skip
    floats = 0 if load is None else _C.sum_rows_workspace(len(x) * num_groups, len(load))
    return Plan(params, 4 * floats)
