"""torch.library contracts: schemas, fakes and autograd. Torch-only; backends are imported on first launch.

Forward and backward are separate opaque operators with every argument explicit. Outputs never alias inputs;
what was not asked for comes back as an empty tensor. All tensors arrive validated and flattened to tokens.
"""

import torch
from torch import Tensor

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


def _routed_lora_fwd(
    x, lora_a, lora_b, router, route_weights, residual, expert_scale, seed, scaling, num_groups, numerics,
    activation, dropout_p, compute_dtype, accumulate_into_residual, return_load, impl,
):  # fmt: skip
    forward, _ = routed_lora_kernels(impl)
    return forward(
        x, lora_a, lora_b, router, route_weights, residual, expert_scale, seed, scaling=scaling,
        num_groups=num_groups, numerics=numerics, activation=activation, dropout_p=dropout_p,
        compute_dtype=compute_dtype, accumulate_into_residual=accumulate_into_residual, return_load=return_load,
    )  # fmt: skip


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


def _routed_lora_bwd(
    dout, dload, x, lora_a, lora_b, router, h, pi, expert_scale, seed, scaling, activation, dropout_p, needs, impl
):
    _, backward = routed_lora_kernels(impl)
    grads = backward(
        dout, dload, x, lora_a, lora_b, router, h, pi, expert_scale, seed, scaling=scaling, activation=activation,
        dropout_p=dropout_p, needs=needs,
    )  # fmt: skip
    return tuple(x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _routed_lora_bwd_fake(
    dout, dload, x, lora_a, lora_b, router, h, pi, expert_scale, seed, scaling, activation, dropout_p, needs, impl
):
    weights = pi.new_empty(pi.shape, dtype=acc_dtype(pi.dtype))
    owners = (x, lora_a, lora_b, router, weights, expert_scale)
    return tuple(
        owner.new_empty(owner.shape) if need else x.new_empty(0) for owner, need in zip(owners, needs, strict=True)
    )


_INPUTS = (
    "x", "lora_a", "lora_b", "router", "route_weights", "residual", "expert_scale", "seed", "scaling", "num_groups",
    "numerics", "activation", "dropout_p", "compute_dtype", "accumulate_into_residual", "return_load", "impl",
)  # fmt: skip
_WITH_GRADIENT = ("x", "lora_a", "lora_b", "router", "route_weights", "expert_scale")  # order of the backward op


def _setup_context(ctx, inputs, output) -> None:
    args = dict(zip(_INPUTS, inputs, strict=True))
    _, _, h, pi = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        args["x"], args["lora_a"], args["lora_b"], args["router"], h, pi, args["expert_scale"], args["seed"]
    )
    ctx.out_shape = output[0].shape
    ctx.route_dtype = None if args["route_weights"] is None else args["route_weights"].dtype
    ctx.residual_dtype = None if args["residual"] is None else args["residual"].dtype
    ctx.scalars = (args["scaling"], args["activation"], args["dropout_p"])
    ctx.impl, ctx.return_load = args["impl"], args["return_load"]


def _autograd_backward(ctx, dout: Tensor | None, dload: Tensor | None, _dh, _dpi):
    x, lora_a, lora_b, router, h, pi, expert_scale, seed = ctx.saved_tensors
    wanted = dict(zip(_INPUTS, ctx.needs_input_grad, strict=True))
    needs = [bool(wanted[name]) for name in _WITH_GRADIENT]
    grads = dict.fromkeys(_INPUTS)
    if not ctx.return_load:
        dload = None  # an empty load can still get an empty gradient
    if dout is None and dload is None:
        return tuple(grads.values())
    if wanted["residual"] and dout is not None:
        grads["residual"] = dout.to(ctx.residual_dtype)
    if any(needs):
        if dout is None:
            dout = h.new_zeros(1).expand(ctx.out_shape)
        results = torch.ops.mtlora_kernels.routed_lora_bwd(
            dout, dload, x, lora_a, lora_b, router, h, pi, expert_scale, seed, *ctx.scalars, needs, ctx.impl
        )
        grads |= {name: result for name, result, need in zip(_WITH_GRADIENT, results, needs, strict=True) if need}
        if grads["route_weights"] is not None:
            grads["route_weights"] = grads["route_weights"].to(ctx.route_dtype)
    return tuple(grads.values())


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
    "mtlora_kernels::routed_lora_fwd", _autograd_backward, setup_context=_setup_context, lib=_lib
)
torch.library.register_autograd("mtlora_kernels::routed_lora_bwd", _no_double_backward, lib=_lib)
