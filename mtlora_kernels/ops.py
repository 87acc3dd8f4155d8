"""torch.library contracts: schemas, fakes and autograd. Torch-only; backends are imported on first launch.

Forward and backward are separate opaque operators with every argument explicit. Outputs never alias inputs;
what was not asked for comes back as an empty tensor. All tensors arrive validated and flattened to tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .device import on_device
from .dispatch import routed_lora_kernels
from .reference.arithmetic import acc_dtype
from .reference.routed_lora import output_dtype

_lib = torch.library.Library("mtlora_kernels", "DEF")
_lib.define(
    "routed_lora_fwd(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? router, Tensor? route_weights, "
    "Tensor? residual, Tensor? expert_scale, Tensor? seed, float scaling, int num_groups, str numerics, "
    "str? activation, float dropout_p, ScalarType compute_dtype, bool accumulate_into_residual, "
    "bool return_load, str impl) -> (Tensor out, Tensor load, Tensor h, Tensor pi)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "routed_lora_bwd(Tensor dout, Tensor? dload, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? router, Tensor h, "
    "Tensor pi, Tensor? expert_scale, Tensor? seed, float scaling, str? activation, float dropout_p, "
    "bool[] needs, str impl) -> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor drouter, "
    "Tensor droute_weights, Tensor dexpert_scale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def run_forward(
    x, lora_a, lora_b, router, route_weights, residual, expert_scale, seed, scaling, num_groups, numerics,
    activation, dropout_p, compute_dtype, accumulate_into_residual, return_load, impl,
):  # fmt: skip
    """out, load, h and pi of an implementation, load None if it was not asked for."""
    forward, _ = routed_lora_kernels(impl)
    with on_device(x):
        return forward(
            x, lora_a, lora_b, router, route_weights, residual, expert_scale, seed, scaling=scaling,
            num_groups=num_groups, numerics=numerics, activation=activation, dropout_p=dropout_p,
            compute_dtype=compute_dtype, accumulate_into_residual=accumulate_into_residual, return_load=return_load,
        )  # fmt: skip


def _routed_lora_fwd(x, *inputs):
    out, load, h, pi = run_forward(x, *inputs)
    return out, x.new_empty(0, dtype=acc_dtype(h.dtype)) if load is None else load, h, pi


def _routed_lora_fwd_fake(
    x, lora_a, lora_b, router, route_weights, residual, expert_scale, seed, scaling, num_groups, numerics,
    activation, dropout_p, compute_dtype, accumulate_into_residual, return_load, impl,
):  # fmt: skip
    tokens, (experts, d_out, rank) = x.shape[0], lora_b.shape
    return (
        x.new_empty(tokens, d_out, dtype=output_dtype(residual, compute_dtype)),
        x.new_empty(experts if return_load else 0, dtype=acc_dtype(compute_dtype)),
        x.new_empty(tokens, rank, dtype=compute_dtype),
        x.new_empty(tokens, num_groups, experts, dtype=compute_dtype),
    )


def run_backward(
    dout, dload, x, lora_a, lora_b, router, h, pi, expert_scale, seed, scaling, activation, dropout_p, needs, impl
):
    """The gradients of an implementation, None for what was not asked for."""
    _, backward = routed_lora_kernels(impl)
    with on_device(x):
        return backward(
            dout, dload, x, lora_a, lora_b, router, h, pi, expert_scale, seed, scaling=scaling, activation=activation,
            dropout_p=dropout_p, needs=needs,
        )  # fmt: skip


def _routed_lora_bwd(dout, dload, x, *inputs):
    grads = run_backward(dout, dload, x, *inputs)
    return tuple(x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _routed_lora_bwd_fake(
    dout, dload, x, lora_a, lora_b, router, h, pi, expert_scale, seed, scaling, activation, dropout_p, needs, impl
):
    weights = pi.new_empty(pi.shape, dtype=acc_dtype(pi.dtype))
    owners = (x, lora_a, lora_b, router, weights, expert_scale)
    return tuple(
        owner.new_empty(owner.shape) if need else x.new_empty(0) for owner, need in zip(owners, needs, strict=True)
    )


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*needed(inputs, output))
    remember_rest(ctx, inputs, output[0])


def needed(inputs, output) -> tuple[Tensor | None, ...]:
    """The tensors of a call that its backward needs: x, A, B, router, h, pi, expert_scale, seed."""
    x, lora_a, lora_b, router, _, _, expert_scale, seed = inputs[:8]
    return x, lora_a, lora_b, router, *output[2:], expert_scale, seed


def remember_rest(ctx, inputs, out: Tensor) -> None:
    """What backward needs besides the saved tensors."""
    route_weights, residual = inputs[4:6]
    ctx.set_materialize_grads(False)
    ctx.out_shape = out.shape
    ctx.route_dtype = None if route_weights is None else route_weights.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.scalars = (inputs[8], *inputs[11:13])  # scaling, activation, dropout_p
    ctx.return_load, ctx.impl = inputs[15:17]


def gradients(
    ctx, dout: Tensor | None, dload: Tensor | None, backward: Callable, saved: Callable[[], tuple]
) -> tuple[Tensor | None, ...]:
    """Of every input of the forward operator; backward is its backward operator, or what stands for it, and saved
    gives the tensors that are `needed`."""
    need_residual = ctx.needs_input_grad[5]
    needs = [*ctx.needs_input_grad[:5], ctx.needs_input_grad[6]]
    if not ctx.return_load:
        dload = None  # an empty load can still get an empty gradient
    dx = da = db = drouter = dweights = dresidual = dscale = None
    if need_residual and dout is not None:
        dresidual = dout.to(ctx.residual_dtype)
    if any(needs) and not (dout is None and dload is None):
        x, lora_a, lora_b, router, h, pi, expert_scale, seed = saved()
        if dout is None:
            dout = h.new_zeros(1).expand(ctx.out_shape)
        results = backward(
            dout, dload, x, lora_a, lora_b, router, h, pi, expert_scale, seed, *ctx.scalars, needs, ctx.impl
        )
        dx, da, db, drouter, dweights, dscale = (g if need else None for g, need in zip(results, needs, strict=True))
        if dweights is not None:
            dweights = dweights.to(ctx.route_dtype)
    return dx, da, db, drouter, dweights, dresidual, dscale, *[None] * 10


def _autograd_backward(ctx, dout, dload, _dh, _dpi):
    return gradients(ctx, dout, dload, torch.ops.mtlora_kernels.routed_lora_bwd, lambda: ctx.saved_tensors)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "routed_lora has no second derivative: differentiate its gradients neither directly nor with create_graph=True"
    )


for _key in ("CPU", "CUDA"):
    _lib.impl("routed_lora_fwd", _routed_lora_fwd, _key)
    _lib.impl("routed_lora_bwd", _routed_lora_bwd, _key)
torch.library.register_fake("mtlora_kernels::routed_lora_fwd", _routed_lora_fwd_fake, lib=_lib)
torch.library.register_fake("mtlora_kernels::routed_lora_bwd", _routed_lora_bwd_fake, lib=_lib)
torch.library.register_autograd(
    "mtlora_kernels::routed_lora_fwd", _autograd_backward, setup_context=setup_context, lib=_lib
)
torch.library.register_autograd("mtlora_kernels::routed_lora_bwd", _no_double_backward, lib=_lib)
