"""From a forward to its backward: what is remembered and the gradients, for the operators and for eager mode."""

from collections.abc import Callable

from torch import Tensor


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
