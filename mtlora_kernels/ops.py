"""torch.library contracts: schemas, fakes and autograd. Torch-only; backends are imported on first launch.

Forward and backward are separate opaque operators with every argument explicit. Outputs never alias inputs;
what was not asked for comes back as an empty tensor. All tensors arrive validated and flattened to tokens.
"""

import torch

from .autograd import gradients, setup_context
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
    activation, dropout_p, compute_dtype, accumulate_into_residual, return_load, impl, **own,
):  # fmt: skip
    """out, load, h and pi of an implementation, load None if it was not asked for. own: options of that one alone."""
    forward, _ = routed_lora_kernels(impl)
    with on_device(x):
        return forward(
            x, lora_a, lora_b, router, route_weights, residual, expert_scale, seed, scaling=scaling,
            num_groups=num_groups, numerics=numerics, activation=activation, dropout_p=dropout_p,
            compute_dtype=compute_dtype, accumulate_into_residual=accumulate_into_residual, return_load=return_load,
            **own,
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


def _autograd_backward(ctx, dout, dload, _dh, _dpi):
    return gradients(ctx, dout, dload, torch.ops.mtlora_kernels.routed_lora_bwd, lambda: ctx.saved_tensors)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "routed_lora has no second derivative: differentiate its gradients neither directly nor with create_graph=True"
    )


# On every device, as the reference runs on any.
_lib.impl("routed_lora_fwd", _routed_lora_fwd, "CompositeExplicitAutograd")
_lib.impl("routed_lora_bwd", _routed_lora_bwd, "CompositeExplicitAutograd")
torch.library.register_fake("mtlora_kernels::routed_lora_fwd", _routed_lora_fwd_fake, lib=_lib)
torch.library.register_fake("mtlora_kernels::routed_lora_bwd", _routed_lora_bwd_fake, lib=_lib)
torch.library.register_autograd(
    "mtlora_kernels::routed_lora_fwd", _autograd_backward, setup_context=setup_context, lib=_lib
)
torch.library.register_autograd("mtlora_kernels::routed_lora_bwd", _no_double_backward, lib=_lib)
